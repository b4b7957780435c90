"""The decaying pair potential of PFML and its derivatives, in closed form.

Bhatnagar and Ahuja, "Potential Field Based Deep Metric Learning", CVPR 2025, Eq. 1-2.

Written with one decreasing function of the distance, phi(d) = d^-alpha (alpha = 0: phi(d) = -log d,
the limit of (d^-alpha - 1) / alpha), the two potentials are

    psi_att(d) = -phi(max(d, delta))          a class attracts, but not inside its radius
    psi_rep(d) =  phi(min(d, delta_rep))      classes repel, but not beyond the radius

Both are constant where they exert no force. Those saturated pairs are nearly all of the energy and
none of the gradient, so only the *active* pairs are evaluated, those of one class at d >= delta and
those of two at d < delta_rep; the others are counted, and enter as constants. A point paired with
itself, of one class at d = 0, is among the others. With the stiffness
k(d) = -phi'(d) / d, which is alpha d^-(alpha + 2) (alpha = 0: d^-2), the derivative of the pair
energy in the position of a is k (x_a - x_b) for an active pair of one class and -k (x_a - x_b) for
one of two classes.

Our one addition to Eq. 2: a softened core. Repulsion is singular at d = 0, which duplicate images
with conflicting labels do reach. Below `min_distance` m it continues as the parabola in d that
matches it in value and slope at m, so that k(d) = k(m) there: finite force, and none at d = 0.
"""

from __future__ import annotations

import math
from ctypes import c_float
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Real
from typing import NamedTuple

import torch

