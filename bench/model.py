"""The modelled time of one step on a GPU that is not here: what is counted, over rates.

Nothing in it is measured. Counted are launches, machine code, tiles and pairs (counting.py). Rates
are those of data sheets and of published microbenchmarks, latencies are assumed (chips.py).

Every time is a range. At its lower end units overlap, the L2 cache delivers its peak, and latencies
are those of an idle chip. At its upper end the units of a multiprocessor take turns, bandwidths are
those that microbenchmarks reach, latencies are twice as long, and the last programs leave
multiprocessors idle.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import aot
from bench.chips import (
    ALU,
    ALU_RESULTS,
    CHIPS,
    HBM_LATENCY,
    L2_LATENCY,
    LAUNCH_GAP,
    SCHEDULERS,
    Chip,
    Ends,
)
from bench.clouds import make_cloud
from bench.counting import (
    Kernel,
    Work,
    count_work,
    filter_blocks,
    instructions_a_pair,
    record_step,
    shared_out,
)
from bench.results import append_row, provenance
from bench.settings import DTYPES, MODELLED, ModelSettings, Size
from pfml_triton import Potential
from pfml_triton.kernels.config import TILE_M

Row = dict[str, Any]


class Estimate(NamedTuple):
    """Modelled seconds, what limits them at either end, and the derivation."""

    name: str
    limits: list[str]
    seconds: Ends
    lines: list[str]


def run(settings: ModelSettings, out: Path, console: Console | None = None) -> Row:
    """Model one step, print its derivation, append a row to ``model.jsonl`` in `out`, return it.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: the kernels were imported under Triton's interpreter.
    """
    for name, known in (("arch", MODELLED), ("dtype", DTYPES)):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name} must be one of {known}, got {getattr(settings, name)!r}")
    for name, least, most in (("classes", 8, 10**5), ("batch", 0, 10**5), ("depth", 3, 512)):
        if not least <= getattr(settings, name) <= most:
            raise ValueError(f"{name} must be in {least}..{most}, got {getattr(settings, name)}")
    chip = CHIPS[settings.arch]
    size = Size(settings.batch, settings.classes, proxies=2, depth=settings.depth)
    points, labels, _ = make_cloud(size, settings.seed)
    points = points.to(getattr(torch, settings.dtype))
    work = count_work(points.float(), labels, Potential())
    kernels, operations = record_step(points, labels, settings.arch)
    launched = [_MODELS[kernel.name](chip, kernel, work) for kernel in kernels]
    text = f"{len(kernels)} launches x {1e6 * LAUNCH_GAP:g} us, assumed"
    launched.append(_limited("gaps", {"launches": len(kernels) * LAUNCH_GAP}, [text]))
    others = [_torch(chip, name, moved) for name, moved in operations.items()]
    times = {e.name: e.seconds for e in launched + others}
    times["kernels"] = np.sum([e.seconds for e in launched], 0)
    times["step"] = times["kernels"] + np.sum([e.seconds for e in others], 0)
    dense = 4 * len(points) ** 2 * settings.depth / (chip.cycles * chip.operations)

    row: Row = {"bench": "model", "modelled": True} | asdict(settings) | {"n": len(points)}
    row |= {f"chip_{name}": value for name, value in asdict(chip).items()}
    row |= _ends("l2_latency_us", 1e6 * L2_LATENCY) | _ends("hbm_latency_us", 1e6 * HBM_LATENCY)
    row |= (
        _ends("l2_rate", chip.l2)
        | _ends("hbm_rate", chip.hbm)
        | {"launch_gap_us": 1e6 * LAUNCH_GAP}
    )
    row |= {"active_tiles": len(work.row), "longest_list": int(work.lengths.max())}
    row |= {"turns": int(work.turns.sum()), "nominated_pairs": work.pairs}
    by_name = {kernel.name: kernel for kernel in kernels}
    row["filter_blocks"] = sum(filter_blocks(by_name["filter"]))
    row["filter_instructions_a_pair"] = instructions_a_pair(by_name["filter"])
    for kernel in kernels:
        row |= {f"{kernel.name}_{key}": value for key, value in _facts(kernel).items()}
    for name, seconds in times.items():
        row |= _ends(f"{name.replace(' ', '_')}_us", 1e6 * seconds)
    row |= {"dense_bfloat16_us": 1e6 * dense, "dense_tf32_us": 2e6 * dense}
    append_row(out / "model.jsonl", row | provenance(torch.device("cpu")))

    console = console or Console()
    title = f"Modelled time of one step, N = {len(points):,}, D = {settings.depth}, "
    title += f"{settings.dtype}, {chip.name}"
    for table in _tables(title, by_name, {"kernels": launched, "step": others}, times):
        console.print(table)
    for line in _findings(chip, work, times, dense):
        console.print(line, highlight=False)
    return row


def makespan(times: Iterable[float], slots: int) -> float:
    """When the last of some programs ends, each started in turn as soon as a slot is free."""
    free = [0.0] * slots
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def _waves(chip: Chip, kernel: Kernel) -> int:
    return math.ceil(kernel.programs / (kernel.resident * chip.multiprocessors))


def _path(chip: Chip, kernel: Kernel, lines: Iterable[int]) -> aot.Waits:
    """The critical path of some lines of a program, when the warps are served in turn."""
    together = min(kernel.resident, math.ceil(kernel.programs / chip.multiprocessors))
    issue = max(1.0, kernel.warps * together / SCHEDULERS)
    return aot.critical_path([kernel.lines[i] for i in lines], issue)


def _limited(name: str, times: Mapping[str, ArrayLike], lines: list[str]) -> Estimate:
    """The largest of some times that overlap, at either end."""
    ends = {unit: np.broadcast_to(time, 2) for unit, time in times.items()}
    limits = [max(ends, key=lambda unit: float(ends[unit][end])) for end in range(2)]
    return Estimate(name, limits, np.max([*ends.values()], 0), lines)


def _pack(chip: Chip, kernel: Kernel, work: Work) -> Estimate:
    names = ("x", "order", "coarse", "sq_norm", "radius", "left", "right")
    moved = {name: kernel.args[f"{name}_ptr"].nbytes for name in names}
    basis = kernel.programs * kernel.args["basis_ptr"].nbytes
    waves = _waves(chip, kernel)
    hbm = sum(moved.values()) / chip.hbm
    times = {"HBM": hbm + np.array([0, waves]) * (L2_LATENCY + HBM_LATENCY), "L2": basis / chip.l2}
    return _limited("pack", times, [
        f"HBM: {' + '.join(f'{name} {size / 1e6:.1f}' for name, size in moved.items())} MB: "
        f"{_us(hbm)}; upper end: {_some(waves, 'wave')} of programs that wait for the order, then "
        "for points",
        f"L2: {kernel.programs} programs read the basis, {basis / 1e6:.1f} MB: {_us(times['L2'])}",
    ])  # fmt: skip


def _filter(chip: Chip, kernel: Kernel, work: Work) -> Estimate:
    a, loop, each = kernel.args, kernel.inner_loop, filter_blocks(kernel)
    m, n, k, blocks, threads = a["BLOCK_M"], a["BLOCK_N"], a["K"], sum(each), 32 * kernel.warps
    busy = sum(b > 0 for b in each)  # programs
    slots = kernel.resident * chip.multiprocessors
    alu = sum(loop[name] for name in ALU)
    moved = 2 * k * (blocks * n + busy * m)
    # An even share of all slots, or more: the longest program, or how the last leave them.
    uneven = np.array([max(each), makespan(each, slots)]) * slots / blocks
    uneven[0] = max(1.0, uneven[0])
    tensor = blocks * 2 * m * n * k / (chip.cycles * chip.operations)
    issue = blocks * loop.total() * kernel.warps / (SCHEDULERS * chip.cycles)
    results = blocks * alu * threads / (ALU_RESULTS * chip.cycles)
    apart = np.array([kernel.resident == 1, 1])  # is there no program to overlap with?
    times = {"tensor cores": tensor * uneven, "issue": issue * uneven, "ALU": results * uneven}
    times["tensor cores, then ALU"] = (tensor + max(issue, results)) * uneven * apart
    times["L2"] = moved / chip.l2 * uneven
    rate = f"{chip.cycles / 1e9:.1f} GHz"  # of all multiprocessors
    return _limited("filter", times, [
        f"a block of {m} x {n} pairs, depth {k}: {loop.total()} instructions x {threads} threads, "
        f"{instructions_a_pair(kernel):.2f} a pair",
        f"tensor cores: {blocks:,} blocks x 2 x {m} x {n} x {k} / ({rate} x {chip.operations}): "
        f"{_us(tensor)}",
        f"issue: {blocks:,} x {loop.total()} x {kernel.warps} warps / ({SCHEDULERS} x {rate}): "
        f"{_us(issue)}",
        f"ALU: {blocks:,} x {alu} ({loop['FMNMX']} FMNMX) x {threads} / ({ALU_RESULTS} x {rate}): "
        f"{_us(results)}",
        f"L2: {blocks:,} x {n} x {k} x 2 bytes and the rows, {moved / 1e6:.0f} MB: "
        f"{_us(moved / chip.l2)}",
        f"lower end: {_some(kernel.resident, 'program')} a multiprocessor overlap; upper end: they "
        f"do not, and the last of {busy:,} leave idle: x {uneven[1]:.2f}",
    ])  # fmt: skip


def _short(chip: Chip, kernel: Kernel, work: Work) -> Estimate:
    """Count, plan and join: waves of programs that wait for a few loads."""
    a, stop, moved, passes = kernel.args, len(kernel.lines), 0, 1
    if kernel.name == "count":
        labels = a["y_first_label_ptr"].nbytes + a["y_last_label_ptr"].nbytes
        moved = a["near_ptr"].nbytes + kernel.programs * labels
        passes = math.ceil(a["tiles_y"] / a["CHUNK"])
    elif kernel.name == "plan":
        passes = math.ceil(a["tiles_x"] / a["BLOCK"])
    else:  # nearly all programs find that there is nothing to join
        used = shared_out(work, (len(a["energy_ptr"]) - a["N"]) // TILE_M)[1]
        moved = used * TILE_M * 2 * 4 * (a["D"] + 4)
        stop = 1 + next(i for i in range(stop) if aot.opcode(kernel.lines[i]) == "EXIT")
    loops = [loop for loop in aot.loops(kernel.lines) if len(loop) > 2 and loop.stop <= stop]
    parts = [(range(stop), 1), *((loop, passes - 1) for loop in loops)]
    paths = [np.array(_path(chip, kernel, part)) * times for part, times in parts]
    waits, waves = aot.Waits(*np.sum(paths, 0)), _waves(chip, kernel)
    latency = waves * chip.seconds(waits)
    return _limited(kernel.name, {"latency": latency, "L2": moved / chip.l2}, [
        f"latency: {_some(waves, 'wave')} of programs, each {_waits(waits)}: {_us(latency)}",
        f"L2: {moved / 1e6:.1f} MB: {_us(moved / chip.l2)}",
    ])  # fmt: skip


def _force(chip: Chip, kernel: Kernel, work: Work) -> Estimate:
    a, lines, tiles_x = kernel.args, kernel.lines, len(work.lengths)
    nominate, tile, chunk = kernel.loops[:3]
    inside = [x for x in aot.loops(lines) if nominate.stop <= x.start and x.stop <= tile.stop]
    turn = max(inside, key=len)
    start, stop = 0, max(i for i, line in enumerate(lines) if aot.opcode(line) == "EXIT")
    if a["SHARED_OUT"]:  # the first branch skips what only extra programs do
        branch = next(line for line in lines if aot.opcode(line) == "BRA")
        target = re.findall(r"\.L\w+", branch)[0] + ":"
        start = next(i for i, line in enumerate(lines) if line.strip() == target)
    around = _path(chip, kernel, [i for i in range(start, stop) if i not in tile])
    again = _path(chip, kernel, [i for i in chunk if i not in tile])
    body = _path(chip, kernel, [i for i in tile if i not in nominate and i not in turn])
    evaluate = _path(chip, kernel, turn)

    slots = kernel.resident * chip.multiprocessors
    share = chip.l2 / slots
    steps = a["coarse_depth"] // a["BLOCK_K"]
    step_bytes = 2 * (a["BLOCK_M"] + a["BLOCK_N"]) * a["BLOCK_K"]
    row_bytes, out_bytes = (
        a["BLOCK_M"] * a["D"] * a[name].element_size() for name in ("x_ptr", "grad_ptr")
    )
    step = np.maximum(L2_LATENCY / (kernel.stages - 1), step_bytes / share)
    step = np.maximum(step, _path(chip, kernel, nominate).clocks / chip.clock)
    per_program = chip.seconds(around) + out_bytes / share
    per_program += (math.ceil(a["tiles_y"] / a["CHUNK"]) - 1) * chip.seconds(again)
    per_tile = chip.seconds(body) + L2_LATENCY + steps * step + row_bytes / share
    # The points of a class lie side by side: at the lower end L2 still has them.
    far = np.array([L2_LATENCY[0], HBM_LATENCY[1]])
    per_turn = chip.seconds(evaluate, far) + row_bytes / share

    program, used = shared_out(work, kernel.grid[0] - tiles_x)
    tiles, turns = (np.bincount(program, w, kernel.programs) for w in (None, work.turns))
    each = np.outer(tiles, per_tile) + np.outer(turns, per_turn)
    each[: tiles_x + used] += per_program
    each[tiles_x:] += np.outer(np.where(tiles[tiles_x:], a["steps"], 1), L2_LATENCY)
    share_of_all = each.sum(0) / slots
    latency = np.array([max(share_of_all[0], each[:, 0].max()), makespan(each[:, 1], slots)])
    l2_bytes = tiles.sum() * (steps * step_bytes + row_bytes) + turns.sum() * row_bytes
    hbm_bytes = a["x_ptr"].nbytes + a["x_coarse_ptr"].nbytes + tiles_x * out_bytes
    times = {"latency": latency, "L2": l2_bytes / chip.l2, "HBM": hbm_bytes / chip.hbm}
    return _limited("force", times, [
        f"a program: {_waits(around)}, {out_bytes >> 10} KiB of gradient: {_us(per_program)}",
        f"an active tile: {_waits(body)}; {_some(steps, 'step')} of {step_bytes >> 10} KiB fetched "
        f"{kernel.stages - 1} ahead; {row_bytes >> 10} KiB of points: {_us(per_tile)}",
        f"a turn: {_waits(evaluate)}; {row_bytes >> 10} KiB of points: {_us(per_turn)}",
        f"latency: {tiles_x:,} programs, {len(work.row):,} active tiles, {work.turns.sum():,} "
        f"turns, {kernel.programs - tiles_x} extra programs ({used} needed), {slots} at a time: "
        f"{_us(latency)}; upper end: the last leave idle, x {latency[1] / share_of_all[1]:.2f}",
        f"L2: coarse points and points, {l2_bytes / 1e6:.0f} MB: {_us(times['L2'])}",
        f"HBM: points, coarse points, gradient, {hbm_bytes / 1e6:.0f} MB: {_us(times['HBM'])}",
    ])  # fmt: skip


def _torch(chip: Chip, name: str, moved: list[int]) -> Estimate:
    seconds = np.sum([np.maximum(LAUNCH_GAP, size / chip.hbm) for size in moved], 0)
    return _limited(name, {"launches, HBM": seconds}, [
        f"{_some(len(moved), 'operation')} of PyTorch's own, {sum(moved) / 1e6:.0f} MB: each takes "
        "1 us or its bytes over HBM, whatever is more, though a sort is several launches",
    ])  # fmt: skip


_MODELS = {
    "pack": _pack, "filter": _filter, "count": _short, "plan": _short, "force": _force,
    "join": _short,
}  # fmt: skip


def _facts(kernel: Kernel) -> Row:
    """What a row says of a kernel's machine code."""
    code, loop = kernel.code, kernel.inner_loop
    return {
        "programs": kernel.programs, "warps": kernel.warps, "resident": kernel.resident,
        "registers": code.registers, "shared_bytes": code.shared_bytes,
        "stack_bytes": code.stack_bytes, "instructions": code.instructions,
        "tensor_core_instructions": code.tensor_core_instructions,
        "inner_loop_instructions": loop.total(), "inner_loop_fmnmx": loop["FMNMX"],
    }  # fmt: skip


