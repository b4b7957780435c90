"""`potential_energy` and `class_potential`: validation, choice of the backend, autograd.

Both ask a backend for the same thing: the sums over the pairs that exert force, `FieldTerms`. The
energy is a sum, so its gradient is computed along with it in forward, and backward is one
multiplication. The pairs without force are constants, added here from pair counts, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_backend
from .potential import FieldTerms, Potential
from .sketch import random_basis

try:
    from .kernels import launch as _triton_backend
except ImportError:  # Triton has no wheel for this platform: the torch backend serves
    _triton_backend = None  # type: ignore[assignment]

BACKENDS = ("auto", "triton", "torch")
REDUCTIONS = ("sum", "mean")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = tuple(
    getattr(torch, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")
)

Backend = Callable[..., FieldTerms]


class Stats(NamedTuple):
    """What a call of `potential_energy` found: scalars on the device of the points, no gradient.

    Pairs are ordered, as Eq. 6 counts them: two points of a field that act on each other are two.
    """

    active_energy: Tensor  # float64, what pairs that exert force add to a field at rest, >= 0
    attracting_pairs: Tensor  # int64, pairs of one class at d >= delta
    repelling_pairs: Tensor  # int64, pairs of two classes at d < delta_rep
    smallest_distance: Tensor  # floating point, of the repelling pairs; inf if there are none
    active_share: Tensor  # floating point, share of the tiles of pairs that may exert force


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
    return energy_and_stats(
        points,
        labels,
        potential,
        sources=sources,
        source_labels=source_labels,
        reduction=reduction,
        prune=prune,
        backend=backend,
        validate=validate,
    )[0]


def energy_and_stats(
    points: Tensor,
    labels: Tensor,
    potential: Potential | None,
    *,
    sources: Tensor | None,
    source_labels: Tensor | None,
    reduction: str,
    prune: bool,
    backend: str,
    validate: bool = False,
    basis: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """`potential_energy` and what it found: arguments, value and errors are the same.

    `basis` [D, at most 60] bfloat16 is a sound one of pfml_triton.sketch, or None for a random one.
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
    field_terms = _choose_backend(backend, points, potential)
    basis = _chosen_basis(prune, points, basis)
    # float32 is float32, whatever the ambient autocast dtype is.
    with torch.autocast(points.device.type, enabled=False):
        value, *stats = _PotentialEnergy.apply(
            points, labels, sources, source_labels, potential, reduction, field_terms, basis,
            torch.is_grad_enabled(),
        )  # fmt: skip
    return value, Stats(*stats)


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
    field_terms = _choose_backend(backend, queries, potential)
    basis = _chosen_basis(prune, queries, None)
    with torch.autocast(queries.device.type, enabled=False):
        value: Tensor = _ClassPotential.apply(
            queries, points, labels, class_index, potential, field_terms, basis,
            torch.is_grad_enabled(),
        )  # fmt: skip
    return value


class _PotentialEnergy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        labels: Tensor,
        sources: Tensor | None,
        source_labels: Tensor | None,
        potential: Potential,
        reduction: str,
        field_terms: Backend,
        basis: Tensor | None,
        records: bool,
    ) -> tuple[Tensor, ...]:
        needs_points, _, needs_sources = (records and need for need in ctx.needs_input_grad[:3])
        labels = labels.to(torch.int64).contiguous()
        n = len(points)
        terms = field_terms(
            points, labels, points, labels, potential, needs_grad=needs_points, basis=basis
        )
        # The field is mutual: x_i stands in row i and in column i of U. Its gradient is doubled in
        # backward, which saves a pass over it.
        grad, twice, source_grad = terms.grad, 2.0, None
        pairs = n * (n - 1)
        own_class = _pairs_of_one_class(labels, labels) - n
        stats = _stats(terms, potential)
        at_rest = _rest_energy(own_class, pairs, potential)
        nothing = _nan_unless_finite(points).sum()
        if sources is not None and source_labels is not None:
            source_labels = source_labels.to(torch.int64).contiguous()
            terms = field_terms(
                points, labels, sources, source_labels, potential,
                needs_grad=needs_points, basis=basis,
            )  # fmt: skip
            if grad is not None and terms.grad is not None:
                grad, twice = grad.mul_(2).add_(terms.grad), 1.0
            if needs_sources:
                source_grad = field_terms(
                    sources, source_labels, points, labels, potential, needs_grad=True, basis=basis
                ).grad
            own_class = _pairs_of_one_class(labels, source_labels)
            stats = _joined(stats, _stats(terms, potential), n, len(sources))
            at_rest = at_rest + _rest_energy(own_class, n * len(sources), potential)
            nothing = nothing + _nan_unless_finite(sources).sum()
            pairs += n * len(sources)
        scale = 1.0 / max(pairs, 1) if reduction == "mean" else 1.0
        ctx.save_for_backward(points, sources, grad, source_grad, nothing)
        ctx.scales = scale * twice, scale
        ctx.mark_non_differentiable(*stats)
        total = stats.active_energy + at_rest
        value = (total * scale + nothing).to(torch.promote_types(points.dtype, torch.float32))
        return value, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        points, sources, grad, source_grad, nothing = ctx.saved_tensors
        first, third = (
            None if g is None else _scaled(g, grad_output * scale + nothing, x)
            for g, scale, x in zip((grad, source_grad), ctx.scales, (points, sources), strict=True)
        )
        return first, None, third, None, None, None, None, None, None


