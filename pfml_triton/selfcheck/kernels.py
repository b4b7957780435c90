"""Each kernel against plain PyTorch, on the arguments of a real call.

The launches of a loss are seen one by one (kernels/recording.py). Each is made, and what it wrote
is compared at once with what float64 makes of what it read: so a wrong kernel is named, and the
ones after it are not blamed for what it handed on. Imported only where Triton is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from ..kernels.config import TILE_M, TILE_N
from ..kernels.recording import Launch, record
from ..kernels.tuning import tiles_here
from ..potential import EPSILON, TOTALS, Given, Potential, Split
from ..serving import needed
from ..sketch import LIFT, random_basis
from . import truth
from .result import Comparison, Log
from .truth import BRAIN, FLOAT32, FLOOR

Args = dict[str, Any]  # of a launch, by parameter name


@dataclass(frozen=True)
class Case:
    """A call whose kernels are checked."""

    dtype: torch.dtype
    depth: int
    n: int
    of_loss: bool = False  # gathered from embeddings and float32 proxies, and scaled to unit length
    bank: bool = False  # with the field of other points besides
    alpha: float = truth.POTENTIAL.alpha
    shares_lists: bool = False  # over extra programs, however short: what takes 4,096 points else

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, D = {self.depth}, N = {self.n}"


def on_gpu() -> list[Case]:
    """Every dtype and kind of depth, and points enough for long lists."""
    single, brain, half = torch.float32, torch.bfloat16, torch.float16
    return [
        Case(single, 64, 600),
        Case(single, 100, 600, of_loss=True),
        Case(single, 100, 400, bank=True, alpha=1.5),
        Case(single, 512, 600),
        Case(single, 512, 4500, of_loss=True),
        Case(single, 768, 600, alpha=0.0),
        Case(brain, 64, 600, of_loss=True),
        Case(brain, 100, 600),
        Case(brain, 512, 4500),
        Case(brain, 768, 600),
        Case(half, 64, 600, of_loss=True),
        Case(half, 100, 600),
        Case(half, 512, 600),
        Case(half, 768, 600),
    ]


def in_interpreter() -> list[Case]:
    """What a minute is enough for. float64 is taken there, and nowhere else."""
    return [
        Case(torch.float32, 64, 80, shares_lists=True),
        Case(torch.float32, 20, 80, of_loss=True, bank=True, alpha=1.5),
        Case(torch.bfloat16, 100, 80, shares_lists=True),
        Case(torch.bfloat16, 32, 50, of_loss=True),
        Case(torch.float16, 100, 80, alpha=0.0),
        Case(torch.float16, 32, 50, of_loss=True, shares_lists=True),
        Case(torch.float64, 32, 50, shares_lists=True),
        Case(torch.float64, 20, 50, of_loss=True),
    ]


def check(log: Log, case: Case, begun: Callable[[str], None] = lambda name: None) -> None:
    """Make the launches of a call, and check each.

    Args:
        begun: is called with the name of each kernel before its launch, which may compile it.
    """
    reached: list[str] = []

    def made(one: Launch) -> None:
        name = one.kernel.__name__
        reached.append(name)
        was_made = False

        def body(comparison: Comparison) -> None:
            nonlocal was_made
            before = {k: v.clone() for k, v in one.args.items() if name in _IN_PLACE and _read(v)}
            one.run()
            was_made = True
            KERNELS[name].check(comparison, before, one.args)

        kernel = KERNELS[name]
        begun(kernel.name)
        error = log.run(
            f"kernel: {kernel.name}", kernel.what, "plain PyTorch in float64", body,
            dtype=case.dtype, depth=case.depth, points=case.n,
        )  # fmt: skip
        if error is not None and not was_made:
            raise error  # what follows would read what nobody has written

    try:
        with record(made):
            _call(case, log.device)
    except Exception as error:
        if not reached:
            raise
        last = KERNELS[reached[-1]].name
        log.skip(
            f"what follows the kernel {last} ({case})",
            f"{last} did not run: {needed(error) or error}",
        )


def _call(case: Case, device: torch.device) -> None:
    """The steps of a loss forward and backward."""
    points, labels = truth.cloud(case.n, case.depth, case.dtype, device)
    potential = replace(truth.POTENTIAL, alpha=case.alpha)
    n, b = len(points), len(points) // 3
    tiles = tiles_here(points)
    if case.shares_lists:
        tiles = replace(tiles, long_list=0, least_budget=1, extra_programs=3)
    basis = random_basis(case.depth, device)
    first, rest = points, None
    if case.of_loss:
        first = points[:b]
        rest = points[b:].to(torch.promote_types(case.dtype, torch.float32))
    else:
        b = n
    # Where no lists are long, or made so, the launcher chooses its tile shapes itself.
    chosen = tiles if case.shares_lists else None
    gathered = partial(
        launch.gather, potential=potential, unit=case.of_loss, basis=basis, tiles=chosen
    )
    acted_on = gathered(first, labels, rest=rest)
    terms = launch.field_terms(acted_on, acted_on, potential, needs_grad=True)
    given = Given(labels, b, int(labels.max()) + 1) if case.of_loss else None
    value, totals = launch.total(
        terms, acted_on, acted_on, potential, among=True, pairs=n * (n - 1), given=given
    )
    pairs = n * (n - 1)
    if case.bank:
        others, their_labels = truth.cloud(case.n // 2, case.depth, case.dtype, device)
        acting = gathered(others.to(acted_on.points.dtype), their_labels)
        terms = launch.field_terms(acted_on, acting, potential, needs_grad=True)
        pairs += n * len(others)
        wrong = Given(labels, b, 1)  # those of all classes but one
        launch.total(terms, acted_on, acting, potential, among=False, given=wrong)
        value, totals = launch.total(
            terms, acted_on, acting, potential, among=False, pairs=pairs, before=totals
        )
    assert terms.grad is not None
    dtypes = (case.dtype, None if rest is None else rest.dtype)
    is_unit = acted_on.inverse is not None
    launch.pull_back(
        terms.grad, acted_on.points if is_unit else None, acted_on.inverse,
        grad_output=torch.full_like(value, 3.0), totals=totals, split=Split(b, dtypes),
        pairs=pairs, twice=not case.bank,
    )  # fmt: skip


def _read(value: Any) -> bool:
    return isinstance(value, Tensor)


def _pack(c: Comparison, _: Args, a: Args) -> None:
    n, dim, k = a["N"], a["D"], a["K"]
    order, coarse, radius = a["order_ptr"], a["coarse_ptr"], a["radius_ptr"]
    held = a["x_ptr"]
    if a["PLACED"]:
        points = torch.cat([a["x_ptr"].double(), a["rest_ptr"].double()])[:n]
        if a["UNIT"]:
            inverse = 1 / torch.linalg.vector_norm(points, dim=1).clamp_min(EPSILON)
            points = points * inverse[:, None]
            c.near("1 / length", a["inverse_ptr"], inverse, FLOAT32)
        held = a["points_ptr"]
        c.near("points", held, points, FLOAT32)
    wide = held[order].double()
    rounded = coarse[:n, :dim].double()
    lost = (wide - rounded).abs()
    c.holds("points are rounded to bfloat16", (lost <= BRAIN * wide.abs() + 1e-38).all())
    c.same("rounded points", rounded, rounded.bfloat16())
    c.holds("padding is zero", (coarse[n:] == 0).all() & (coarse[:n, dim:] == 0).all())
    c.near("their squared norms", a["sq_norm_ptr"][:n], rounded.square().sum(1), FLOAT32)
    c.holds("padded rows are NaN", a["sq_norm_ptr"][n:].isnan().all())
    lost = torch.linalg.vector_norm(lost, dim=1)
    c.holds("a radius is no smaller than what the rounding moved", (radius[:n] >= lost).all())
    c.holds("nor much larger", (radius[:n] <= 1.01 * lost + 1e-18).all())
    labels, tiles = a["label_ptr"], -(-n // TILE_N)
    ends = torch.arange(TILE_N - 1, tiles * TILE_N, TILE_N, device=labels.device).clamp_max(n - 1)
    c.same("first labels", a["first_label_ptr"][:tiles], labels[::TILE_N])
    c.same("last labels", a["last_label_ptr"][:tiles], labels[ends])
    left, right, basis = a["left_ptr"].double(), a["right_ptr"].double(), a["basis_ptr"].double()
    sketch = torch.nn.functional.pad(rounded @ basis, (0, k - LIFT - a["WIDTH"]))
    ours = left[:n, : k - LIFT]
    c.near("sketch", ours, sketch, FLOOR[torch.bfloat16])
    c.same("its other factor", right[:n, : k - LIFT], ours)
    r = radius[:n].double() + 1.001 * torch.linalg.vector_norm(sketch - ours, dim=1)
    r = r + a["accumulation"] * rounded.square().sum(1).sqrt()
    square = ours.square().sum(1)
    given = (a["reach"] + r) * r + 0.25 * a["reach"] ** 2
    lift = given - 0.5 * square + a["slack"] * (given + square)
    c.near("lift", left[:n, k - 4] + left[:n, k - 3], lift, 2.0**-12)
    c.same("the other factor's", right[:n, k - 2 :], left[:n, k - 4 : k - 2])
    ones = left[:n, k - 2 :], right[:n, k - 4 : k - 2]
    c.holds("ones face the lift", torch.stack(ones).eq(1).all())
    c.holds("padded rows are near to nothing", left[n:, k - 4].eq(-torch.inf).all())


def _filter(c: Comparison, _: Args, a: Args) -> None:
    product = a["left_ptr"].double() @ a["right_ptr"].double().T
    height, width = (size // TILE_M for size in product.shape)
    largest = product.view(height, TILE_M, width, TILE_M).amax((1, 3))
    bits = a["near_ptr"][:, :, None] >> torch.arange(8, device=product.device) & 1
    bits = bits.flatten(1).bool()
    # Float32 may round what is 0 nearly to the other side.
    certain = largest.abs() > 1e-4
    c.same("tiles that may repel", bits[certain], (largest > 0)[certain])


def _active(a: Args, labels: str) -> Tensor:
    """Which tiles of 64 columns each row tile has to visit: bool [tiles of x, tiles of y]."""
    n, tiles_y, near = a["N"], a["tiles_y"], a["near_ptr"]
    tiles_x, x_label = -(-n // TILE_M), a[labels]
    starts = torch.arange(0, n, TILE_M, device=near.device)
    first, last = x_label[starts], x_label[(starts + TILE_M - 1).clamp_max(n - 1)]
    halves = torch.stack([near & 15, near >> 4], 2).flatten(1)[:tiles_x, :tiles_y] != 0
    y_first, y_last = a["y_first_label_ptr"][:tiles_y], a["y_last_label_ptr"][:tiles_y]
    return halves | (first[:, None] <= y_last) & (y_first <= last[:, None])


def _count(c: Comparison, _: Args, a: Args) -> None:
    c.same("lengths of lists", a["count_ptr"], _active(a, "x_label_ptr").sum(1))


def _plan(c: Comparison, _: Args, a: Args) -> None:
    count = a["count_ptr"].long()
    budget = max(-(-int(count.sum()) // a["extra"]), a["least"])
    c.same("budget", a["budget_ptr"], torch.full_like(a["budget_ptr"], budget))
    extra = ((count - 1).clamp_min(0) // budget).cumsum(0)
    c.same("extra programs", a["extra_ptr"], extra)
    c.holds("there are enough of them", extra[-1] <= a["extra"])


_SUMS = ("energy", "attracting", "repelling", "own_class", "nearest", "grad")


def _joined(a: Args, parts: Args, order: Tensor) -> list[Tensor]:
    """What points [N] have of `_SUMS` in all, with what the extra programs found for them."""
    n, extra_of = a["N"], a["extra_ptr"].long()
    extra = torch.arange(int(extra_of[-1]), device=order.device)
    tile = torch.searchsorted(extra_of, extra, right=True)
    i = torch.arange(TILE_M, device=order.device)
    rank = (tile[:, None] * TILE_M + i).flatten()
    part = (n + extra[:, None] * TILE_M + i).flatten()[rank < n]
    row = order[rank[rank < n]]
    found = []
    for name in _SUMS:
        own, others = parts[f"{name}_ptr"][:n], parts[f"{name}_ptr"][part]
        if name == "nearest":
            found.append(own.scatter_reduce(0, row, others, "amin"))
        else:
            exact = own.double() if own.is_floating_point() else own.long()
            found.append(exact.index_add(0, row, others.to(exact.dtype)))
    return found


def _forces(c: Comparison, _: Args, a: Args) -> None:
    n, m = a["N"], a["M"]
    potential = Potential(a["alpha"], a["att_radius"], a["rep_radius"], a["min_distance"])

    def in_callers_order(labels: Tensor, order: Tensor) -> Tensor:
        return torch.empty_like(labels).index_copy(0, order, labels)

    true = truth.field(
        a["x_ptr"].double(), in_callers_order(a["x_label_ptr"], a["x_order_ptr"]),
        a["y_ptr"].double(), in_callers_order(a["y_label_ptr"], a["y_order_ptr"]), potential,
    )  # fmt: skip
    assert len(true.energy) == n
    assert a["y_ptr"].shape[0] == m
    if a["SHARED_OUT"]:
        ours = _joined(a, a, a["x_order_ptr"])
    else:
        ours = [a[f"{name}_ptr"][:n] for name in _SUMS]
    energy, attracting, repelling, own_class, nearest, grad = ours
    c.same("pairs that attract", attracting, true.attracting)
    c.same("pairs that repel", repelling, true.repelling)
    c.same("pairs of one class", own_class, true.own_class)
    c.near("energies", energy, true.energy, FLOAT32)
    c.near("gradient", grad, true.grad, FLOAT32)
    c.near("nearest repelling points", nearest, true.nearest, FLOAT32)
    c.same("tiles visited", a["active_ptr"], _active(a, "x_label_ptr").sum(1))


def _join(c: Comparison, before: Args, a: Args) -> None:
    for name, true in zip(_SUMS, _joined(a, before, a["order_ptr"]), strict=True):
        c.near(name, a[f"{name}_ptr"][: a["N"]], true, FLOAT32)


def _total(c: Comparison, _: Args, a: Args) -> None:
    n, m, among = a["N"], a["M"], a["AMONG"]
    att, rep = a["att_high"] + a["att_low"], a["rep_high"] + a["rep_low"]
    attracting, repelling = (
        float(a[f"{name}_ptr"][:n].long().sum()) for name in ("attracting", "repelling")
    )
    constants = attracting * att + repelling * rep
    above = float(a["energy_ptr"][:n].double().sum()) - constants
    of_class = int(a["own_class_ptr"][:n].long().sum()) - (n if among else 0)
    of_others = n * (m - 1 if among else m) - of_class
    energy = above + of_class * att + of_others * rep
    nearest = float(a["nearest_ptr"][:n].double().min().sqrt())
    active = float(a["active_ptr"].sum())
    batch = a["label_ptr"][: a["B"]]
    outside = int(((batch < 0) | (batch >= a["classes"])).sum())
    if outside:
        c.holds("labels out of range are counted", a["totals_ptr"][8] == outside)
        c.holds("they make the loss NaN", a["value_ptr"].isnan() & a["totals_ptr"][6].isnan())
        return
    found = [above, attracting, repelling, nearest, active, energy, 0.0, float(a["tiles"]), 0.0]
    if a["AFTER"]:
        before = a["before_ptr"].tolist()
        found = [x + y for x, y in zip(found, before, strict=True)]
        found[3] = min(nearest, before[3])
    for name, ours, true in zip(TOTALS, a["totals_ptr"], found, strict=True):
        c.near(name, ours, torch.full_like(ours, true), 1e-9)
    value = found[5] / a["pairs"]
    c.near("value of the loss", a["value_ptr"], torch.full_like(a["value_ptr"], value), FLOAT32)


def _pull_back(c: Comparison, _: Args, a: Args) -> None:
    grad, b = a["grad_ptr"].double(), a["B"]
    factor = float(a["grad_output_ptr"]) * (2 if a["TWICE"] else 1) / a["pairs"]
    if a["UNIT"]:
        y, inverse = a["points_ptr"].double(), a["inverse_ptr"].double()
        grad = (grad - (grad * y).sum(1, keepdim=True) * y) * inverse[:, None]
    grad = grad * factor
    if a["NEEDS_X"]:
        ours = a["x_grad_ptr"]
        c.near("gradient of the embeddings", ours, grad[:b], FLOOR[ours.dtype])
    if a["NEEDS_REST"]:
        ours = a["rest_grad_ptr"]
        c.near("gradient of the proxies", ours, grad[b:], FLOOR[ours.dtype])


@dataclass(frozen=True)
class Kernel:
    name: str
    what: str
    check: Callable[[Comparison, Args, Args], None]  # arguments before the launch, and after it


_IN_PLACE = ("_join_kernel",)  # what is overwritten is kept for the check
# In the order of their launches.
KERNELS = {
    "_pack_kernel": Kernel("pack", "scales, orders, rounds and sketches the points", _pack),
    "_filter_kernel": Kernel("filter", "finds the tiles of pairs that may repel", _filter),
    "_count_kernel": Kernel("count", "counts the tiles that each program has to visit", _count),
    "_plan_kernel": Kernel("plan", "shares long lists of tiles out over programs", _plan),
    "_force_kernel": Kernel("forces", "energy and gradient of every point", _forces),
    "_join_kernel": Kernel("join", "adds up what several programs found for a point", _join),
    "_total_kernel": Kernel("total", "the value of the loss, and its statistics", _total),
    "_pull_back_kernel": Kernel(
        "pull back", "backward: the gradients that PyTorch gets", _pull_back
    ),
}