_WITHOUT_FLOAT64 = ("mps",)  # kinds of devices
EPSILON = 1e-12  # a shorter point is scaled to unit length as if it were that long


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type that a device has: what sums and totals are in."""
    if device.type in _WITHOUT_FLOAT64 or (device.type == "xpu" and not _xpu_has_float64(device)):
        return torch.float32
    return torch.float64


@cache
def _xpu_has_float64(device: torch.device) -> bool:
    """Some of Intel's GPUs do."""
    return bool(torch.xpu.get_device_properties(device).has_fp64)


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in the widest type of its device."""
    return x.to(widest(x.device))


@dataclass(frozen=True)
class Potential:
    """Shape of the attraction and repulsion between two points (Eq. 1-2 of the PFML paper).

    Args:
        alpha: decay exponent, a real number >= 0. The force of attraction falls off as
            d^-(alpha + 1). 0 is the logarithmic potential. The paper's best is 3.
        delta: radius inside which a class exerts no attraction, > 0, in units of the distance.
        delta_rep: radius beyond which classes do not repel, >= delta; None means `delta`.
        min_distance: softening length m, 0 < m < delta: below it the repulsion is a parabola, so
            that a force is at most alpha m^-(alpha + 1) a pair, and none where points coincide.

    Lengths are best of the order of 1: in float32 a stiffness alpha d^-(alpha + 2) below 1e-38, at
    d = 1e8 for alpha = 3, is lost.

    Raises:
        TypeError: a value that is not a real number.
        ValueError: a value outside its range.
    """

    alpha: float = 3.0
    delta: float = 0.2
    delta_rep: float | None = None
    min_distance: float = 0.01

    def __post_init__(self) -> None:
        for name in ("alpha", "delta", "delta_rep", "min_distance"):
            value = getattr(self, name)
            if value is None and name == "delta_rep":
                value = self.delta
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a real number, got {value!r}")
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {value!r}")
            object.__setattr__(self, name, number)
        if self.alpha < 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha}")
        if self.delta <= 0:
            raise ValueError(f"delta must be > 0, got {self.delta}")
        if self.repulsion_radius < self.delta:
            raise ValueError(f"delta_rep must be >= delta = {self.delta}, got {self.delta_rep}")
        if not 0 < self.min_distance < self.delta:
            raise ValueError(
                f"min_distance must be in (0, delta) = (0, {self.delta}), got {self.min_distance}"
            )
        if self.min_distance < 1e-15 or self.repulsion_radius > 1e15:
            raise ValueError(
                "lengths must be in [1e-15, 1e15], so that float32 holds their squares, "
                f"got min_distance = {self.min_distance}, delta_rep = {self.delta_rep}"
            )

    @property
    def repulsion_radius(self) -> float:
        """delta_rep, never None once constructed."""
        assert self.delta_rep is not None
        return self.delta_rep

    @property
    def attraction_constant(self) -> float:
        """psi_att of a saturated pair of one class (d < delta)."""
        return -self._phi(self.delta)

    @property
    def repulsion_constant(self) -> float:
        """psi_rep of a saturated pair of two classes (d >= delta_rep)."""
        return self._phi(self.repulsion_radius)

    @cached_property
    def constants(self) -> tuple[float, float, float, float]:
        """Both constants, each as what float32 holds of it and the rest, as kernels take them."""
        attraction, repulsion = self.attraction_constant, self.repulsion_constant
        high, other_high = c_float(attraction).value, c_float(repulsion).value
        return high, attraction - high, other_high, repulsion - other_high

    @property
    def max_stiffness(self) -> float:
        """The largest k(d) that any pair reaches; inf where it overflows."""
        try:
            return max(self.alpha, 1.0) * self.min_distance ** -(self.alpha + 2)
        except OverflowError:
            return math.inf

    def _phi(self, d: float) -> float:
        return d**-self.alpha if self.alpha > 0 else -math.log(d)

    def phi_and_stiffness(self, d2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """phi and k = -phi'(d) / d at squared distances `d2` > 0, any shape."""
        if self.alpha == 0:
            return -0.5 * d2.log(), d2.reciprocal()
        # Products of the inverse distance: several times as fast as pow on a CPU, which besides
        # loses as many bits as alpha log d has before its point.
        inverse, integer = d2.rsqrt(), round(self.alpha)
        residue = self.alpha - integer
        phi = inverse.pow(residue) if residue else torch.ones_like(inverse)
        for _ in range(integer):
            phi = phi * inverse
        return phi, self.alpha * phi * inverse * inverse

    def pair_terms(
        self, d2: torch.Tensor, same: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energy and signed stiffness of the active pairs.

        Args:
            d2: squared distances >= 0, floating point, any shape.
            same: bool, the shape of `d2`: do the two points share their class?

        Returns:
            psi, w and whether the pair is active, of the shape of `d2`; psi and w are 0 where it is
            not. The derivative of a pair's energy in x_a is w (x_a - x_b).
        """
        att2, rep2, core2 = self.delta**2, self.repulsion_radius**2, self.min_distance**2
        active = torch.where(same, d2 >= att2, d2 < rep2)
        clipped = d2.clamp_min(core2)
        phi, k = self.phi_and_stiffness(clipped)
        psi = torch.where(same, -phi, phi + 0.5 * k * (clipped - d2))
        return psi * active, torch.where(same, k, -k) * active, active


class FieldTerms(NamedTuple):
    """What a field does to N points: the sums over the pairs that exert force, and their number."""

    energy: torch.Tensor  # [N] floating point, sum of psi over the active pairs of each point
    attracting: torch.Tensor  # [N] integers, active pairs of one class
    repelling: torch.Tensor  # [N] integers, active pairs of two classes
    own_class: torch.Tensor  # [N] integers, all pairs of one class, a point's with itself included
    grad: torch.Tensor | None  # [N, D] floating point, d energy_i / d x_i
    nearest: torch.Tensor  # [N] floating point, smallest d^2 of the repelling pairs; inf if none
    active: torch.Tensor  # [any] integers: tiles of pairs that the filter lets through, in parts
    tiles: int  # of pairs


# What is in the totals of a field, a vector of float64, in which counts are exact up to 2^53: or of
# float32, up to 2^24, on a device without float64.
TOTALS = (
    "active_energy",  # what the active pairs have above their constants
    "attracting_pairs",
    "repelling_pairs",
    "smallest_distance",  # of repelling pairs; inf if none
    "active_tiles",  # of pairs, those that the filter lets through
    "energy",  # of all pairs of distinct points, the constants of those at rest included
    "nothing",  # 0; NaN if a point, or four times its squared norm in float32, which is above every
    # squared distance, is not finite: it is near to nothing and exerts no force, so that without
    # this it would vanish instead of showing. Also NaN if a label is out of range
    "tiles",
    "labels_out_of_range",  # of the batch
)


class Given(NamedTuple):
    """Labels before they are cut to 32 bits, of which the first have to be in [0, classes)."""

    labels: torch.Tensor  # [N] int64, those of the batch first
    batch: int
    classes: int

    def out_of_range(self) -> torch.Tensor:
        """How many of the batch are: int64 scalar."""
        labels = self.labels[: self.batch]
        return ((labels < 0) | (labels >= self.classes)).sum()


class Split(NamedTuple):
    """How the points of a cloud come from two tensors, and which of them want a gradient."""

    b: int  # points of the first, N - b of the second
    dtypes: tuple[torch.dtype | None, torch.dtype | None]  # None where no gradient is wanted

    def empty(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Buffers for the gradients, where those of all points are `grad` [N, D]."""
        (n, dim), (first, second) = grad.shape, self.dtypes
        return (
            None if first is None else grad.new_empty(self.b, dim, dtype=first),
            None if second is None else grad.new_empty(n - self.b, dim, dtype=second),
        )


def active_energy(terms: FieldTerms, potential: Potential) -> torch.Tensor:
    """What the active pairs of each point have above their constants, >= 0: [N], widened.

    The energy is mostly constants. This is the part of it that forces can lower.
    """
    constants = (
        widened(terms.attracting) * potential.attraction_constant
        + widened(terms.repelling) * potential.repulsion_constant
    )
    return widened(terms.energy) - constants


def rest_energy(own_class: torch.Tensor, pairs: int, potential: Potential) -> torch.Tensor:
    """The energy of as many pairs, `own_class` of them of one class, if none exerts force."""
    return (
        widened(own_class) * potential.attraction_constant
        + widened(pairs - own_class) * potential.repulsion_constant
    )


def nan_unless_finite(points: torch.Tensor) -> torch.Tensor:
    """0 for each point [N], or NaN where it or four times its squared norm is not finite."""
    dtype = torch.promote_types(points.dtype, torch.float32)
    return torch.linalg.vector_norm(points, dim=1, dtype=dtype).mul_(2).square_() * 0
