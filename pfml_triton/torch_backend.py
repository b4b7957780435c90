"""The field terms in plain torch: for the CPU, and for any device that has float64.

The same two steps as the kernels. *Nominate*: a matrix product gives -d^2/2 of every pair of a
row block, and a threshold that allows for its rounding keeps the pairs that may exert force.
*Evaluate*: the kept pairs, few in a trained embedding, are computed from the differences of their
points, which is exact however near they are. A block in which many pairs act is done as a dense
tile in float64 instead, all but the pairs that are too near even for that.

Never N x N: a row block times all columns is at most `_BLOCK_PAIRS` entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .potential import FieldTerms, Potential

_BLOCK_PAIRS = 1 << 22  # entries of one nominating product: 16 MiB in float32
_GATHER_ENTRIES = 1 << 21  # entries of one gather of pair differences
_TILE = 1024  # columns of one dense float64 tile
_DENSE_SHARE = 1 / 64  # of a block's pairs: from here on the dense tile is the faster one


def field_terms(
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    potential: Potential,
    *,
    needs_grad: bool,
) -> FieldTerms:
    """What the field of `y` does to the points `x`: see `FieldTerms`.

    Args:
        x, y: points [N, D] and [M, D], one floating-point dtype and device.
        x_labels, y_labels: classes [N] and [M], int64.
        needs_grad: whether the gradient is wanted.

    The energy is float64, the gradient float32 (float64 for float64 points).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y_labels, order = torch.sort(y_labels, stable=True)
    y = y.to(dtype)[order]
    x = x.to(dtype)
    n, depth = x.shape
    terms = _no_terms(x, needs_grad)
    if n == 0 or len(y) == 0:
        return terms

    # [x, 1, -|x|^2/2] . [y, -|y|^2/2, 1] = -d^2/2, to within slack (|x|^2 + |y|^2) / 2, which the
    # halved squares give away beforehand.
    less = 0.5 * (1 - _slack(depth, dtype))
    half_x, half_y = x.square().sum(1).mul_(less), y.square().sum(1).mul_(less)
    ones_x, ones_y = torch.ones_like(half_x), torch.ones_like(half_y)
    lifted_y = torch.cat([y, -half_y[:, None], ones_y[:, None]], 1)
    near = -0.5 * potential.repulsion_radius**2

    first = torch.searchsorted(y_labels, x_labels)
    last = torch.searchsorted(y_labels, x_labels, right=True)

    origin = y.mean(0, dtype=torch.float64)
    step = max(1, _BLOCK_PAIRS // len(y))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        block_x = x[rows]
        lifted_x = torch.cat([block_x, ones_x[rows, None], -half_x[rows, None]], 1)
        near_mask = (lifted_x @ lifted_y.T) > near
        # Attraction is long-ranged: its pairs are the runs of equal labels, whatever the distance.
        run = last[rows] - first[rows]
        pairs = int(near_mask.sum()) + int(run.sum())
        # Float64 points have no wider type to hide the cancellation in: always by differences.
        if pairs > _DENSE_SHARE * near_mask.numel() and dtype != torch.float64:
            del near_mask
            block = _dense_block(
                block_x, x_labels[rows], y, y_labels, potential, origin, needs_grad
            )
        else:
            i, j = near_mask.nonzero(as_tuple=True)
            other = x_labels[rows][i] != y_labels[j]
            same_i = torch.repeat_interleave(torch.arange(len(run), device=run.device), run)
            offset = torch.arange(len(same_i), device=run.device)
            offset -= torch.repeat_interleave(run.cumsum(0) - run, run)
            same_j = first[rows][same_i] + offset
            i = torch.cat([i[other], same_i])
            j = torch.cat([j[other], same_j])
            same = torch.arange(len(i), device=i.device) >= len(i) - len(same_i)
            block = _gathered_pairs(block_x, y, i, j, same, potential, needs_grad)
        for whole, part in zip(terms, block, strict=True):
            if whole is not None and part is not None:
                whole[rows] = part
    return terms


def _slack(depth: int, dtype: torch.dtype) -> float:
    """Bound of the error of the nominating product, in units of (|x|^2 + |y|^2) / 2.

    A sum of depth + 2 products in any order is off by at most (depth + 2) u of the sum of their
    sizes, which is |x| |y| + (|x|^2 + |y|^2) / 2 or less; the norms' rounding adds as much again.
    PyTorch may also have been allowed to round the factors, to bfloat16 at worst: 2^-8 each.
    """
    slack = 8 * (depth + 8) * torch.finfo(dtype).eps
    try:
        exact = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend in the newer way: it does not say which
        exact = False
    return slack if exact else slack + 2.0**-5


def _no_terms(x: Tensor, needs_grad: bool) -> FieldTerms:
    none = x.new_zeros(2, len(x), dtype=torch.int64)
    return FieldTerms(
        x.new_zeros(len(x), dtype=torch.float64),
        none[0],
        none[1],
        torch.zeros_like(x) if needs_grad else None,
    )


def _gathered_pairs(
    x: Tensor,
    y: Tensor,
    i: Tensor,
    j: Tensor,
    same: Tensor,
    potential: Potential,
    needs_grad: bool,
) -> FieldTerms:
    """The terms of rows `x` [R, D] from the listed pairs (i, j), by differences."""
    terms = _no_terms(x, needs_grad)
    step = max(1, _GATHER_ENTRIES // max(x.shape[1], 1))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        rows = i[part]
        difference = x[rows] - y[j[part]]
        psi, w, active = potential.pair_terms(difference.square().sum(1), same[part])
        terms.energy.index_add_(0, rows, psi.double())
        terms.attracting.index_add_(0, rows, (active & same[part]).long())
        terms.repelling.index_add_(0, rows, (active & ~same[part]).long())
        if terms.grad is not None:
            terms.grad.index_add_(0, rows, difference.mul_(w[:, None]))
    return terms


def _dense_block(
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    potential: Potential,
    origin: Tensor,
    needs_grad: bool,
) -> FieldTerms:
    """The terms of rows `x` [R, D] in the field of all of `y`, in float64 tiles.

    `origin` [D] is amid the points.
    """
    points, dtype = x, x.dtype
    x = x.double() - origin
    norm_x = x.square().sum(1)
    terms = _no_terms(x, needs_grad)  # float64 like x
    for start in range(0, len(y), _TILE):
        tile = y[start : start + _TILE].double() - origin
        norm_y = tile.square().sum(1)
        d2 = torch.addmm(norm_y, x, tile.T, alpha=-2).add_(norm_x[:, None])
        same = x_labels[:, None] == y_labels[None, start : start + _TILE]
        norms = norm_x[:, None] + norm_y
        psi, w, active = potential.pair_terms(d2.clamp_min_(0).to(dtype), same)
        # Too near for float64: d^2 cancels, or w in the softened core outgrows the differences.
        close = active & (d2 < (1e-8 * norms).clamp_min_(4 * potential.min_distance**2))
        i, j = close.nonzero(as_tuple=True)
        if len(i):
            psi[i, j] = 0
            w[i, j] = 0
            active[i, j] = False
            near = _gathered_pairs(
                points, y[start : start + _TILE], i, j, same[i, j], potential, needs_grad
            )
            for whole, part in zip(terms, near, strict=True):
                if whole is not None and part is not None:
                    whole.add_(part)
        terms.energy.add_(psi.sum(1, dtype=torch.float64))
        terms.attracting.add_((active & same).sum(1))
        terms.repelling.add_((active & ~same).sum(1))
        if terms.grad is not None:  # w (x - y): the difference needs float64, the weight does not
            w = w.double()
            terms.grad.addcmul_(w.sum(1, keepdim=True), x).addmm_(w, tile, alpha=-1)
    return terms
