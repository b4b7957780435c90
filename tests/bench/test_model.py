import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import __main__ as command_line
from bench import aot, counting, model
from bench.clouds import make_cloud
from bench.settings import ModelSettings, Size
from pfml_triton import Potential
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import TILE_M, TILE_N, tiles_for
from pfml_triton.sketch import random_basis
from tests import clouds

SETTINGS = ModelSettings(classes=2100, batch=10, depth=64)  # enough for count, plan and join


def modelled(settings: ModelSettings, out: Path) -> dict[str, Any]:
    with (out / "printed").open("w") as file:
        return model.run(settings, out, Console(file=file, width=200))


def filter_facts(arch: str, mutual: bool) -> dict[str, float]:
    """Compile the filter of points of depth 512, and read its inner loop."""
    points = torch.empty(5000, 512, device="meta")
    labels = torch.empty(5000, dtype=torch.int64, device="meta")
    others = labels if mutual else labels.clone()
    basis = random_basis(512, torch.device("cpu")).to("meta")
    tiles = tiles_for(512, hopper=arch == "sm_90")
    with aot.record() as launches:
        launch.field_terms(
            points, labels, points, others, Potential(), needs_grad=True, basis=basis, tiles=tiles
        )
    (made,) = (made for made in launches if made.kernel.__name__ == "_filter_kernel")
    assert made.args["MUTUAL"] == mutual
    kernel = counting.compiled_kernel(made, arch)
    return {
        "products": kernel.inner_loop["HGMMA"],
        "stack": kernel.code.stack_bytes,
        "spills": len(kernel.code.spills_in_loops),
        "instructions a pair": counting.instructions_a_pair(kernel),
        "resident": kernel.resident,
    }


