import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from bench import __main__ as command_line
from bench import counting, roofline, workloads
from bench.chips import CHIPS
from bench.clouds import make_cloud
from bench.counting import Work, count_work, record_step
from bench.estimate import Estimate, makespan
from bench.results import append_row
from bench.roofline_plot import roofline_figure
from bench.settings import SIZES, RooflineSettings, Size
from bench.validation import Published, Validation
from pfml_triton import Potential
from pfml_triton.kernels.config import FENCELESS, tiles_for

# sop: enough for count, plan and join
SMALL = {"cub": Size(20, 30, 3, 64), "sop": Size(10, 2100, 2, 64)}


def launches(arch: str, size: str = "cub") -> tuple[list[Any], Work]:
    points, labels, shape = make_cloud(SMALL[size], seed=0)
    return record_step(shape, arch)[0], count_work(points, labels, Potential())


def force_of(arch: str, tiles: dict[str, int]) -> Any:
    """The prediction of the forces of 512 dimensions with other tiles."""
    points, labels, size = make_cloud(Size(20, 300, 3), seed=0)
    changed = replace(tiles_for(512, arch=arch), **tiles)
    with mock.patch.object(counting, "tiles_for", return_value=changed):
        made = record_step(size, arch)[0]
    work = count_work(points, labels, Potential())
    return next(p for p in roofline.predict(made, arch, work) if p.name == "force")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_spilling_configuration_comes_first(compiler: ProcessPoolExecutor, arch: str) -> None:
    """Two programs of 4 warps fit a multiprocessor where one of 8 does, but they spill."""
    shipped, spilling = compiler.map(force_of, [arch] * 2, [{}, {"num_warps": 4}])
    assert (shipped.resident, spilling.resident) == (1, 2)
    assert (shipped.spills_in_loops, spilling.spills_in_loops > 0) == (0, True)
    assert spilling.seconds == spilling.high > 1.1 * shipped.seconds


def predictions(arch: str, size: str, name: str = "", **options: int) -> list[Any]:
    """Of a step, where the launches of one kernel have other options."""
    made, work = launches(arch, size)
    for one in made:
        if workloads.name_of(one) == name:
            one.options |= options
    return roofline.predict(made, arch, work)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_is_predicted_the_same_every_time(
    compiler: ProcessPoolExecutor, arch: str
) -> None:
    found = compiler.submit(predictions, arch, "sop").result()
    again = compiler.submit(predictions, arch, "sop").result()
    assert found == again
    assert [p.name for p in found] == [
        "pack", "filter", "count", "plan", "force", "join", "total", "pull_back"
    ]  # fmt: skip
    for p in found:
        assert 0 < p.low <= p.seconds <= p.high < 1e-3
        assert p.fits
        assert p.resident >= 1
        assert p.spills_in_loops == 0


def test_spills_cost_what_they_cost(compiler: ProcessPoolExecutor) -> None:
    free = compiler.submit(predictions, "sm_80", "cub").result()
    tight = compiler.submit(predictions, "sm_80", "cub", "force", maxnreg=40).result()
    free, tight = (next(p for p in found if p.name == "force") for found in (free, tight))
    assert tight.spills_in_loops > 0
    assert tight.registers <= 40
    assert tight.seconds > 1.1 * free.seconds


@pytest.mark.parametrize("options", [{"num_stages": 100}, {"num_warps": 3}])
def test_what_cannot_run_is_no_exception(
    compiler: ProcessPoolExecutor, options: dict[str, int]
) -> None:
    found = compiler.submit(predictions, "sm_90", "cub", "force", **options).result()
    assert [p.fits for p in found] == [True, True, False, True, True]
    assert math.isinf(found[2].seconds)
    assert found[2].name == "force"


def moved_by_an_unknown_kernel() -> tuple[float, int]:
    """Bytes that the workload of a kernel of no known name loads in its loops, and those it has."""
    made, work = launches("sm_80")
    kernel = replace(workloads.read(made[0], "sm_80", CHIPS["sm_80"]), name="novel")
    parts = workloads.parts_of(kernel, work)
    loaded = sum(float(p.times) * i.bytes for p in parts if p.repeats for i in p.code)
    return loaded * kernel.warps * kernel.programs, kernel.bytes