class _ClassPotential(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        points: Tensor,
        labels: Tensor,
        class_index: int,
        potential: Potential,
        field_terms: Backend,
        basis: Tensor | None,
        records: bool,
    ) -> Tensor:
        labels = labels.to(torch.int64).contiguous()
        terms = field_terms(
            queries, labels.new_full((len(queries),), class_index), points, labels, potential,
            needs_grad=records and ctx.needs_input_grad[0], basis=basis,
        )  # fmt: skip
        own_class = (labels == class_index).sum()
        psi = _active_energy(terms, potential) + _rest_energy(own_class, len(points), potential)
        nothing = _nan_unless_finite(queries) + _nan_unless_finite(points).sum()
        ctx.save_for_backward(queries, terms.grad, nothing)
        return (psi + nothing).to(torch.promote_types(queries.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        queries, grad, nothing = ctx.saved_tensors
        factor = (grad_output + nothing)[:, None]
        first = None if grad is None else _scaled(grad, factor, queries)
        return first, None, None, None, None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on a gradient that was computed in forward: it depends on `points`, but not by
    way of a graph, so a second derivative would be wrong without a word."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, points: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "the potential energy is differentiable once: its gradient is computed in forward and "
            "has no derivative of its own (reference.potential_field has, for small N)"
        )


def _scaled(grad: Tensor, factor: Tensor, points: Tensor) -> Tensor:
    scaled = (grad * factor).to(points.dtype)
    if not torch.is_grad_enabled():
        return scaled
    once: Tensor = _OnceDifferentiable.apply(scaled, points)
    return once


def _pairs_of_one_class(labels: Tensor, other: Tensor) -> Tensor:
    """How many pairs (i, j) have labels[i] == other[j]: int64 scalar, never on the host."""
    other = other.sort().values
    upper = torch.searchsorted(other, labels, right=True)
    return (upper - torch.searchsorted(other, labels)).sum()


def _active_energy(terms: FieldTerms, potential: Potential) -> Tensor:
    """What the active pairs of each point have above their constants, >= 0: [N] float64.

    The energy is mostly constants. This is the part of it that forces can lower.
    """
    constants = (
        terms.attracting.double() * potential.attraction_constant
        + terms.repelling.double() * potential.repulsion_constant
    )
    return terms.energy.double() - constants


def _rest_energy(own_class: Tensor, pairs: int, potential: Potential) -> Tensor:
    """The energy of as many pairs, `own_class` of them of one class, if none exerts force."""
    return (
        own_class.double() * potential.attraction_constant
        + (pairs - own_class).double() * potential.repulsion_constant
    )


def _stats(terms: FieldTerms, potential: Potential) -> Stats:
    return Stats(
        _active_energy(terms, potential).sum(),
        terms.attracting.sum(),
        terms.repelling.sum(),
        torch.nn.functional.pad(terms.nearest, (0, 1), value=torch.inf).amin().sqrt(),
        terms.active_share,
    )


def _joined(mutual: Stats, cross: Stats, n: int, m: int) -> Stats:
    """The stats of a field of n points and that of m sources on them, together."""
    share = mutual.active_share * n + cross.active_share * m
    return Stats(
        mutual.active_energy + cross.active_energy,
        mutual.attracting_pairs + cross.attracting_pairs,
        mutual.repelling_pairs + cross.repelling_pairs,
        torch.minimum(mutual.smallest_distance, cross.smallest_distance),
        share / max(n + m, 1),
    )


def _nan_unless_finite(points: Tensor) -> Tensor:
    """0 for each point [N], or NaN where it or its squared norm is not finite: such a point is near
    to nothing and exerts no force, so that without this it would vanish instead of showing."""
    dtype = torch.promote_types(points.dtype, torch.float32)
    return torch.linalg.vector_norm(points.detach(), dim=1, dtype=dtype) * 0


def _chosen_basis(prune: bool, points: Tensor, basis: Tensor | None) -> Tensor | None:
    """The basis of the sketch, or None if there is to be none."""
    if not isinstance(prune, bool):
        raise TypeError(f"prune must be a bool, got {prune!r}")
    if not prune:
        return None
    return random_basis(points.shape[1], points.device) if basis is None else basis


def _choose_backend(backend: str, points: Tensor, potential: Potential) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    largest = 1e300 if points.dtype == torch.float64 else 1e37
    if potential.max_stiffness > largest:
        raise ValueError(
            f"the force of this potential overflows: alpha * min_distance^-(alpha + 2) must be <= "
            f"{largest:g} for {points.dtype}, got {potential.max_stiffness:.3g} for "
            f"alpha = {potential.alpha}, min_distance = {potential.min_distance}"
        )
    if backend == "torch":
        return torch_backend.field_terms
    obstacle = (
        f"Triton cannot be imported here ({torch.__version__=})"
        if _triton_backend is None
        else _triton_backend.obstacle(points)
    )
    if obstacle is None and (backend == "triton" or points.is_cuda):
        return _triton_backend.field_terms
    if backend == "triton":
        raise ValueError(f'backend="triton" cannot serve: {obstacle}; use backend="torch"')
    return torch_backend.field_terms


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
