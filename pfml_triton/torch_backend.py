"""The field terms in plain torch, for any device.

The same three steps as the kernels, on points in the order of their classes, cut into tiles of 64.
*Filter*: a tile of pairs is active if the two share a class, or if the sketches of some pair are
near (sketch.py). *Nominate*: a matrix product gives the squared distances of an active tile, and a
threshold that allows for its rounding keeps the pairs that may exert force. *Evaluate*: the kept
pairs, few in a trained embedding, are computed from the differences of their points, which is exact
however near they are. Where many pairs act it is done as a dense tile in float64 instead, all but
the pairs that are too near even for that.

On a device without float64 (`potential.widest`: Apple's MPS) no tile is dense, and sums are in
float32. A sum of n numbers is off by n 2^-24 of the sum of their sizes at most, in any order, and
as a rule by the square root of that n. So let n be the most active pairs that a point has, in a
cloud of N, and m = n + N + (alpha + 2) (D + 8), where the last is the rounding of a pair itself.
The energy is off by m 2^-24 of what |psi| and twice the |constant| (and 1 for alpha = 0) add up to
over all pairs; the active energy by as much of that over the active pairs; the gradient of a point
by as much of what |w| |x - y| adds up to over its own. Counts above 2^24 are rounded to float32.

What its functions are for, `pfml_triton.backends.Backend` says.

Never N x N: a product has at most `_BLOCK_PAIRS` entries, or 64 rows. The answers of the filter are
N^2 / 4096 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from .potential import (
    EPSILON,
    FieldTerms,
    Given,
    Potential,
    Split,
    active_energy,
    nan_unless_finite,
    rest_energy,
    widened,
    widest,
)
from .sketch import accumulation, lifted

_TILE = 64  # points of a tile
_BLOCK_PAIRS = 1 << 22  # entries of one product: 16 MiB in float32
_GATHER_ENTRIES = 1 << 18  # of one gather of differences: 1 MiB, which caches hold
_CHUNK = 16  # active tiles that are nominated at once
_COLUMNS = 1024  # of one dense float64 product
_DENSE_SHARE = 1 / 64  # of a block's pairs: from here on a dense product is the faster one
_DENSE_SHARE_OF_TILE = 1 / 8  # the same for one active tile, whose product is a small one
_ACTIVE_SHARE = 0.4  # of a block's tiles: from here on all of them are nominated in one product


class Cloud:
    """Points [N, D] in the order of their class, by way of `order`; they stay where they are."""

    def __init__(
        self, points: Tensor, inverse: Tensor | None, labels: Tensor, basis: Tensor | None
    ) -> None:
        self.points = points
        self.inverse = inverse  # [N], 1 / length that the points had, if they were scaled
        self.basis = basis
        self.labels, self.order = torch.sort(labels, stable=True)
        self.tiles = -(-len(points) // _TILE)

    def __len__(self) -> int:
        return len(self.points)

    def tile_rows(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The ranks [T, 64] of the points of some tiles, and which of them exist."""
        ranks = tiles[:, None] * _TILE + torch.arange(_TILE, device=tiles.device)
        return ranks.clamp_max(len(self) - 1), ranks < len(self)

    def label_range(self) -> tuple[Tensor, Tensor]:
        """The first and the last label of every tile."""
        first = torch.arange(0, len(self), _TILE, device=self.labels.device)
        last = (first + _TILE - 1).clamp_max(len(self) - 1)
        return self.labels[first], self.labels[last]