def test_an_unknown_kernel_moves_each_byte_once(compiler: ProcessPoolExecutor) -> None:
    moved, there = compiler.submit(moved_by_an_unknown_kernel).result()
    assert moved == pytest.approx(there)


def products(arch: str) -> dict[str, float]:
    """Tensor-core operations of a step's kernels, as their parts have them."""
    made, work = launches(arch, "sop")
    found = {}
    for one in made:
        kernel = workloads.read(one, arch, CHIPS[arch])
        found[kernel.name] = kernel.warps * sum(
            float(torch.tensor(p.times).expand(kernel.programs).sum()) * i.operations
            for p in workloads.parts_of(kernel, work) for i in p.code
        )  # fmt: skip
    found["tiles"] = len(work.row)
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_work_is_that_of_the_matrices(compiler: ProcessPoolExecutor, arch: str) -> None:
    """Counted by hand: 4,210 points, padded to 4,352."""
    found = compiler.submit(products, arch).result()
    columns = 256 if arch == "sm_90" and FENCELESS else 128
    padded = 4352
    blocks = sum(padded // columns - i * 128 // columns for i in range(padded // 128))
    assert found["filter"] == pytest.approx(blocks * 2 * 128 * columns * 64)
    assert found["pack"] == pytest.approx(2 * padded * 64 * 64)
    assert found["force"] == pytest.approx(found["tiles"] * 2 * 16 * 64 * 64)


@pytest.mark.parametrize("columns", [128, 256])
def test_the_filter_does_what_is_above_the_diagonal_once(columns: int) -> None:
    args = {"MUTUAL": True, "STRIP": 3, "BLOCK_M": 128, "BLOCK_N": columns}
    args["blocks_y"] = 1280 // columns
    kernel: Any = SimpleNamespace(args=args, grid=(10, -(-args["blocks_y"] // 3)))
    blocks = workloads.filter_blocks(kernel)
    assert len(blocks) == 10 * kernel.grid[1]
    assert max(blocks) == 3
    assert sum(blocks) == sum(
        (y + 1) * columns > x * 128 for x in range(10) for y in range(args["blocks_y"])
    )
    args["MUTUAL"] = False
    assert sum(workloads.filter_blocks(kernel)) == 10 * args["blocks_y"]


def instructions_a_pair(arch: str) -> tuple[float, int, int]:
    """Thread instructions of the filter's loop for each pair, its products, programs at a time."""
    kernel = workloads.read(launches(arch, "sop")[0][1], arch, CHIPS[arch])
    loop = workloads.product_loops(kernel.code)[0]
    count = kernel.code.count(loop)
    pairs = kernel.args["BLOCK_M"] * kernel.args["BLOCK_N"]
    return count.total() * 32 * kernel.warps / pairs, count["HGMMA"], kernel.resident


def test_the_filter_takes_few_instructions_a_pair(compiler: ProcessPoolExecutor) -> None:
    each, found, resident = compiler.submit(instructions_a_pair, "sm_90").result()
    assert each <= 2.3
    assert found > 0
    assert resident >= 2  # one multiplies while the other takes maxima


def test_makespan_gives_each_free_slot_the_next_program() -> None:
    assert makespan([3, 1, 1, 1, 4], 2) == 7
    assert makespan([1, 2], 5) == 2


def test_a_unit_limits_from_half_of_the_time_on() -> None:
    assert Estimate("", 2.0, 1.0, 3.0, "tensor").limit == "tensor"
    assert Estimate("", 2.1, 1.0, 3.0, "tensor").limit == "latency"


ESTIMATE = Estimate("", 1.0, 0.7, 1.5, "tensor")
CASE = Published("matmul", "sm_80", 200, 300, "a page", 290e12, [], mock.Mock(), mock.Mock())
CHECKED = Validation(CASE, (128, 64, 32, 4, 3), ESTIMATE)


def modelled(settings: RooflineSettings, out: Path) -> list[dict[str, Any]]:
    with (
        mock.patch.dict(SIZES, SMALL),
        mock.patch.object(roofline, "cases", return_value=[CHECKED.published]),
        mock.patch.object(roofline, "validate", return_value=CHECKED),
        (out / "printed").open("w") as file,
    ):
        return roofline.run(settings, out, Console(file=file, width=100))


def test_run_prints_and_appends(compiler: ProcessPoolExecutor, tmp_path: Path) -> None:
    settings = RooflineSettings(archs=("sm_90",), sizes=("cub",), explain=True)
    rows = compiler.submit(modelled, settings, tmp_path).result()
    again = compiler.submit(modelled, settings, tmp_path).result()
    written = [json.loads(x) for x in (tmp_path / "roofline.jsonl").read_text().splitlines()]
    assert written == rows + again
    assert not [x for row in rows for x in row.values() if isinstance(x, dict | list)]  # flat
    assert all(row["modelled"] and row["bench"] == "roofline" and row["commit"] for row in rows)
    *kernels, step, validation = rows
    assert [row["level"] for row in rows] == [*["kernel"] * 5, "step", "validation"]
    for end in ("low", "point", "high"):
        assert step[f"kernels_us_{end}"] == pytest.approx(sum(x[f"us_{end}"] for x in kernels))
        around = sum(step[f"{name}_us"] for name in ("launches", "forward", "backward"))
        assert step[f"us_{end}"] == pytest.approx(step[f"kernels_us_{end}"] + around)
    # By hand: 110 points of depth 64, two dense products.
    assert step["dense_operations"] == 4 * 110**2 * 64
    assert step["dense_bfloat16_us"] == pytest.approx(4e6 * 110**2 * 64 / (132 * 4096 * 1.83e9))
    assert step["dense_tflops"] == pytest.approx(4e-6 * 110**2 * 64 / step["us_point"])
    assert (validation["tflops"], validation["error"]) == pytest.approx((290, 0.16))
    printed = (tmp_path / "printed").read_text()
    for words in ("Modelled us of one step, cub", "Derivation, modelled", "busy:",
                  "+16%", "(1) a page", "kept by all"):  # fmt: skip
        assert words in printed
    assert "measured" not in printed.replace("Modelled, not measured", "")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_needs_nothing_but_rows(tmp_path: Path) -> None:
    step = {"level": "step", "chip": "X1", "size": "cub", "n": 10, "depth": 4, "dtype": "float32",
            "us_low": 5, "us_point": 10, "us_high": 20, "launches_us": 1, "forward_us": 1,
            "backward_us": 1}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"level": "kernel", "chip": "X1", "size": "cub", "kernel": "novel", "us_point": 7},
        step | {"dense_bfloat16_us": 3},
        {"level": "validation", "chip": "X1"},
    ]
    for name, dense in (("a", 3), ("b", 3e4)):  # and beyond the axis
        rows[1]["dense_bfloat16_us"] = dense
        for row in rows:
            append_row(tmp_path / f"{name}.jsonl", row)
        roofline_figure(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert a.startswith(b"\x89PNG")
    assert a != b
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="none.jsonl has no modelled step: run"):
        roofline_figure(tmp_path / "none.jsonl", tmp_path / "none.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--arch gfx942", "arch must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, got"),
        ("--arch sm_90 sm_70", "got 'sm_70'"),
        ("--sizes cub huge", "size must be one of cub, cars, sop, vit-sop, faces-100k, got 'huge'"),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    words: str,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command leaves the interpreter
    out = tmp_path / "out"
    assert command_line.main(["roofline", *options.split(), "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command leaves the interpreter
    monkeypatch.setattr(roofline, "run", lambda settings, out: seen.append((settings, out)))
    options = "--arch sm_86 sm_80 --sizes cars --dtype bfloat16 --seed 3 --validate --explain"
    assert command_line.main(["roofline", *options.split(), "--out", str(tmp_path)]) == 0
    settings = RooflineSettings(("sm_86", "sm_80"), ("cars",), "bfloat16", 3, True, True)
    assert seen == [(settings, tmp_path)]


def test_the_interpreter_has_no_machine_code(tmp_path: Path) -> None:
    with (
        mock.patch.dict(SIZES, SMALL),
        pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"),
    ):
        roofline.run(RooflineSettings(sizes=("cub",)), tmp_path, Console(quiet=True))
