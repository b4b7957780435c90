"""The providers of ``python -m bench speed`` as tests of pytest-benchmark, a group for each size.

    python -m pytest -n0 bench/test_speed.py --benchmark-json=speed.json
    python -m pytest -n0 bench/test_speed.py --benchmark-save=before
    python -m pytest -n0 bench/test_speed.py --benchmark-compare --benchmark-columns=median,iqr

Small sizes, unless the environment variable PFML_BENCH_SIZES names some of `bench.settings.SIZES`,
such as "cub sop" (PFML_BENCH_SLOW=1 also runs what takes more than 10 seconds a call). Whatever
computes PFML is held against the reference before it is timed. What cannot run is skipped, and the
skip says why. Not among the tests of this package, and timed in one process.
"""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.clouds import make_cloud
from bench.costs import Workload, cache_bytes, copies_beyond
from bench.devices import resolve_device
from bench.memory import available_bytes, is_out_of_memory
from bench.parity import truth
from bench.providers import POTENTIAL, PROVIDERS, obstacle, tiles_of
from bench.settings import MODES, SIZES, Size
from bench.speed import Rows, first_calls

SMALL = {
    "cub-small": Size(100, 20, 15, depth=64),
    "sop-small": Size(100, 300, 2, depth=64),
}
DEVICE = resolve_device("auto")


def chosen_sizes(names: str) -> dict[str, Size]:
    """Sizes by name: those of a list that spaces separate, or small ones for an empty one."""
    unknown = [name for name in names.split() if name not in SIZES]
    if unknown:
        raise ValueError(f"PFML_BENCH_SIZES must be some of {' '.join(SIZES)}, got {names!r}")
    return {name: SIZES[name] for name in names.split()} or SMALL


CHOSEN = chosen_sizes(os.environ.get("PFML_BENCH_SIZES", ""))
SLOW = os.environ.get("PFML_BENCH_SLOW", "0") != "0"


@lru_cache(maxsize=1)
def checked(size: str, provider: str) -> tuple[Workload, Rows]:
    """A provider at a size after its first calls, and what they have shown, by mode.

    Raises:
        WrongResult: it does not compute what it says.
    """
    cloud = make_cloud(CHOSEN[size], seed=0).to(DEVICE)
    expected = None
    if PROVIDERS[provider].tolerance is not None:
        expected = truth(cloud, torch.float32, POTENTIAL)
    copies = copies_beyond(cache_bytes(DEVICE), cloud)
    work = Workload(PROVIDERS[provider].build, cloud, copies=copies)
    rows: Rows = {mode: {} for mode in MODES}
    first_calls(PROVIDERS[provider], rows, work, expected, DEVICE)
    for mode, row in rows.items():
        for _ in range(copies - 1):  # the other copies' first
            work.call(mode)
        row["configuration"] = tiles_of(provider, cloud, DEVICE)
    return work, rows


@pytest.mark.benchmark(max_time=0.2, min_rounds=5)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", CHOSEN)
def test_speed(benchmark: BenchmarkFixture, size: str, provider: str, mode: str) -> None:
    shape, available = CHOSEN[size], available_bytes(DEVICE)
    reason = obstacle(provider, shape, DEVICE, available, tuple(PROVIDERS), SLOW)
    if reason is not None:
        pytest.skip(f"{provider} at {size} {reason}")
    try:
        work, rows = checked(size, provider)
    except Exception as error:
        if is_out_of_memory(error):
            pytest.skip(f"{provider} at {size}: {error}")
        raise
    benchmark.group = size
    benchmark.extra_info |= {"n": shape.n, "d": shape.depth, "classes": shape.classes}
    benchmark.extra_info |= {"computes": PROVIDERS[provider].computes} | rows[mode]
    benchmark(work.call, mode)