def gather(
    x: Tensor,
    labels: Tensor,
    potential: Potential,
    *,
    rest: Tensor | None = None,
    unit: bool = False,
    basis: Tensor | None = None,
) -> Cloud:
    """See `Backend`. All points are float32, or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if rest is not None:
        dtype = torch.promote_types(dtype, rest.dtype)
        x = torch.cat([x.to(dtype), rest.to(dtype)])
    points, inverse = x.to(dtype).contiguous(), None
    if unit:
        length = torch.linalg.vector_norm(points, dim=1)
        length += length * 0  # NaN where it overflows: the point must not become the origin
        inverse = length.clamp_min_(EPSILON).reciprocal_()
        points = points * inverse[:, None]
    return Cloud(points, inverse, labels, basis)


def _in_full_precision(function: Callable[..., FieldTerms]) -> Callable[..., FieldTerms]:
    """Whatever the ambient autocast dtype is."""

    @wraps(function)
    def wrapped(acted_on: Cloud, *args: Any, **kwargs: Any) -> FieldTerms:
        with torch.autocast(acted_on.points.device.type, enabled=False):
            return function(acted_on, *args, **kwargs)

    return wrapped


@_in_full_precision
def field_terms(
    acted_on: Cloud, acting: Cloud, potential: Potential, *, needs_grad: bool
) -> FieldTerms:
    """See `Backend`. The energy is in the widest type of the device, the gradient in float32
    (float64 for float64 points)."""
    active, tiles = None, acted_on.tiles * acting.tiles
    if acted_on.basis is not None and tiles > 0:
        active = _active_tiles(acted_on, acting, potential, acted_on.basis)
    terms = _no_terms(acted_on.points, needs_grad)._replace(
        own_class=_own_class(acted_on, acting),
        active=acted_on.labels.new_full((), tiles) if active is None else active.sum(),
        tiles=tiles,
    )
    whole: range | list[int]
    if tiles == 0:
        return terms
    height = max(1, _BLOCK_PAIRS // len(acting) // _TILE)  # of a row block, in tiles
    if active is None:
        whole = range(0, acted_on.tiles, height)
    else:
        shares = [float(part.mean(dtype=torch.float32)) for part in active.split(height)]
        whole = [i * height for i, share in enumerate(shares) if share > _ACTIVE_SHARE]
        for start in whole:
            active[start : start + height] = False
        rows, columns = active.nonzero(as_tuple=True)
        for some_rows, some_columns in zip(rows.split(_CHUNK), columns.split(_CHUNK), strict=True):
            _active_pairs(terms, acted_on, acting, some_rows, some_columns, potential)
    if len(whole):
        _whole_blocks(terms, acted_on, acting, whole, height * _TILE, potential)
    return terms


def total(
    terms: FieldTerms,
    acted_on: Cloud,
    acting: Cloud,
    potential: Potential,
    *,
    among: bool,
    pairs: int = 1,
    before: Tensor | None = None,
    given: Given | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    n, m = len(acted_on), len(acting)
    selves = n if among else 0
    own_class = terms.own_class.sum() - selves
    above = active_energy(terms, potential).sum()
    energy = above + rest_energy(own_class, n * m - selves, potential)
    nothing = nan_unless_finite(acted_on.points).sum()
    if acting is not acted_on:
        nothing = nothing + nan_unless_finite(acting.points).sum()
    outside = own_class.new_zeros(()) if given is None else given.out_of_range()
    nothing = nothing.masked_fill(outside > 0, torch.nan)
    nearest = torch.nn.functional.pad(terms.nearest, (0, 1), value=torch.inf).amin().sqrt()
    found = (above, terms.attracting.sum(), terms.repelling.sum(), nearest, terms.active.sum())
    tiles = above.new_tensor(terms.tiles)
    totals = torch.stack([widened(t) for t in (*found, energy, nothing, tiles, outside)])
    if before is not None:
        nearest = torch.minimum(before[3], totals[3])
        totals = before + totals
        totals[3] = nearest
    return (totals[5] / pairs + totals[6]).to(acted_on.points.dtype), totals


def pull_back(
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
    """See `Backend`."""
    factor = (grad_output * ((2 if twice else 1) / pairs) + totals[6]).to(grad.dtype)

    def scaled(part: slice, dtype: torch.dtype | None) -> Tensor | None:
        if dtype is None:
            return None
        force = grad[part]
        if points is None or inverse is None:
            return (force * factor).to(dtype)
        # y = x / |x| varies across itself only, but for a length that was EPSILON
        y, shrunk = points[part], inverse[part]
        along = (force * y).sum(1) * (shrunk * EPSILON < 0.999)  # whatever the rounding
        force = torch.addcmul(force, along[:, None], y, value=-1)
        return (force * (factor * shrunk)[:, None]).to(dtype)

    return scaled(slice(split.b), split.dtypes[0]), scaled(slice(split.b, None), split.dtypes[1])


def _own_class(acted_on: Cloud, acting: Cloud) -> Tensor:
    """How many points of `acting` share the class of each point of `acted_on`: int64 [N]."""
    upper = torch.searchsorted(acting.labels, acted_on.labels, right=True)
    count = upper - torch.searchsorted(acting.labels, acted_on.labels)
    return torch.empty_like(count).index_copy_(0, acted_on.order, count)


def _no_terms(x: Tensor, needs_grad: bool) -> FieldTerms:
    none = x.new_zeros(2, len(x), dtype=torch.int64)
    return FieldTerms(
        x.new_zeros(len(x), dtype=widest(x.device)),
        none[0],
        none[1],
        none[0],
        torch.zeros_like(x) if needs_grad else None,
        x.new_full((len(x),), torch.inf, dtype=widest(x.device)),
        none[0],
        0,
    )


def _active_tiles(acted_on: Cloud, acting: Cloud, potential: Potential, basis: Tensor) -> Tensor:
    """Which pairs of tiles may hold a pair that exerts force: bool [tiles of x, tiles of y]."""
    rows, columns = _sketches(acted_on, potential, basis)
    mutual = acting is acted_on
    if not mutual:
        _, columns = _sketches(acting, potential, basis)
    first_x, last_x = acted_on.label_range()
    first_y, last_y = acting.label_range()
    active = (first_x[:, None] <= last_y) & (first_y <= last_x[:, None])
    height, width = 1024, 2048  # of a product that caches hold
    for i in range(0, len(rows), height):
        part = rows[i : i + height]
        # A mutual field is symmetric: the tiles below the diagonal mirror those above.
        for j in range(i // width * width if mutual else 0, len(columns), width):
            near = part @ columns[j : j + width].T
            tiles = near.view(len(part) // _TILE, _TILE, -1, _TILE).amax((1, 3))
            below = tiles < 0  # NaN is not
            here = active[i // _TILE :, j // _TILE :][: below.shape[0], : below.shape[1]]
            here |= below.logical_not_()
    return active | active.T if mutual else active


def _sketches(cloud: Cloud, potential: Potential, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the test by rank, padded to whole tiles with points that are near nothing."""
    points = cloud.points.float()
    error = accumulation(points.shape[1]) + 2.0**-24
    if not _multiplies_exactly(torch.float32):
        error += 2.0**-5
    norm = torch.linalg.vector_norm(points, dim=1)
    rows, columns = lifted(points @ basis.float(), error * norm, potential.repulsion_radius)
    factor_type = torch.bfloat16 if _multiplies_bfloat16(points.device) else torch.float32
    padding = cloud.tiles * _TILE - len(cloud)

    def arranged(factor: Tensor, lift: int) -> Tensor:
        padded = factor.new_zeros(padding, factor.shape[1])
        padded[:, -4:] = 1
        padded[:, lift] = -torch.inf
        padded[:, lift + 1] = 0
        return torch.cat([factor[cloud.order], padded]).to(factor_type)

    return arranged(rows, -4), arranged(columns, -2)


@cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are the faster ones: where the CPU has instructions for them."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _multiplies_exactly(dtype: torch.dtype) -> bool:
    """Whether torch multiplies numbers of this dtype as they are, not rounded before."""
    try:
        return dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend in the newer way: it does not say which
        return False


def _slack(depth: int, dtype: torch.dtype) -> float:
    """Bound of the error of the nominating product, in units of (|x|^2 + |y|^2) / 2.

    A sum of depth + 2 products in any order is off by at most (depth + 2) u of the sum of their
    sizes, which is |x| |y| + (|x|^2 + |y|^2) / 2 or less; the norms' rounding adds as much again.
    PyTorch may also have been allowed to round the factors, to bfloat16 at worst: 2^-8 each.
    """
    slack = 8 * (depth + 8) * torch.finfo(dtype).eps
    return slack if _multiplies_exactly(dtype) else slack + 2.0**-5


def _active_pairs(
    terms: FieldTerms,
    acted_on: Cloud,
    acting: Cloud,
    rows: Tensor,
    columns: Tensor,
    potential: Potential,
) -> None:
    """Add the terms of the active tiles (rows[t], columns[t])."""
    (rank_x, exists_x), (rank_y, exists_y) = acted_on.tile_rows(rows), acting.tile_rows(columns)
    index_x, index_y = acted_on.order[rank_x], acting.order[rank_y]
    tile_x, tile_y = acted_on.points[index_x], acting.points[index_y]  # [T, 64, D]
    same = acted_on.labels[rank_x][:, :, None] == acting.labels[rank_y][:, None, :]
    norms = tile_x.square().sum(2)[:, :, None] + tile_y.square().sum(2)[:, None, :]
    margin = norms * (0.5 * _slack(tile_x.shape[2], tile_x.dtype))
    d2 = torch.baddbmm(norms, tile_x, tile_y.mT, alpha=-2)
    nominated = torch.where(
        same,
        d2 >= potential.delta**2 - margin,
        d2 < potential.repulsion_radius**2 + margin,
    )
    nominated &= exists_x[:, :, None] & exists_y[:, None, :]
    # Points of the widest type have none to hide the cancellation in: always by differences.
    if tile_x.dtype != widest(tile_x.device):
        many = nominated.sum((1, 2)) > _DENSE_SHARE_OF_TILE * _TILE**2
        many &= exists_x.all(1) & exists_y.all(1)
        t = many.nonzero().squeeze(1)
        if len(t):
            dense = _dense(tile_x[t], tile_y[t], same[t], potential, terms.grad is not None)
            _add(terms, index_x[t].flatten(), dense)
            nominated[t] = False
    t, i, j = nominated.nonzero(as_tuple=True)
    _add_pairs(
        terms,
        acted_on.points,
        acting.points,
        index_x[t, i],
        index_y[t, j],
        same[t, i, j],
        potential,
    )