def _ends(name: str, values: Ends) -> Row:
    return {f"{name}_low": float(values.min()), f"{name}_high": float(values.max())}


def _us(seconds: ArrayLike) -> str:
    low, high = (f"{1e6 * end:,.1f}" for end in np.broadcast_to(seconds, 2))
    return f"{low} us" if low == high else f"{low} to {high} us"


def _some(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _waits(waits: aot.Waits) -> str:
    rounds = _some(round(waits.near + waits.far), "round")
    return f"{rounds} of latency, {waits.clocks:,.0f} clocks"


def _tables(
    title: str, kernels: dict[str, Kernel], parts: dict[str, list[Estimate]], times: dict[str, Ends]
) -> Iterator[Table]:
    """The times, with a total below each part, and their derivation."""
    table = Table(title=title, caption="Modelled, not measured.", box=SIMPLE_HEAD)
    for name in ("kernel", "limits, lower and upper end", "modelled us"):
        table.add_column(name, justify="right" if name.endswith("us") else "left")
    for name, part in parts.items():
        for e in part:
            table.add_row(e.name, " / ".join(dict.fromkeys(e.limits)), _us(e.seconds)[:-3])
        table.add_row(f"[bold]{name}", "", f"[bold]{_us(times[name])[:-3]}", end_section=True)
    yield table
    table = Table(title="Derivation, modelled", box=SIMPLE_HEAD, show_header=False)
    for e in (e for part in parts.values() for e in part):
        lines = e.lines
        if e.name in kernels:
            k = kernels[e.name]
            resources = (
                f"{_some(k.programs, 'program')} of {k.warps} warps, {k.code.registers} registers, "
                f"{k.code.shared_bytes >> 10} KiB of shared memory: a multiprocessor holds "
                f"{k.resident}; {_some(k.code.tensor_core_instructions, 'tensor-core instruction')}"
            )
            lines = [resources, *lines]
        table.add_row(e.name, "\n".join(lines), end_section=True)
    yield table


def _findings(chip: Chip, work: Work, times: dict[str, Ends], dense: float) -> Iterator[str]:
    yield (
        f"Work, counted: {len(work.row):,} active tiles of 16 x 64, lists of "
        f"{work.lengths.float().mean():.2f} on average and {work.lengths.max()} at most; "
        f"{work.turns.sum():,} turns for {work.pairs:,} pairs that exert a force, the fewest that "
        "are nominated."
    )
    yield (
        f"Rates: {chip.name}, {chip.multiprocessors} multiprocessors at {chip.clock / 1e9:g} GHz; "
        f"HBM {chip.hbm[0] / 1e12:.2f} to {chip.hbm[1] / 1e12:.2f} TB/s, L2 "
        f"{chip.l2[0] / 1e12:.1f} to {chip.l2[1] / 1e12:.1f} TB/s. Assumed latencies: HBM "
        f"{1e6 * HBM_LATENCY[0]:g} to {1e6 * HBM_LATENCY[1]:g} us, L2 {1e6 * L2_LATENCY[0]:g} to "
        f"{1e6 * L2_LATENCY[1]:g} us. The time that the host takes to launch is not modelled."
    )
    kernels, step = (dense / times[name][::-1] for name in ("kernels", "step"))
    yield (
        f"Dense equivalent, 4 N^2 D operations at peak: {1e6 * dense:,.0f} us in bfloat16, "
        f"{2e6 * dense:,.0f} us in TF32. In bfloat16 that is {kernels[0]:.1f} to {kernels[1]:.1f} "
        f"times the kernels' modelled time, {step[0]:.1f} to {step[1]:.1f} times the step's."
    )