@pytest.mark.parametrize("mutual", [True, False])
def test_the_filter_takes_two_instructions_a_pair(
    compiler: ProcessPoolExecutor, mutual: bool
) -> None:
    facts = compiler.submit(filter_facts, "sm_90", mutual).result()
    assert facts["products"] > 0
    assert (facts["stack"], facts["spills"]) == (0, 0)
    assert facts["instructions a pair"] <= 2.0
    assert facts["resident"] >= 2  # one multiplies while the other takes maxima


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", "float32"), ("sm_80", "bfloat16")])
def test_run_models_every_kernel(
    compiler: ProcessPoolExecutor, tmp_path: Path, arch: str, dtype: str
) -> None:
    settings = replace(SETTINGS, arch=arch, dtype=dtype)
    row = compiler.submit(modelled, settings, tmp_path).result()
    (written,) = map(json.loads, (tmp_path / "model.jsonl").read_text().splitlines())
    assert written.items() >= row.items()
    assert not [name for name, value in row.items() if isinstance(value, dict | list)]  # flat
    assert (row["modelled"], row["n"], row["arch"]) == (True, 4210, arch)
    kernels = ("pack", "filter", "count", "plan", "force", "join")
    for end in ("low", "high"):
        times = {name: row[f"{name}_us_{end}"] for name in (*kernels, "gaps")}
        assert min(times.values()) > 0
        assert row[f"kernels_us_{end}"] == pytest.approx(sum(times.values()))
        around = row[f"torch_forward_us_{end}"] + row[f"torch_backward_us_{end}"]
        assert row[f"step_us_{end}"] == pytest.approx(row[f"kernels_us_{end}"] + around)
    assert all(row[f"{name}_us_low"] <= row[f"{name}_us_high"] for name in kernels)
    # By hand: the dense roofline, and the tensor time of the blocks above the diagonal.
    chip = {"sm_90": 132 * 4096 * 1.83e9, "sm_80": 108 * 2048 * 1.41e9}[arch]
    assert row["dense_bfloat16_us"] == pytest.approx(1e6 * 4 * 4210**2 * 64 / chip)
    columns = 256 if arch == "sm_90" else 128
    padded = -(-4210 // columns) * columns
    blocks = sum(padded // columns - i * 128 // columns for i in range(padded // 128))
    assert row["filter_blocks"] == blocks
    assert row["filter_us_low"] >= 1e6 * blocks * 2 * 128 * columns * 64 / chip
    printed = (tmp_path / "printed").read_text()
    for words in ("Modelled time of one step", "Derivation, modelled", "tensor cores:", "a turn:"):
        assert words in printed
    assert "measured" not in printed.replace("Modelled, not measured", "")


@pytest.mark.parametrize("kind", ["clusters", "collisions", "one_class"])
def test_work_is_that_of_the_kernels(kind: str) -> None:
    points, labels = clouds.cloud(kind, 150, 70, 9, torch.float32)
    potential = Potential(delta=0.3)
    work = counting.count_work(points, labels, potential)
    terms = launch.field_terms(
        points, labels, points, labels, potential, needs_grad=False, basis=clouds.basis(points)
    )
    tiles = -(-150 // TILE_M) * -(-150 // TILE_N)
    assert len(work.row) == round(float(terms.active_share) * tiles)
    assert work.pairs == int((terms.attracting + terms.repelling).sum())
    assert work.lengths.sum() == len(work.row) == len(work.turns)
    assert torch.equal(work.row, work.row.sort().values)


def test_far_classes_share_no_tiles() -> None:
    points, labels, _ = make_cloud(Size(batch=0, classes=300, proxies=2), seed=0)
    work = counting.count_work(points, labels, Potential())
    assert len(work.row) < 1.1 * 600 / TILE_M  # little but the tiles on the diagonal
    assert work.pairs == 600
    assert work.turns.tolist() == [1] * len(work.row)


def test_long_lists_are_shared_out_as_planned() -> None:
    lengths = torch.tensor([3, 50, 0, 33])
    row = torch.repeat_interleave(torch.arange(4), lengths)
    work = counting.Work(row, torch.ones_like(row), 0, lengths)
    program, used = counting.shared_out(work, extra=512)  # so that the least budget, 16, counts
    assert used == 3 + 2
    expected = {0: 3, 1: 16, 4: 16, 5: 16, 6: 2, 3: 16, 7: 16, 8: 1}
    assert Counter(program.tolist()) == expected
    program, used = counting.shared_out(work, extra=2)  # a budget of 43
    assert (used, Counter(program.tolist())) == (1, {0: 3, 1: 43, 4: 7, 3: 33})
    assert counting.shared_out(work, extra=0) == (row, 0)


@pytest.mark.parametrize("columns", [128, 256])
def test_the_filter_does_what_is_above_the_diagonal_once(columns: int) -> None:
    args = {"MUTUAL": True, "STRIP": 3, "BLOCK_M": 128, "BLOCK_N": columns}
    args["blocks_y"] = 1280 // columns
    kernel: Any = SimpleNamespace(args=args, grid=(10, -(-args["blocks_y"] // 3)))
    blocks = counting.filter_blocks(kernel)
    assert len(blocks) == 10 * kernel.grid[1]
    assert max(blocks) == 3
    assert sum(blocks) == sum(
        (y + 1) * columns > x * 128 for x in range(10) for y in range(args["blocks_y"])
    )
    args["MUTUAL"] = False
    assert sum(counting.filter_blocks(kernel)) == 10 * args["blocks_y"]


LISTING = """
.L_x_1:
/*0000*/ LDG.E.64 R2, desc[UR4][R8.64] ;
/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0020*/ LDG.E.128 R12, desc[UR4][R10.64] ;
/*0030*/ FADD R4, R4, R13 ;
/*0040*/ STS.128 [R20], R4 ;
/*0050*/ BAR.SYNC 0x0 ;
/*0060*/ LDS.64 R6, [R20] ;
/*0070*/ @P0 SHFL.BFLY PT, R7, R7, 0x2, 0x1f ;
/*0080*/ LDG.E.128 R16, desc[UR4][R10.64] ;
/*0090*/ FADD R4, R19, R7 ;
/*00a0*/ @!P1 BRA `(.L_x_1) ;
"""


def test_critical_path_waits_for_what_is_used() -> None:
    """The second load waits for the first, the third does not, the last comes after a barrier."""
    lines = LISTING.split("\n")[1:-1]
    assert aot.loops(lines) == [range(12)]
    assert Counter(map(aot.opcode, lines))["LDG"] == 4
    far, near, clocks = aot.critical_path(lines, issue=2.0)
    assert (far, near) == (2, 1)
    # First sum, store, barrier, load from shared memory, shuffle, second sum
    assert clocks == 4 * 2 + 5 + 2 + 2 + 25 + 2 + 30 + 2 + 25 + 2 + 5


def test_makespan_gives_each_free_slot_the_next_program() -> None:
    assert model.makespan([3, 1, 1, 1, 4], 2) == 7
    assert model.makespan([1, 2], 5) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--depth 513", "depth must be in 3..512, got 513"),
        ("--classes 7", "classes must be in 8.."),
        ("--batch -1", "batch must be in 0.."),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    out = tmp_path / "out"
    arguments = ["model", *options.split(), "--out", str(out)]
    assert command_line.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(model, "run", lambda settings, out: seen.append((settings, out)))
    options = "--arch sm_80 --dtype bfloat16 --classes 9 --batch 4 --depth 32 --seed 3"
    assert command_line.main(["model", *options.split(), "--out", str(tmp_path)]) == 0
    assert seen == [(ModelSettings("sm_80", "bfloat16", 9, 4, 32, 3), tmp_path)]


def test_the_interpreter_has_no_machine_code(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        model.run(replace(SETTINGS, classes=8), tmp_path, Console(quiet=True))
