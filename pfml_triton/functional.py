"""`potential_energy` and `class_potential`: validation, choice of the backend, autograd.

Both ask a backend for the same things: to `gather` the points of a cloud, for the sums over the
pairs that exert force (`field_terms`), for their `total`, in which the pairs without force are
constants, and to `pull_back` gradients. The energy is a sum, so its gradient is computed along with
it in forward, and backward only scales it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .potential import (
    FieldTerms,
    Potential,
    Split,
    active_energy,
    nan_unless_finite,
    rest_energy,
)
from .serving import served
from .sketch import random_basis

BACKENDS = ("auto", "triton", "torch")
REDUCTIONS = ("sum", "mean")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = tuple(
    getattr(torch, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")
)


class Stats(NamedTuple):
    """What a call of `PFMLLoss` found: scalars on the device of the points, no gradient.

    Pairs are ordered, as Eq. 6 counts them: two points of a field that act on each other are two.
    """

    active_energy: Tensor  # float64, what pairs that exert force add to a field at rest, >= 0
    attracting_pairs: Tensor  # int64, pairs of one class at d >= delta
    repelling_pairs: Tensor  # int64, pairs of two classes at d < delta_rep
    smallest_distance: Tensor  # float64, of the repelling pairs; inf if there are none
    active_share: Tensor  # float64, share of the tiles of pairs that may exert force

    @classmethod
    def of(cls, totals: Tensor) -> Stats:
        """The stats in a vector of `TOTALS`."""
        energy, attracting, repelling, distance, share = totals[: len(cls._fields)]
        return cls(energy, attracting.long(), repelling.long(), distance, share)


class Backend(Protocol):
    """What pfml_triton.torch_backend and pfml_triton.kernels.launch both are.

    Each has a cloud of its own, N points in the order of their class.
    """

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
            labels: classes [N], int64.
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
        mean: bool = False,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The value of the loss, a scalar, and its `TOTALS`, a vector.

        Args:
            terms: of the field of `acting` on `acted_on`.
            mean: whether the value is the energy over the number of ordered pairs of distinct
                points.
            before: totals of the field of `acted_on` on itself, which are then included.
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


class _Field(NamedTuple):
    """What a call of `potential_energy` is about, beside the tensors that get gradients."""

    labels: Tensor
    source_labels: Tensor | None
    potential: Potential
    unit: bool
    mean: bool
    basis: Tensor | None
    backend: str
    records: bool  # is autograd at work?


def potential_energy(
    points: Tensor,
    labels: Tensor,
    potential: Potential | None = None,
    *,
    sources: Tensor | None = None,
    source_labels: Tensor | None = None,
    reduction: str = "sum",
    prune: bool = True,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """Potential energy of points in the field of each other (Eq. 6 of the PFML paper).

    U = sum_i sum_{j != i} psi(||x_i - x_j||), where psi attracts points of one class and repels
    points of different classes (`Potential`): every unordered pair counts twice, as in the paper,
    and a point's constant potential on itself is left out. With `sources`, the potential of the
    points in their field, sum_i sum_s psi(||x_i - s||), is added; the sources do not act on each
    other, and receive a force only if they require a gradient.

    Args:
        points: [N, D], float32, bfloat16 or float16 (torch backend also float64), N >= 0,
            1 <= D <= 16000, any strides. Used as they are: normalise them yourself, or use
            `PFMLLoss`.
        labels: [N], any integer dtype, any values, any order.
        potential: alpha, radii and softening length; None means `Potential()`.
        sources: [S, D], the dtype and device of `points`, or None.
        source_labels: [S], integers, required with `sources`.
        reduction: "sum" (Eq. 6), or "mean" over the ordered pairs (0 where there is none).
        prune: skip the tiles of pairs of which 64 columns (`pfml_triton.sketch`) prove that no pair
            exerts a force. The result is the same to rounding; only time can tell.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        validate: also check that every value is finite. Waits for the device.

    Returns:
        Scalar, float32 (float64 for float64 points), differentiable once in `points` and `sources`.
        Points that coincide exert no force on each other (see `Potential.min_distance`). NaN or
        infinite points make it NaN.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, option or (with `validate`) value; a backend that cannot
            serve here; a potential whose largest force overflows float32.
    """
    potential = _check_potential(potential)
    _check_cloud(points, labels, "points", "labels", "N")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if (sources is None) != (source_labels is None):
        missing = "source_labels" if source_labels is None else "sources"
        raise ValueError(f"sources and source_labels go together, but {missing} is None")
    if sources is not None and source_labels is not None:
        _check_cloud(sources, source_labels, "sources", "source_labels", "S")
        _check_match(sources, "sources", points, "points")
    if validate:
        _check_finite(points, "points")
        if sources is not None:
            _check_finite(sources, "sources")
    basis = _chosen_basis(prune, points)
    return total_energy(
        points, labels, potential, sources=sources, source_labels=source_labels,
        reduction=reduction, backend=backend, basis=basis,
    )[0]  # fmt: skip


def total_energy(
    points: Tensor,
    labels: Tensor,
    potential: Potential,
    *,
    proxies: Tensor | None = None,
    unit: bool = False,
    sources: Tensor | None = None,
    source_labels: Tensor | None = None,
    reduction: str = "sum",
    backend: str = "auto",
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`potential_energy` of checked arguments, and the `TOTALS` it is made of.

    Args:
        points: [B, D].
        labels: [N], of the points, then of the proxies.
        proxies: [C, M, D], which make N points with those, at least as wide and float32.
        unit: whether all points are scaled to unit length.
        basis: [D, at most 60] bfloat16, a sound one of pfml_triton.sketch; None does not prune.
    """
    field = _Field(
        labels.to(torch.int64).contiguous(),
        None if source_labels is None else source_labels.to(torch.int64).contiguous(),
        potential, unit, reduction == "mean", basis, _check_backend(backend, points, potential),
        torch.is_grad_enabled(),
    )  # fmt: skip
    value, totals = _PotentialEnergy.apply(points, proxies, sources, field)
    return value, totals


