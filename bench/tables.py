"""What rows of `bench.speed` say, as a table and as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

MEASURED = "measured"
WORST_RATIO = 1.15  # pruning that prunes nothing may cost this much
LEGEND = (
    "forward, + backward: median ms of a call without gradients, and with. x pfml: the time in "
    "units of pfml's. MiB: memory that a call adds. Gop: 10^9 operations executed; share: of 4 N^2 "
    "D, two dense products. On a GPU, ms with gradients: b2b, of calls back to back; host, until a "
    "call returns; graph, in a CUDA graph."
)
_GROWTH = 4  # between two sizes from which the growth of the time is read, at least

Row = dict[str, Any]


def speed_table(rows: Sequence[Row]) -> Table:
    """Time, memory and operations of what was measured at one size, a line for each provider."""
    size = rows[0]
    table = Table(
        title=f"{size['size']}: N = {size['n']:,}, D = {size['d']}, {size['classes']:,} classes",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),  # fits 80 columns
    )
    measured = by_provider(rows)
    is_gpu = any(row["back_to_back_ms"] is not None for row in rows)  # where operations do not show
    last_columns = ("b2b", "host", "graph") if is_gpu else ("Gop", "share")
    for name in ("", "forward", "+ backward", "x pfml", "MiB", *last_columns):
        table.add_column(name, justify="right" if name else "left", min_width=5)
    pfml = measured.get((size["size"], "pfml"), {})
    for (_, provider), modes in measured.items():
        forward, both = modes.get("forward"), modes.get("forward+backward")
        last = both or forward
        assert last is not None
        executed = last["executed_operations"]
        table.add_row(
            provider,
            _cell(None if forward is None else forward["p50_ms"]),
            _cell(None if both is None else both["p50_ms"]),
            _cell(last["p50_ms"] / pfml[last["mode"]]["p50_ms"] if pfml else None),
            _cell(last["extra_bytes"], 2**20, ",.0f"),
            *(
                [_cell(last[name]) for name in ("back_to_back_ms", "host_ms", "graph_ms")]
                if is_gpu
                else [_cell(executed, 1e9), _cell(executed, last["dense_operations"], ".1%")]
            ),
        )
    return table


def by_provider(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The measured rows by size and provider, and then by mode."""
    measured: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == MEASURED:
            measured.setdefault((row["size"], row["provider"]), {})[row["mode"]] = row
    return measured


def findings(rows: Sequence[Row]) -> Iterator[str]:
    """What the table does not say, a line of rich markup each: what did not run, growth,
    the worst case."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["status"] != MEASURED:
            reasons.setdefault((row["status"], row["provider"]), {})[row["size"]] = None
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (status, provider), names in reasons.items():
        together.setdefault((status, tuple(names)), []).append(provider)
    every = tuple(dict.fromkeys(row["size"] for row in rows))
    for (status, sizes), providers in together.items():
        where = "everywhere" if sizes == every and len(every) > 1 else ", ".join(sizes)
        yield escape(f"{', '.join(providers)} ({where}): {status}.")
    times = by_provider([row for row in rows if row["mode"] == "forward+backward"])
    own = [row for (_, provider), modes in times.items() for row in modes.values()
           if provider == "pfml"]  # fmt: skip
    for small, large, exponent in growth(own):
        yield f"From {small} to {large} the time of pfml grows as N^{exponent:.2f}."
    for row in own:
        dense = times.get((row["size"], "pfml-dense"), {}).get(row["mode"])
        if row["kind"] != "apart" and dense is not None:
            ratio = row["p50_ms"] / dense["p50_ms"]
            verdict = "below" if ratio < WORST_RATIO else "[red]not below[/red]"
            yield (
                f"Nothing to prune ({row['size']}): pfml takes {ratio:.2f} of the time of "
                f"pfml-dense, {verdict} {WORST_RATIO}."
            )


def growth(rows: Sequence[Row]) -> Iterator[tuple[str, str, float]]:
    """p of time ~ N^p from the smallest to the largest of sizes that differ in their classes only:
    the names of the two, and p."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault((row["kind"], row["d"], row["proxies"]), []).append(row)
    for some in alike.values():
        small, large = (extreme(some, key=lambda row: row["n"]) for extreme in (min, max))
        if large["n"] >= _GROWTH * small["n"]:
            times = math.log(large["p50_ms"] / small["p50_ms"])
            yield small["size"], large["size"], times / math.log(large["n"] / small["n"])


def _cell(value: float | None, unit: float = 1.0, form: str | None = None) -> str:
    """A number with three digits, or in a format of its own."""
    if value is None:
        return ""
    value /= unit
    return format(value, form or (",.0f" if value >= 100 else ".1f" if value >= 10 else ".2f"))
