"""`potential_energy` and `class_potential`: what they take, and how they refuse the rest."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators
from .operators import gets_gradient
from .potential import Potential
from .serving import BACKENDS

REDUCTIONS = ("sum", "mean")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = tuple(
    getattr(torch, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")
)


class Stats(NamedTuple):
    """What a call of `PFMLLoss` found: scalars on the device of the points, no gradient.

    Pairs are ordered, as Eq. 6 counts them: two points of a field that act on each other are two.
    On a device without float64 these are float32, and counts above 2^24 are rounded to it.
    """

    active_energy: Tensor  # float64, what pairs that exert force add to a field at rest, >= 0
    attracting_pairs: Tensor  # int64, pairs of one class at d >= delta
    repelling_pairs: Tensor  # int64, pairs of two classes at d < delta_rep
    smallest_distance: Tensor  # float64, of the repelling pairs; inf if there are none
    active_share: Tensor  # float64, share of the tiles of pairs that may exert force
    labels_out_of_range: Tensor  # int64, labels of the batch outside [0, C): they make the loss NaN

    @classmethod
    def of(cls, totals: Tensor) -> Stats:
        """The stats in a vector of `TOTALS`."""
        energy, attracting, repelling, distance, active, *_, tiles, outside = totals
        share = active / tiles.clamp(1)
        return cls(energy, attracting.long(), repelling.long(), distance, share, outside.long())


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
    _check_options(backend, prune=prune, validate=validate)
    return total_energy(
        points, labels, potential, sources=sources, source_labels=source_labels,
        reduction=reduction, prune=prune, backend=backend, validate=validate,
    )[0]  # fmt: skip


def total_energy(
    points: Tensor,
    labels: Tensor,
    potential: Potential,
    *,
    proxies: Tensor | None = None,
    classes: int | None = None,
    unit: bool = False,
    sources: Tensor | None = None,
    source_labels: Tensor | None = None,
    everyone: Tensor | None = None,
    everyone_labels: Tensor | None = None,
    reduction: str = "sum",
    prune: bool = True,
    basis: Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
    operator: Callable[..., Any] = operators.potential_energy,
) -> tuple[Tensor, Tensor]:
    """`potential_energy` of checked arguments, and the `TOTALS` it is made of.

    Args:
        points: [B, D].
        labels: [N], of the points, then of the proxies.
        proxies: [C, M, D], which make N points with those, at least as wide and float32.
        classes: C, if the labels of the points have to be in [0, C): on the CPU others are an
            error, elsewhere they make the value and all gradients NaN.
        unit: whether all points are scaled to unit length.
        everyone, everyone_labels: [A, D] and [A] int64, all points of the field, if those above
            are a part of it: the value is then that part's share of the energy, and the gradient
            that of all of it. At least float32.
        basis: [D, at most 60] bfloat16, a sound one of pfml_triton.sketch; None takes a random one.
        operator: what takes the arguments of `operators.PotentialEnergy`.
    """
    _check_force(potential, points, backend)
    value, totals, *_ = operator(
        points, _int64(labels), proxies, sources,
        None if source_labels is None else _int64(source_labels), everyone, everyone_labels,
        basis, *_numbers(potential), unit, reduction == "mean", prune, backend, classes, validate,
        gets_gradient(points), gets_gradient(proxies), gets_gradient(sources),
    )  # fmt: skip
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
    if isinstance(class_index, bool) or not isinstance(class_index, Integral):
        raise TypeError(f"class_index must be an int, got {class_index!r}")
    class_index = int(class_index)
    if not -(2**63) <= class_index < 2**63:
        raise ValueError(f"class_index must be in [-2**63, 2**63), got {class_index}")
    if points.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "class_potential is differentiable in queries only, got points that require a "
            "gradient: pass points.detach(), or call it under torch.no_grad()"
        )
    _check_options(backend, prune=prune, validate=validate)
    _check_force(potential, queries, backend)
    psi: Tensor
    psi, *_ = operators.class_potential(
        queries, points, _int64(labels), class_index, *_numbers(potential),
        prune, backend, validate, gets_gradient(queries),
    )  # fmt: skip
    return psi


def _numbers(potential: Potential) -> tuple[float, float, float, float]:
    """Its fields; dataclasses.astuple copies them, which takes the host microseconds."""
    p = potential
    return p.alpha, p.delta, p.repulsion_radius, p.min_distance


def _int64(labels: Tensor) -> Tensor:
    # Where there is nothing to convert, the question takes the host less than the call.
    return (labels if labels.dtype == torch.int64 else labels.to(torch.int64)).contiguous()


def _check_options(backend: str, **flags: bool) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")


def _check_force(potential: Potential, points: Tensor, backend: str) -> None:
    # The kernels take constants as float32, even where the interpreter computes in float64.
    largest = 1e300 if points.dtype == torch.float64 and backend != "triton" else 1e37
    if potential.max_stiffness > largest:
        raise ValueError(
            f"the force of this potential overflows: alpha * min_distance^-(alpha + 2) must be <= "
            f"{largest:g} for {points.dtype}, got {potential.max_stiffness:.3g} for "
            f"alpha = {potential.alpha}, min_distance = {potential.min_distance}"
        )


def _check_potential(potential: Potential | None) -> Potential:
    if potential is None:
        return Potential()
    if not isinstance(potential, Potential):
        raise TypeError(f"potential must be a Potential, got {type(potential).__name__}")
    return potential


def _check_plain(x: Tensor, name: str) -> None:
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{name} must be a plain Tensor, got a DTensor: pass {name}.to_local()")


def _check_points(points: Tensor, name: str, size: str) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(points).__name__}")
    _check_plain(points, name)
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
    _check_plain(labels, name)
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name} must have an integer dtype, got {labels.dtype}")
    if labels.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {labels.layout}")


def _check_cloud(points: Tensor, labels: Tensor, name: str, labels_name: str, size: str) -> None:
    _check_points(points, name, size)
    _check_labels(labels, labels_name)
    if labels.dim() != 1 or labels.shape[0] != points.shape[0]:
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
