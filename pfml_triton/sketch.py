"""The sketch: 64 columns of bfloat16 that tell which points are surely not near each other.

Let Q [D, K - 4] have a spectral norm of at most 1. Then the sketch s = x Q shrinks distances,
|s_x - s_y| <= |x - y|, so that points whose sketches lie apart are apart, whatever Q is. Q decides
how much is pruned, never what the result is.

What the machine holds is a rounded s~ with |s~ - s| <= r, the *radius* of a point. If a pair of
points may repel, |x - y| < R, then |s~_x - s~_y| < R + r_x + r_y, and as (r_x + r_y)^2 <=
2 (r_x^2 + r_y^2),

    |s~_x - s~_y|^2 < R^2 + 2 R (r_x + r_y) + 2 (r_x^2 + r_y^2).

Halved and sorted by point, with g = R r + r^2 + R^2 / 4 and the *lift* l = g - |s~|^2 / 2,

    s~_x . s~_y + l_x + l_y > 0.

That is one inner product of [s~_x, l_x, 1] with [s~_y, 1, l_y]: no norms to add, no threshold to
compare with but 0, and a maximum over a tile of pairs says whether any of them may repel.

*Radius.* It is the sum of the errors that s~ has seen:

- of the points, if a rounded copy x~ of them is multiplied: |(x - x~) Q| <= |x - x~|;
- of the accumulation over the depth. Tensor cores align the terms of an addition to the largest and
  truncate: an addition is off by 2^-23 of the largest partial sum at most, which |x| |q| bounds
  (float32 in any order is off by less). A column of s is off by (D + 16) 2^-23 |x| |q_j| or less,
  and s by (D + 16) 2^-23 |x| times the Frobenius norm of Q, which is below 8: `accumulation`;
- of the rounding to bfloat16, computed for each point.

*Product.* It is made of bfloat16 numbers, whose products are exact in float32 (and in TF32, which
keeps more bits). Its sum has K <= 64 terms, and no term or partial sum exceeds t_x + t_y with t =
|s~|^2 + g, since |s~_x . s~_y| <= (|s~_x|^2 + |s~_y|^2) / 2. The accumulation is thus off by
(2 K + 16) 2^-23 < 2^-15.8 of t_x + t_y at most. The lift takes two columns, a bfloat16 and the
bfloat16 of what is left: off by 2^-15 of it if both are truncated (2^-17 to nearest). The float32
arithmetic that makes the lift, a sum of 60 squares and a few steps, loses less than 2^-18 of t.
Together that is less than 2^-14 (`SLACK`) of t_x + t_y, which each point adds to its lift. Rounding
the product itself, to bfloat16 say, moves no sign; where it underflows to 0 it counts as positive.

*Distance.* The pairs that exert force are those whose distance, *as computed*, is below delta_rep.
The computed square of a distance is off by (D + 2) 2^-24 of itself, so R = 1.001 delta_rep
(`REACH`) covers every depth up to 16,000, the largest that is taken.

*Spectral norm.* Q is 0.96 times orthonormal columns, rounded to bfloat16. The rounding is 2^-8 of
an entry at most, its Frobenius norm 2^-8 * 0.96 * 60^(1/2) < 0.03, so |Q| < 0.99. Points of D <= 60
are their own sketch: Q is the identity. A basis that comes from elsewhere is checked: |Q|^2 is no
more than the largest column sum of |Q^T Q|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .potential import widest

LIFT = 4  # columns of the lift: two of this point, two of ones for the other's
MAX_DEPTH = 64  # of a sketch, with those
SLACK = 2.0**-14
REACH = 1.001
_SHRINK = 0.96
_random_bases: dict[tuple[int, torch.device], Tensor] = {}


_MODES = torch._C._TorchDispatchModeKey
_TRACERS = _MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL


def is_traced() -> bool:
    """Is a graph made of the operators that are called, or are tensors fake?

    Other modes, as those that count operations, may see what an operator is made of.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:  # a quick answer
        return False
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS)


def sketch_depth(dim: int) -> int:
    """K, the columns of the sketch of points of `dim` dimensions: 16, 32 or 64."""
    return min(MAX_DEPTH, max(16, 1 << (dim + LIFT - 1).bit_length()))


def accumulation(dim: int) -> float:
    """Bound of the error of a sketch from the summation over the depth, as a share of |x|."""
    return 8 * (dim + 16) * 2.0**-23