def _whole_blocks(
    terms: FieldTerms,
    acted_on: Cloud,
    acting: Cloud,
    starts: range | list[int],
    height: int,
    potential: Potential,
) -> None:
    """Add the terms of the row blocks of `height` rows that start at tiles `starts`: all of y."""
    y = acting.points[acting.order]
    depth, dtype = y.shape[1], y.dtype
    # [x, 1, -|x|^2/2] . [y, -|y|^2/2, 1] = -d^2/2, to within slack (|x|^2 + |y|^2) / 2, which the
    # halved squares give away beforehand.
    less = 0.5 * (1 - _slack(depth, dtype))
    half_y = y.square().sum(1, keepdim=True).mul_(less)
    lifted_y = torch.cat([y, -half_y, torch.ones_like(half_y)], 1)
    near = -0.5 * potential.repulsion_radius**2
    for start in starts:
        ranks = slice(start * _TILE, start * _TILE + height)
        index, labels = acted_on.order[ranks], acted_on.labels[ranks]
        x = acted_on.points[index]
        half_x = x.square().sum(1, keepdim=True).mul_(less)
        lifted_x = torch.cat([x, torch.ones_like(half_x), -half_x], 1)
        near_mask = (lifted_x @ lifted_y.T) > near
        # Attraction is long-ranged: its pairs are the runs of equal labels, whatever the distance.
        first = torch.searchsorted(acting.labels, labels)
        run = torch.searchsorted(acting.labels, labels, right=True) - first
        pairs = int(near_mask.sum()) + int(run.sum())
        if pairs > _DENSE_SHARE * near_mask.numel() and dtype != widest(y.device):
            del near_mask
            needs_grad = terms.grad is not None
            _add(terms, index, _dense_rows(x, labels, y, acting.labels, potential, needs_grad))
            continue
        i, j = near_mask.nonzero(as_tuple=True)
        other = labels[i] != acting.labels[j]
        same_i = torch.repeat_interleave(torch.arange(len(run), device=run.device), run)
        offset = torch.arange(len(same_i), device=run.device)
        offset -= torch.repeat_interleave(run.cumsum(0) - run, run)
        same_j = first[same_i] + offset
        i = torch.cat([i[other], same_i])
        j = torch.cat([j[other], same_j])
        same = torch.arange(len(i), device=i.device) >= len(i) - len(same_i)
        _add_pairs(terms, acted_on.points, y, index[i], j, same, potential)


def _add(terms: FieldTerms, index: Tensor, part: FieldTerms) -> None:
    """Add the terms of some points, listed by `index`, to those of all."""
    terms.energy.index_add_(0, index, part.energy)
    terms.attracting.index_add_(0, index, part.attracting)
    terms.repelling.index_add_(0, index, part.repelling)
    terms.nearest.scatter_reduce_(0, index, part.nearest, "amin")
    if terms.grad is not None and part.grad is not None:
        terms.grad.index_add_(0, index, part.grad.to(terms.grad.dtype))