def class_potential(
    queries: Tensor,
    points: Tensor,
    labels: Tensor,
    class_index: int,
    potential: Potential | None = None,
    *,
    prune: bool = True,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """The field Psi_j of a class at free positions (Eq. 3-4 of the PFML paper).

    Psi_j(r) = sum of psi_att over the points of class j + sum of psi_rep over all others: what a
    member of class j would feel at r. A query that coincides with a point feels it, at d = 0.

    Args:
        queries: [Q, D] positions r, floating point as in `potential_energy`, Q >= 0.
        points: [N, D], the dtype and device of `queries`: what induces the field. No gradient
            flows to them.
        labels: [N], any integer dtype.
        class_index: the class j; any int64, with or without points.
        potential, prune, backend, validate: as in `potential_energy`.

    Returns:
        [Q] float32 (float64 for float64 queries), differentiable once in `queries`.

    Raises:
        TypeError, ValueError: as `potential_energy`; also ValueError for points that require a
            gradient while gradients are recorded: pass `points.detach()`.
    """
    potential = _check_potential(potential)
    _check_cloud(points, labels, "points", "labels", "N")
    _check_points(queries, "queries", "Q")
    _check_match(queries, "queries", points, "points")
    if isinstance(class_index, bool) or not isinstance(class_index, int):
        raise TypeError(f"class_index must be an int, got {class_index!r}")
    if not -(2**63) <= class_index < 2**63:
        raise ValueError(f"class_index must be in [-2**63, 2**63), got {class_index}")
    if points.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "class_potential is differentiable in queries only, got points that require a "
            "gradient: pass points.detach(), or call it under torch.no_grad()"
        )
    if validate:
        _check_finite(queries, "queries")
        _check_finite(points, "points")
    field = _Field(
        labels.to(torch.int64).contiguous(), None, potential, False, False,
        _chosen_basis(prune, queries), _check_backend(backend, queries, potential),
        torch.is_grad_enabled(),
    )  # fmt: skip
    value: Tensor = _ClassPotential.apply(queries, points, class_index, field)
    return value