def random_basis(dim: int, device: torch.device) -> Tensor:
    """Q [dim, at most 60] bfloat16 for a cloud one knows nothing of: the same every time."""
    if (dim, device) in _random_bases and not is_traced():
        return _random_bases[dim, device]
    width = sketch_depth(dim) - LIFT
    cpu = torch.device("cpu")  # whatever the ambient default device is
    if dim <= width:
        columns = torch.eye(dim, device=cpu)
    else:
        generator = torch.Generator(cpu).manual_seed(0)
        columns = torch.randn(dim, width, generator=generator, dtype=torch.float64, device=cpu)
        columns = _SHRINK * torch.linalg.qr(columns).Q
    basis = columns.to(torch.bfloat16, memory_format=torch.contiguous_format).to(device)
    if not is_traced():  # or it may be a fake one
        _random_bases[dim, device] = basis
    return basis


def sound_basis(basis: Tensor) -> Tensor:
    """A basis [dim, at most 60] of any floating dtype in bfloat16, or a random one of that shape
    where its spectral norm cannot be shown to be at most 1: it is not finite, or memory that nobody
    has filled. Decided on the device."""
    rounded = basis.to(torch.bfloat16).contiguous()
    return torch.where(_is_sound(rounded), rounded, random_basis(len(basis), basis.device))


def _is_sound(basis: Tensor) -> Tensor:
    """Whether the largest column sum of |Q^T Q|, no less than |Q|^2, is at most 1: bool scalar."""
    wide = _float64(basis)  # in which products and the identity's sums are exact
    return ((wide.T @ wide).abs().sum(0).amax() <= 1).to(basis.device)


def turned_basis(basis: Tensor, points: Tensor) -> Tensor:
    """A sound `basis` turned towards the leading directions of the covariance of `points` [N, dim].

    One step of subspace iteration: from call to call the columns approach the leading directions,
    and follow them as the points move. A tenth of the mean variance is added in all directions,
    so that what earlier points have shown is not lost for the sake of a few new ones. A result that
    is not finite, or whose spectral norm cannot be shown to be at most 1, is dropped in favour of
    the old one, on the device.

    Args:
        basis: [dim, at most 60] bfloat16, of `random_basis`, `sound_basis` or this function.
        points: [N, dim] floating point.
    """
    dim, width = basis.shape
    if dim == width or len(points) < 2:
        return basis
    old = basis.float()
    centred = points.detach().float()
    centred = centred - centred.mean(0)
    image = centred.T @ (centred @ old) + 0.1 / dim * centred.square().sum() * old
    turned = _orthonormal(image)
    return torch.where(_is_sound(turned), turned, basis)


def _float64(x: Tensor) -> Tensor:
    """`x` in float64: on the CPU, which waits for its device, if that has none."""
    return (x if widest(x.device) == torch.float64 else x.cpu()).double()


def _orthonormal(columns: Tensor) -> Tensor:
    """0.96 Q in bfloat16, of `columns` [dim, width] = Q R: a Cholesky QR in float64.

    On a GPU neither of its two steps waits, by PyTorch's documentation. It loses the square of the
    condition number of the columns, of the 53 bits of float64. That of an image in `turned_basis`
    is at most about 10 dim, for the part of the old basis in it.
    """
    wide = _float64(columns)
    lower, _ = torch.linalg.cholesky_ex(wide.T @ wide)
    directions = torch.linalg.solve_triangular(lower.T, wide, upper=True, left=False)
    return (_SHRINK * directions).to(torch.bfloat16).to(columns.device).contiguous()


def lifted(sketch: Tensor, error: Tensor, delta_rep: float) -> tuple[Tensor, Tensor]:
    """The two factors of the test, bfloat16 [N, K]: of points as rows, and as columns.

    Args:
        sketch: s [N, K - 4] float32.
        error: [N] bound of |s - x Q|.
        delta_rep: radius of the repulsion.
    """
    reach = REACH * delta_rep
    rounded = sketch.to(torch.bfloat16)
    wide = rounded.float()
    radius = torch.linalg.vector_norm(sketch - wide, dim=1).mul_(1.001).add_(error)
    square = wide.square().sum(1)
    given = (reach + radius) * radius + 0.25 * reach * reach
    lift = given - 0.5 * square + SLACK * (given + square)
    lift = torch.where(square.isfinite(), lift, torch.inf)
    high = lift.to(torch.bfloat16)
    low = torch.where(high.isinf(), 0.0, lift - high.float()).to(torch.bfloat16)
    ones = torch.ones_like(high)
    return (
        torch.cat([rounded, torch.stack([high, low, ones, ones], 1)], 1),
        torch.cat([rounded, torch.stack([ones, ones, high, low], 1)], 1),
    )