def _accumulate(terms: FieldTerms, part: FieldTerms) -> None:
    """Add further terms of the same points."""
    terms.energy.add_(part.energy)
    terms.attracting.add_(part.attracting)
    terms.repelling.add_(part.repelling)
    if terms.grad is not None and part.grad is not None:
        terms.grad.add_(part.grad)
    torch.minimum(terms.nearest, part.nearest, out=terms.nearest)


def _add_pairs(
    terms: FieldTerms,
    x: Tensor,
    y: Tensor,
    i: Tensor,
    j: Tensor,
    same: Tensor,
    potential: Potential,
) -> None:
    """Add the terms of points `x` [N, D] from the listed pairs (i, j), by differences."""
    step = max(1, _GATHER_ENTRIES // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        rows = i[part]
        difference = x[rows].sub_(y[j[part]])
        d2 = torch.linalg.vecdot(difference, difference)
        psi, w, active = potential.pair_terms(d2, same[part])
        repels = active & ~same[part]
        terms.energy.index_add_(0, rows, widened(psi))
        terms.attracting.index_add_(0, rows, (active & same[part]).long())
        terms.repelling.index_add_(0, rows, repels.long())
        nearest = torch.where(repels, widened(d2), torch.inf)
        terms.nearest.scatter_reduce_(0, rows, nearest, "amin")
        if terms.grad is not None:
            terms.grad.index_add_(0, rows, difference.mul_(w[:, None]))


def _dense_rows(
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    potential: Potential,
    needs_grad: bool,
) -> FieldTerms:
    """The terms of rows `x` [R, D] in the field of all of `y`, in dense tiles."""
    terms = _no_terms(x.double(), needs_grad)
    for start in range(0, len(y), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        same = x_labels[:, None] == y_labels[columns]
        part = _dense(x[None], y[None, columns], same[None], potential, needs_grad)
        _accumulate(terms, part)
    return terms


def _dense(
    x: Tensor, y: Tensor, same: Tensor, potential: Potential, needs_grad: bool
) -> FieldTerms:
    """The terms of points `x` [T, R, D] in the field of `y` [T, C, D], as [T R], in float64."""
    depth, dtype = x.shape[2], x.dtype
    origin = y.mean(1, keepdim=True, dtype=torch.float64)  # amid the points
    wide_x, wide_y = x.double() - origin, y.double() - origin
    norms = wide_x.square().sum(2)[:, :, None] + wide_y.square().sum(2)[:, None, :]
    d2 = torch.baddbmm(norms, wide_x, wide_y.mT, alpha=-2).clamp_min_(0)
    psi, w, active = potential.pair_terms(d2.to(dtype), same)
    # Too near for float64: d^2 cancels, or w in the softened core outgrows the differences.
    # Far out, where its rounding moves points across a radius, even active is not known.
    rounding = 4 * (depth + 8) * torch.finfo(torch.float64).eps * norms
    unsure = rounding > torch.finfo(torch.float32).eps * potential.delta**2
    close = active.logical_or(unsure)
    close &= d2 < norms.mul_(1e-8).clamp_min_(4 * potential.min_distance**2)
    t, i, j = close.nonzero(as_tuple=True)
    near = None
    if len(t):
        psi[t, i, j] = 0
        w[t, i, j] = 0
        active[t, i, j] = False
        near = _no_terms(x.flatten(0, 1), needs_grad)
        _add_pairs(
            near,
            x.flatten(0, 1),
            y.flatten(0, 1),
            t * x.shape[1] + i,
            t * y.shape[1] + j,
            same[t, i, j],
            potential,
        )
    repels = active & ~same
    grad = None
    if needs_grad:  # w (x - y): the difference needs float64, the weight does not
        w = w.double()
        grad = torch.baddbmm(w.sum(2, keepdim=True) * wide_x, w, wide_y, alpha=-1)
    terms = FieldTerms(
        psi.sum(2, dtype=torch.float64).flatten(),
        (active & same).sum(2).flatten(),
        repels.sum(2).flatten(),
        repels.new_zeros(0),  # counted elsewhere, like the tiles
        None if grad is None else grad.view(-1, depth),
        torch.where(repels, d2, torch.inf).amin(2).flatten(),
        repels.new_zeros(0),
        0,
    )
    if near is not None:
        _accumulate(terms, near)
    return terms