class _PotentialEnergy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, points: Tensor, proxies: Tensor | None, sources: Tensor | None, field: _Field
    ) -> tuple[Tensor, Tensor]:
        compute = partial(_PotentialEnergy._forward, ctx, points, proxies, sources, field)
        return served(field.backend, points, compute)

    @staticmethod
    def _forward(
        ctx: Any,
        points: Tensor,
        proxies: Tensor | None,
        sources: Tensor | None,
        field: _Field,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        needs = [field.records and need for need in ctx.needs_input_grad[:3]]
        potential = field.potential
        rest = None if proxies is None else proxies.flatten(0, 1)
        cloud = backend.gather(
            points, field.labels, potential, rest=rest, unit=field.unit, basis=field.basis
        )
        needs_grad = needs[0] or needs[1]
        terms = backend.field_terms(cloud, cloud, potential, needs_grad=needs_grad)
        value, totals = backend.total(terms, cloud, cloud, potential, mean=field.mean)
        # The field is mutual: x_i stands in row i and in column i of U. Its gradient is doubled in
        # backward, which saves a pass over it.
        grad, source_grad = terms.grad, None
        n, acting = len(cloud), None
        ctx.twice, ctx.pairs = True, n * (n - 1)
        if sources is not None and field.source_labels is not None:
            acting = backend.gather(
                sources.to(cloud.points.dtype), field.source_labels, potential,
                unit=field.unit, basis=field.basis,
            )  # fmt: skip
            terms = backend.field_terms(cloud, acting, potential, needs_grad=needs_grad)
            value, totals = backend.total(
                terms, cloud, acting, potential, mean=field.mean, before=totals
            )
            if grad is not None and terms.grad is not None:
                grad = grad.mul_(2).add_(terms.grad)
            if needs[2]:
                source_grad = backend.field_terms(acting, cloud, potential, needs_grad=True).grad
            ctx.twice = False
            ctx.pairs += n * len(sources)
        ctx.pairs = max(ctx.pairs, 1) if field.mean else 1
        ctx.backend = field.backend
        ctx.dtypes = [
            x.dtype if x is not None and need else None
            for x, need in zip((points, proxies, sources), needs, strict=True)
        ]
        # The inputs are saved as well, so that a change of them in place is an error.
        units = [
            (None, None) if c is None or c.inverse is None else (c.points, c.inverse)
            for c in (cloud, acting)
        ]
        ctx.save_for_backward(
            points, proxies, sources, totals, grad, *units[0], source_grad, *units[1]
        )
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return value, totals

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        points, proxies, sources, totals, *saved = ctx.saved_tensors
        if grad_output is None:
            return None, None, None, None

        def of_cloud(*of: Any, **how: Any) -> tuple[Tensor | None, Tensor | None]:
            how |= {"grad_output": grad_output, "totals": totals, "pairs": ctx.pairs}
            return served(ctx.backend, points, lambda backend: backend.pull_back(*of, **how))

        first = second = third = None
        grad, placed, inverse, source_grad, source_placed, source_inverse = saved
        if grad is not None:
            split = Split(len(points), (ctx.dtypes[0], ctx.dtypes[1]))
            first, second = of_cloud(grad, placed, inverse, split=split, twice=ctx.twice)
        if second is not None:
            second = second.view(proxies.shape)
        if source_grad is not None:
            split = Split(len(source_grad), (ctx.dtypes[2], None))
            third = of_cloud(source_grad, source_placed, source_inverse, split=split)[0]
        if torch.is_grad_enabled():
            first, second, third = (
                None if g is None else _OnceDifferentiable.apply(g, points, proxies, sources)
                for g in (first, second, third)
            )
        return first, second, third, None


class _ClassPotential(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, points: Tensor, class_index: int, field: _Field
    ) -> Tensor:
        compute = partial(_ClassPotential._forward, ctx, queries, points, class_index, field)
        return served(field.backend, queries, compute)

    @staticmethod
    def _forward(
        ctx: Any, queries: Tensor, points: Tensor, class_index: int, field: _Field, backend: Backend
    ) -> Tensor:
        potential = field.potential
        of_class = field.labels.new_full((len(queries),), class_index)
        acted_on = backend.gather(queries, of_class, potential, basis=field.basis)
        acting = backend.gather(points, field.labels, potential, basis=field.basis)
        needs_grad = field.records and ctx.needs_input_grad[0]
        terms = backend.field_terms(acted_on, acting, potential, needs_grad=needs_grad)
        psi = active_energy(terms, potential)
        psi = psi + rest_energy(terms.own_class, len(points), potential)
        nothing = nan_unless_finite(queries) + nan_unless_finite(points).sum()
        ctx.save_for_backward(queries, terms.grad, nothing)
        return (psi + nothing).to(torch.promote_types(queries.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        queries, grad, nothing = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        first = (grad * (grad_output + nothing)[:, None]).to(queries.dtype)
        if torch.is_grad_enabled():
            first = _OnceDifferentiable.apply(first, queries)
        return first, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on a gradient that was computed in forward: it depends on the inputs, but not by
    way of a graph, so a second derivative would be wrong without a word."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "the potential energy is differentiable once: its gradient is computed in forward and "
            "has no derivative of its own (reference.potential_field has, for small N)"
        )


def _chosen_basis(prune: bool, points: Tensor) -> Tensor | None:
    """The basis of the sketch if one knows nothing of the points, or None not to prune."""
    if not isinstance(prune, bool):
        raise TypeError(f"prune must be a bool, got {prune!r}")
    return random_basis(points.shape[1], points.device) if prune else None


def _check_backend(backend: str, points: Tensor, potential: Potential) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    # The kernels take constants as float32, even where the interpreter computes in float64.
    largest = 1e300 if points.dtype == torch.float64 and backend != "triton" else 1e37
    if potential.max_stiffness > largest:
        raise ValueError(
            f"the force of this potential overflows: alpha * min_distance^-(alpha + 2) must be <= "
            f"{largest:g} for {points.dtype}, got {potential.max_stiffness:.3g} for "
            f"alpha = {potential.alpha}, min_distance = {potential.min_distance}"
        )
    return backend


def _check_potential(potential: Potential | None) -> Potential:
    if potential is None:
        return Potential()
    if not isinstance(potential, Potential):
        raise TypeError(f"potential must be a Potential, got {type(potential).__name__}")
    return potential


def _check_points(points: Tensor, name: str, size: str) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(points).__name__}")
    if points.dtype not in _DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise TypeError(f"{name} must have dtype {expected}, got {points.dtype}")
    if points.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {points.layout}")
    # The bounds of rounding hold up to this depth.
    if points.dim() != 2 or not 1 <= points.shape[1] <= 16_000:
        raise ValueError(
            f"{name} must be [{size}, D] with 1 <= D <= 16000, got {list(points.shape)}"
        )


def _check_labels(labels: Tensor, name: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(labels).__name__}")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name} must have an integer dtype, got {labels.dtype}")
    if labels.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {labels.layout}")


def _check_cloud(points: Tensor, labels: Tensor, name: str, labels_name: str, size: str) -> None:
    _check_points(points, name, size)
    _check_labels(labels, labels_name)
    if labels.dim() != 1 or len(labels) != len(points):
        raise ValueError(
            f"{labels_name} must be [{size}] with {size} = {len(points)}, one for each row of "
            f"{name} {list(points.shape)}, got {list(labels.shape)}"
        )
    if labels.device != points.device:
        raise ValueError(
            f"{labels_name} must be on the device of {name}, {points.device}, got {labels.device}"
        )


def _check_match(a: Tensor, name: str, b: Tensor, b_name: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name} and {b_name} must have one depth D, got {list(a.shape)} and {list(b.shape)}"
        )
    if a.dtype != b.dtype:
        raise TypeError(f"{name} must have the dtype of {b_name}, {b.dtype}, got {a.dtype}")
    if a.device != b.device:
        raise ValueError(f"{name} must be on the device of {b_name}, {b.device}, got {a.device}")


def _check_finite(points: Tensor, name: str) -> None:
    finite = torch.isfinite(points).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"{name} must be finite, got NaN or Inf in {len(bad)} of {len(points)} rows, the first "
            f"being row {int(bad[0])}"
        )
