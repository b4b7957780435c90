"""Clocks on the CPU, where a call has returned when its work is done."""

from __future__ import annotations

import time

import pytest
import torch

from bench import clocks

CPU = torch.device("cpu")


def slept() -> None:
    time.sleep(2e-3)


def test_a_call_takes_what_it_takes() -> None:
    result, ms = clocks.elapsed(lambda: slept() or 7, CPU)
    assert result == 7
    assert 2 <= ms < 40
    assert 2000 <= clocks.host_us(slept, CPU) < 40_000


def test_calls_back_to_back_are_timed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = clocks.back_to_back(slept, CPU)
    assert 2000 <= pace.p20_us <= pace.p50_us <= pace.p80_us < 40_000
    assert 10 <= pace.calls <= clocks.MOST_CALLS
    monkeypatch.setattr(clocks, "MOST_SECONDS", 0.0)
    assert clocks.back_to_back(slept, CPU).calls == 10  # of a slow call
    assert clocks.back_to_back(lambda: None, CPU).calls <= clocks.MOST_CALLS


def test_a_cpu_has_no_graphs() -> None:
    assert clocks.graph_us(slept, CPU) is None
