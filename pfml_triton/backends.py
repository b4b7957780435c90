"""What a backend is: pfml_triton.kernels.launch and pfml_triton.torch_backend."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .potential import FieldTerms, Given, Potential, Split


class Backend(Protocol):
    """Each has a cloud of its own, N points in the order of their class."""

    def gather(
        self,
        x: Tensor,
        labels: Tensor,
        potential: Potential,
        *,
        rest: Tensor | None = None,
        unit: bool = False,
        basis: Tensor | None = None,
    ) -> Any:
        """The cloud of points `x` [B, D], and of `rest` [N - B, D] if given.

        Args:
            labels: classes [N], int64 or int32; of clouds that meet, the same.
            rest: more points, float32 or wider; all are then copied in that dtype.
            unit: whether to scale the points to unit length.
            basis: [D, at most 60] bfloat16, Q of the sketch that filters tiles; None takes all.
        """

    def field_terms(
        self, acted_on: Any, acting: Any, potential: Potential, *, needs_grad: bool
    ) -> FieldTerms:
        """What the field of one cloud does to the points of another, or of itself."""

    def total(
        self,
        terms: FieldTerms,
        acted_on: Any,
        acting: Any,
        potential: Potential,
        *,
        among: bool,
        pairs: int = 1,
        before: Tensor | None = None,
        given: Given | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The value of the loss, a scalar, and its `TOTALS`, a vector.

        Args:
            terms: of the field of `acting` on `acted_on`.
            among: whether the points of `acted_on` are among those of `acting`: then each meets
                itself, which is no pair.
            pairs: that the energy is divided by.
            before: totals of another field on `acted_on`, which are then included.
            given: the labels of `acted_on` as they came, if some have to be in a range: any that
                is not makes the value and the gradients NaN. The device finds out, and nobody
                waits for it.
        """

    def pull_back(
        self,
        grad: Tensor,
        points: Tensor | None,
        inverse: Tensor | None,
        *,
        grad_output: Tensor,
        totals: Tensor,
        split: Split,
        pairs: int = 1,
        twice: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of what a cloud was gathered from, `x` and `rest`.

        Args:
            grad: [N, D] of the energy in the points, or of half of it if `twice`.
            points, inverse: of the cloud, if its points were scaled; else None.
            grad_output: the derivative in the value of the loss, a scalar.
            totals: of the energy; they make the gradient NaN if a point was not finite.
            split: which gradients are wanted, and how they look.
            pairs: that the energy is divided by.
        """
