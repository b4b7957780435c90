"""Lightning, Accelerate and the Hugging Face Trainer: without torchrun, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.trainers.training import LOSSES, LR, Run

PATIENCE = 300  # seconds
PROGRAMS = {
    "lightning": "with_lightning",
    "accelerate": "with_accelerate",
    "transformers": "with_hugging_face",
}
WORLDS = [(0, 0), (0, 1), (0, 2), (1, 2)]  # rank and number of ranks, which is 0 without torchrun
Runs = dict[tuple[int, int], dict[str, Run]]


def start(program: str, ranks: int, folder: Path) -> None:
    """As its user does, but for what else is set on this machine."""
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    several = [*torchrun, f"--nproc-per-node={ranks}", "-m"] if ranks > 0 else []
    command = [sys.executable, "-m", *several, f"tests.trainers.{program}", str(folder)]
    keep = ("PATH", "HOME", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "GLOO_SOCKET_IFNAME")
    own = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env={name: os.environ[name] for name in keep if name in os.environ} | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        says, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        says, _ = process.communicate()
    assert process.returncode == 0, says


def same(ours: Run, theirs: Run, *names: str) -> None:
    """To the bit."""
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def resumed_is_uninterrupted(runs: Runs) -> None:
    """From the library's checkpoint, to the bit; nothing is kept beside it."""
    for world in WORLDS:
        for name in runs[world].keys() & LOSSES.keys():
            whole, resumed = runs[world][name], runs[world][f"{name}, resumed"]
            assert not torch.equal(resumed["start"], whole["start"])
            same(resumed, whole, "network", "proxies", "optimizer", "calls", "statistics")
            # A checkpoint has the state of rank 0: with fields of their own, sketches differ.
            if world[0] == 0 or name == "one field":
                same(resumed, whole, "sketch")


def ranks_agree(runs: Runs) -> None:
    first, second = runs[0, 2], runs[1, 2]
    for name, run in first.items():
        same(run, second[name], "network", "proxies", "optimizer", "calls")
    same(first["one field"], second["one field"], "sketch", "statistics")
    # Of its own batches each: what ranks have in common is no accident.
    assert not torch.equal(first["own field"]["sketch"], second["own field"]["sketch"])


def one_field_is_that_of_one_process(runs: Runs) -> None:
    alone = runs[0, 0]["own field"]
    for many in (runs[0, 1]["one field"], runs[0, 2]["one field"]):
        same(many, alone, "start", "calls")
        # Adam is blind to a factor of the gradient; its state is not.
        near = {"network": 1e-5, "proxies": 1e-5, "statistics": 1e-5, "optimizer": 1e-4}
        for name, allowed in near.items():
            torch.testing.assert_close(many[name], alone[name], rtol=allowed, atol=allowed)
    assert alone["statistics"]["repelling_pairs"] > 0  # or it would compare half of the forces


def proxies_learn_at_their_rate(runs: Runs) -> None:
    for world in WORLDS:
        for run in runs[world].values():
            assert run["learning rates"] == [LR, 100 * LR]
            moved = (run["proxies"] - run["start"]).abs().amax(-1)
            assert (moved > 100 * LR).all()


CHECKS = (
    resumed_is_uninterrupted, ranks_agree, one_field_is_that_of_one_process,
    proxies_learn_at_their_rate,
)  # fmt: skip


@pytest.mark.trainers
@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("library", PROGRAMS)
def test_training(library: str, tmp_path: Path) -> None:
    if find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install -e '.[trainers]'")
    for ranks in (0, 1, 2):
        start(PROGRAMS[library], ranks, tmp_path)
    runs = {
        (rank, ranks): torch.load(tmp_path / f"rank {rank} of {ranks}") for rank, ranks in WORLDS
    }
    for check in CHECKS:
        check(runs)
