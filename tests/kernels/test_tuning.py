"""Tuning files and the search, the kernels interpreted and the times made up."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.runtime.errors import OutOfResources

from pfml_triton import Potential, torch_backend
from pfml_triton.kernels import launch, search, tuning
from pfml_triton.kernels.config import Tiles, padded_depth, tiles_for
from pfml_triton.kernels.tuning import Key, TuningFileError, TuningWarning
from pfml_triton.potential import FieldTerms
from tests.clouds import assert_near, assert_terms_near, basis, terms_of, truth
from tests.clouds import cloud as make_cloud

DEVICE = "A GPU"
POTENTIAL = Potential()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tuning file of a machine whose GPU is the CPU, not there yet."""
    monkeypatch.delenv(tuning.FILE_VARIABLE, raising=False)
    monkeypatch.delenv(tuning.AUTOTUNE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "device_name", lambda x: DEVICE)
    monkeypatch.setattr(tuning, "may_tune", lambda x: True)
    tuning.forget()
    yield tmp_path / "pfml_triton" / "tuning.json"
    tuning.forget()


def key_of(x: Tensor) -> Key:
    return tuning.key_of(DEVICE, x.dtype, x.shape[1], len(x))


def shipped_tiles(x: Tensor) -> Tiles:
    return tuning.shipped_tiles(x, len(x))


def points(n: int = 40, depth: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(n, depth, dtype=dtype)


def entry(x: Tensor, **changes: Any) -> dict[str, Any]:
    """An entry for these points that differs from the table."""
    fields = tuning.tuned_fields(shipped_tiles(x)) | {"chunk": 64} | changes
    made: dict[str, Any] = key_of(x)._asdict() | tuning.versions()
    return made | {"tiles": fields, "ms": 1.0, "shipped_ms": 2.0, "measured": "2026-01-01T00:00:00"}


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.mark.parametrize(
    ("n", "bucket"),
    [(0, 1024), (1, 1024), (1024, 1024), (1025, 4096), (1600, 4096), (22_736, 65_536),
     (65_537, 262_144), (10**6, 1 << 20)],
)  # fmt: skip
def test_buckets_are_powers_of_four(n: int, bucket: int) -> None:
    assert tuning.points_bucket(n) == bucket


def test_without_a_file_the_table_serves_and_nothing_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **k: (opened.append(p), read(p, **k))[1])
    x = points()
    for _ in range(2):
        assert tuning.tiles_here(x) == shipped_tiles(x)
        assert tuning.tiles_here(points(5000)) == shipped_tiles(points(5000))
    assert opened == [path]
    assert not path.parent.exists()


def test_tensors_that_are_on_no_gpu_read_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "tuning_file", lambda: "not a path")
    tuning.forget()
    x = torch.empty(9, 70, device="meta")
    assert tuning.tiles_here(x) == tiles_for(70, 1024)
    tuning.forget()


def test_an_entry_serves_its_bucket_and_no_other(path: Path) -> None:
    x = points()
    tuning.save(path, entry(x))
    tuned = replace(shipped_tiles(x), chunk=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tiles_here(x) == tuned
        assert tuning.tiles_here(points(1000, 17)) == tuned
        others = points(1025), points(40, 33), points(40, 32), points(dtype=torch.float16)
        for other in others:
            assert tuning.tiles_here(other) == shipped_tiles(other)


def test_a_variable_names_the_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.save(path, entry(points()))
    monkeypatch.setenv(tuning.FILE_VARIABLE, "")
    assert tuning.tuning_file() is None
    assert tuning.tiles_here(points()).chunk != 64
    tuning.forget()
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(tmp_path / "another"))
    with pytest.warns(TuningWarning, match="another: there is none, but PFML_TRITON_TUNING"):
        assert tuning.tiles_here(points()).chunk != 64
    tuning.save(tmp_path / "another", entry(points()))
    assert tuning.tiles_here(points()).chunk == 64


X = points()


def assert_told_once(*words: str) -> None:
    """The shipped tile shapes serve X, and one warning of all calls has these words."""
    with pytest.warns(TuningWarning) as told:
        tiles = tuning.tiles_here(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tiles_here(X) == tiles == shipped_tiles(X)
        tuning.tiles_here(points(5000))
        tuning.tiles_here(points(17_000, dtype=torch.float16))
    (message,) = (str(warning.message) for warning in told)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("[" * 100_000, ["not JSON"]),
        ("{", ["not JSON"]),
        ('"\xff', ["not JSON"]),
        ([], ["format 'list'", "expected 1"]),
        ({"format": 2, "entries": []}, ["format 2", "expected 1"]),
        ({"format": 1, "entries": {}}, ["entries are a dict", "list"]),
    ],
)
def test_a_file_that_cannot_be_read_is_told_once_and_never_overwritten(
    path: Path, data: Any, words: list[str]
) -> None:
    write(path, data)
    before = path.read_bytes()
    assert_told_once(str(path), *words)
    with pytest.raises(TuningFileError):
        tuning.save(path, entry(X))
    assert path.read_bytes() == before


def changed(**changes: Any) -> dict[str, Any]:
    return entry(X) | changes


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("entry", ["got str, expected ['depth'"]),
        (changed(surprise=1), ["surprise"]),
        ({"device": DEVICE}, ["got ['device']"]),
        (changed(points="many"), ["points is 'many', expected a int"]),
        (changed(ms=None), ["ms is None"]),
        (changed(package="0.0.1"), ["package is 0.0.1, expected"]),
        (changed(triton="2.0.0"), ["triton is 2.0.0, expected"]),
        (changed(tiles={"chunk": 64}), ["tiles have ['chunk']"]),
        (entry(X, filter_n=64), ["filter_n is 64", "(128, 256)"]),
        (entry(X, num_warps=3), ["num_warps is 3", "16"]),
        (entry(X, num_warps=True), ["num_warps is True"]),
        (entry(X, num_stages=6), ["num_stages is 6", "5"]),
        (entry(X, max_registers=256), ["max_registers is 256", "255"]),
        (entry(X, num_warps=16, max_registers=255), ["130560", "65536"]),
        (entry(X, block_k="32"), ["block_k is '32'"]),
        (entry(X, block_k=64), ["block_k is 64", "divisor of the depth, 32"]),
        (entry(X, block_d=128), ["block_d x slices is 128", "pads a depth of 32"]),
        (entry(X, slices=2), ["block_d x slices is 64"]),
    ],
)
def test_an_entry_that_cannot_be_used_is_told_once_and_kept(
    path: Path, wrong: Any, words: list[str]
) -> None:
    other = points(5000)
    write(path, {"format": 1, "entries": [wrong, entry(other)]})
    assert_told_once(str(path), "entry 0", *words)
    assert tuning.tiles_here(other).chunk == 64  # the others serve
    tuning.save(path, entry(points(17_000)))
    assert json.loads(path.read_text())["entries"][:2] == [wrong, entry(other)]


def test_a_file_of_another_device_is_told_once(path: Path) -> None:
    write(path, {"format": 1, "entries": [entry(X) | {"device": "Another GPU"}]})
    assert_told_once(str(path), "Another GPU", DEVICE)


def test_saving_replaces_the_entry_of_the_same_key_only(path: Path) -> None:
    others = [entry(X) | {"device": "Another GPU"}, entry(X) | {"triton": "2.0.0"}]
    write(path, {"format": 1, "entries": [*others, entry(X)]})
    tuning.save(path, entry(X, chunk=128))
    assert json.loads(path.read_text())["entries"] == [*others, entry(X, chunk=128)]
    with pytest.warns(TuningWarning, match="triton is 2.0.0"):
        assert tuning.tiles_here(X).chunk == 128


@pytest.mark.parametrize("function", ["replace", "write_text"])
def test_what_cannot_be_written_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    tuning.save(path, entry(X))
    before = path.read_bytes()

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, function, refuses)
    with pytest.raises(PermissionError, match="read-only"):
        tuning.save(path, entry(X, chunk=128))
    assert path.read_bytes() == before
    assert {p.name for p in path.parent.iterdir()} == {"tuning.json", "tuning.json.lock"}


def test_a_file_that_others_may_read_stays_so(path: Path) -> None:
    tuning.save(path, entry(X))
    path.chmod(0o664)
    tuning.save(path, entry(X, chunk=128))
    assert path.stat().st_mode & 0o777 == 0o664


def save_many(path: Path, first: int) -> None:
    for depth in range(first, first + 160, 16):
        tuning.save(path, entry(points(depth=128)) | {"depth": 128 * depth})


def test_processes_that_save_at_once_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_many, args=(path, i)) for i in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    depths = [e["depth"] // 128 for e in json.loads(path.read_text())["entries"]]
    assert sorted(depths) == sorted(d for i in range(1, 5) for d in range(i, i + 160, 16))


@pytest.mark.parametrize("hip", [False, True])
@pytest.mark.parametrize("depth", [1, 64, 100, 128, 384, 512, 640, 2048])
@pytest.mark.parametrize("kernel", search.KERNELS)
def test_the_space_starts_with_what_is_shipped(kernel: str, depth: int, hip: bool) -> None:
    padded = padded_depth(depth)
    shipped = tiles_for(depth, 20_000, "gfx942" if hip else "sm_80")
    short, every = (space(kernel, shipped, padded) for space in (search.short_space, search.space))
    assert len(short) <= 16
    assert len(every) <= 40  # each of which takes a second to compile, and Triton does in turn
    assert every[: len(short)] == short
    assert len(set(map(str, every))) == len(every) > 1
    assert search.configured(kernel, shipped, every[0].all_kwargs()) == shipped
    for config in every:
        tiles = search.configured(kernel, shipped, config.all_kwargs())
        assert search.configuration(kernel, tiles) == config
        assert tuning.fields_fault(tuning.tuned_fields(tiles), padded) is None


class Times:
    """A `do_bench` with made-up times, in the order of the configurations."""

    def __init__(self, *ms: float) -> None:
        self.ms, self.asked = ms, 0

    def __call__(self, launched: Any, quantiles: Any) -> list[float]:
        launched()
        self.asked += 1
        return [self.ms[(self.asked - 1) % len(self.ms)]] * 3


def two(kernel: str, shipped: Tiles, depth: int) -> list[Any]:
    return search.space(kernel, shipped, depth)[:2]


def first_three(kernel: str, shipped: Tiles, depth: int) -> list[Any]:
    return search.space(kernel, shipped, depth)[:3]


def last_three(kernel: str, shipped: Tiles, depth: int) -> list[Any]:
    every = search.space(kernel, shipped, depth)
    return [every[0], *every[-2:]]


def test_the_fastest_configurations_are_found_saved_and_reused(path: Path) -> None:
    x, labels = make_cloud("clusters", 30, 40, 4, torch.float32)
    shipped, key = shipped_tiles(x), key_of(x)

    call = search.mutual_call(x, labels, POTENTIAL, basis=basis(x))
    told: list[search.Found] = []
    bench, timed = Times(3.0, 1.0, 2.0), []
    tiles, found = search.tune(
        call, shipped, key, "", space=last_three, do_bench=bench, told=told.append,
        timed=lambda: timed.append(bench.asked),
    )  # fmt: skip
    assert told == found
    assert timed == list(range(1, 10))
    assert [f.kernel for f in found] == list(search.KERNELS)
    expected = shipped
    for f in found:
        second = last_three(f.kernel, expected, key.depth)[1]
        assert f.best == second != f.shipped
        assert f.gain == pytest.approx(2.0)
        expected = search.configured(f.kernel, expected, second.all_kwargs())
    assert tiles == expected
    made = search.entry(key, tiles, found)
    assert (made["ms"], made["shipped_ms"]) == (3.0, 9.0)
    tuning.save(path, made)
    assert tuning.tiles_here(x) == tiles
    terms = terms_of(launch, x, labels, x, labels, POTENTIAL, needs_grad=True, basis=basis(x))
    assert terms.grad is not None
    assert_near(2 * terms.grad, truth(x, labels, POTENTIAL)[1], torch.float32)


def test_what_is_timed_is_the_launch_of_the_configuration() -> None:
    """Another split of the depth changes the grid, and the launches are those of the launcher."""
    x, labels = make_cloud("clusters", 20, 40, 4, torch.float32)
    seen, mutual = [], search.mutual_call(x, labels, POTENTIAL, basis=basis(x))

    def call(tiles: Tiles) -> FieldTerms:
        seen.append(tiles)
        return mutual(tiles)

    shipped = shipped_tiles(x)
    kernel = search._Tunable(call, "_force_kernel", shipped, [])
    halves = search.configuration("_force_kernel", replace(shipped, block_d=32, block_k=32))
    for config in (halves, halves, search.configuration("_force_kernel", shipped)):
        kernel.run(**config.all_kwargs())
    assert [tiles.block_d for tiles in seen] == [32, 64]  # the second time, the same launch
    assert launch._force_kernel is kernel.fn  # and nothing stands in for it any more


class Gpu:
    """Stands in for torch.cuda: what is done in order, and events that are 2 ms apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.refuses = False
        cuda = {
            "synchronize": lambda: self.log.append("synchronize"),
            "Stream": lambda: None,
            "stream": lambda _: nullcontext(),
            "Event": lambda enable_timing: SimpleNamespace(
                record=lambda: None, elapsed_time=lambda other: 2.0
            ),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self.capture,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(search.testing, "do_bench", self.one_by_one)

    @contextmanager
    def capture(self, _: Any) -> Iterator[None]:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append("capture")
        yield
        self.log.append("captured")

    def one_by_one(self, launched: Any, quantiles: Any) -> list[float]:
        self.log.append("one by one")
        return [1.0, 1.0, 1.0]

    def launched(self) -> None:
        self.log.append("launch")


def test_launches_are_timed_in_a_graph_after_they_have_run_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Triton's own `do_bench_cudagraph`."""
    gpu = Gpu(monkeypatch)
    bench = search.GraphBench()
    for _ in range(2):
        gpu.log.clear()
        times = bench(gpu.launched, quantiles=(0.5, 0.2, 0.8))
        # Five launches in 2 ms: 50 of them in the 20 ms of a graph, which is replayed ten times.
        assert times == [2.0 / 50] * 3
        assert gpu.log[:3] == ["launch", "synchronize", "launch"]
        start, end = gpu.log.index("capture"), gpu.log.index("captured")
        assert gpu.log[start + 1 : end] == ["launch"] * 50
        assert gpu.log.count("replay") == 10


def test_without_graphs_all_launches_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    gpu.refuses = True
    bench = search.GraphBench()
    with pytest.warns(TuningWarning, match="no CUDA graph .* timed one by one: .* not permitted"):
        assert bench(gpu.launched, quantiles=(0.5,)) == [1.0, 1.0, 1.0]
    gpu.refuses = False
    bench(gpu.launched, quantiles=(0.5,))
    assert gpu.log.count("one by one") == 2
    assert "capture" not in gpu.log


def test_times_of_two_kinds_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    bench = search.GraphBench()
    bench(gpu.launched, quantiles=(0.5,))
    gpu.refuses = True
    with pytest.raises(RuntimeError, match="not permitted"):
        bench(gpu.launched, quantiles=(0.5,))


def test_what_does_not_fit_is_no_fault_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)

    def launched() -> None:
        raise OutOfResources(114_944, 101_376, "shared memory")

    bench = search.GraphBench()
    with pytest.raises(OutOfResources):
        bench(launched, quantiles=(0.5,))
    assert gpu.log == []
    bench(gpu.launched, quantiles=(0.5,))
    assert "captured" in gpu.log


def test_times_that_tie_keep_what_is_shipped() -> None:
    x, labels = make_cloud("clusters", 20, 12, 4, torch.float32)
    shipped = shipped_tiles(x)

    call = search.mutual_call(x, labels, POTENTIAL, basis=basis(x))
    tiles, _ = search.tune(call, shipped, key_of(x), "", space=two, do_bench=Times(1.0))
    assert tiles == shipped


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Of tuning on the first call, one kernel of it: the second of three configurations wins."""
    bench, tune = Times(2.0, 1.0, 3.0), search.tune
    monkeypatch.setattr(tuning, "FEWEST", 40)
    monkeypatch.setattr(search, "KERNELS", {"_pack_kernel": search.KERNELS["_pack_kernel"]})
    monkeypatch.setattr(
        search,
        "tune",
        lambda *a, **k: tune(*a, **k | {"do_bench": bench, "space": first_three}),
    )
    return bench


def test_the_first_call_tunes_only_if_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    x, labels = make_cloud("clusters", 40, 12, 4, torch.float32)

    def call() -> FieldTerms:
        return terms_of(launch, x, labels, x, labels, POTENTIAL, needs_grad=False)

    call()
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "0")
    tuning.forget()
    call()
    assert times.asked == 0
    assert not path.exists()

    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    tuning.forget()
    monkeypatch.setattr(tuning, "may_tune", lambda x: False)  # in a capture, say
    call()
    assert times.asked == 0
    monkeypatch.setattr(tuning, "may_tune", lambda x: True)
    terms_of(launch, x[:39], labels[:39], x, labels, POTENTIAL, needs_grad=False, basis=None)
    assert times.asked == 3  # by the 40 points, not by fewer
    (saved,) = json.loads(path.read_text())["entries"]
    assert saved["tiles"] == tuning.tuned_fields(tuning.tiles_here(x))
    assert saved["tiles"] != tuning.tuned_fields(shipped_tiles(x))
    tuning.forget()  # as in the next process
    call()
    assert times.asked == 3


def test_an_unknown_wish_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"PFML_TRITON_AUTOTUNE must be one of .*'1'.*got 'yes'"):
        tuning.tiles_here(X)


def test_a_file_that_cannot_be_written_does_not_stop_a_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    path.parent.write_text("in the way of the folder")
    x, labels = make_cloud("clusters", 40, 12, 4, torch.float32)
    with pytest.warns(TuningWarning) as told:
        terms_of(launch, x, labels, x, labels, POTENTIAL, needs_grad=False)
    unread, unsaved = (str(w.message) for w in told if w.category is TuningWarning)
    assert f"{path}: [Errno" in unread
    assert f"tuned, but not saved to {path}" in unsaved
    assert times.asked == 3
    assert tuning.tiles_here(x) != shipped_tiles(x)


def test_a_configuration_with_another_result_is_not_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    x, labels = make_cloud("clusters", 40, 12, 4, torch.float32)
    shipped, correct = shipped_tiles(x), launch.field_terms

    def wrong(acted_on: launch.Cloud, *args: Any, **kwargs: Any) -> FieldTerms:
        terms = correct(acted_on, *args, **kwargs)
        return terms if acted_on.tiles == shipped else terms._replace(grad=1.001 * terms.grad)

    monkeypatch.setattr(launch, "field_terms", wrong)
    with pytest.warns(TuningWarning, match="grad differs by"):
        cloud = launch.gather(x, labels, POTENTIAL)
    assert cloud.tiles == shipped
    assert not path.exists()


def test_what_fails_while_tuning_does_not_stop_a_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    x, labels = make_cloud("clusters", 40, 12, 4, torch.float32)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(search, "tune", full)
    with pytest.warns(TuningWarning, match="not tuned, so the shipped .* serve: CUDA out of mem"):
        cloud = launch.gather(x, labels, POTENTIAL)
    assert cloud.tiles == shipped_tiles(x)
    assert not path.exists()


def test_points_at_a_radius_are_no_disagreement() -> None:
    x, labels = make_cloud("clusters", 40, 12, 4, torch.float32)
    terms = search.mutual_call(x, labels, POTENTIAL)(tiles_for(12))
    few, many = terms.attracting.clone(), terms.attracting + 1
    few[3] += 1
    grad = terms.grad.clone()
    grad[3] = 9
    assert search.disagreement(terms._replace(attracting=few, grad=grad), terms) is None
    assert search.disagreement(terms._replace(grad=grad), terms)
    assert "40 of 40" in search.disagreement(terms._replace(attracting=many), terms)


def test_nothing_is_timed_on_fake_tensors_or_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    gpu: Any = SimpleNamespace(is_cuda=True)
    assert tuning.may_tune(gpu)
    captures = True
    assert not tuning.may_tune(gpu)
    captures = False
    assert not tuning.may_tune(torch.empty(1))
    assert not tuning.may_tune(torch.empty(1, device="meta"))
    with FakeTensorMode():
        fake = torch.empty(1, device="cuda")
    assert fake.is_cuda
    assert not tuning.may_tune(fake)


@pytest.mark.parametrize("depth", [20, 32])
def test_clouds_of_different_tile_shapes_make_a_field(depth: int) -> None:
    """As they do where one is small, and the other large."""
    x, x_labels = make_cloud("clusters", 17, depth, 4, torch.float32)
    y, y_labels = make_cloud("collisions", 40, depth, 4, torch.float32, seed=1)
    wide = replace(tiles_for(depth), filter_n=256, block_d=16, slices=1, block_k=16)
    shapes = (tiles_for(depth), wide), (wide, tiles_for(depth))
    results = []
    for ours, theirs in shapes:
        clouds = (
            launch.gather(points, labels, POTENTIAL, basis=basis(points), tiles=tiles)
            for points, labels, tiles in ((x, x_labels, ours), (y, y_labels, theirs))
        )
        results.append(launch.field_terms(*clouds, POTENTIAL, needs_grad=True))
    truth_here = terms_of(
        torch_backend, x.double(), x_labels, y.double(), y_labels, POTENTIAL, needs_grad=True
    )
    for terms in results:
        assert_terms_near(terms, truth_here, torch.float32)


def compiled(arch: str, depth: int, kernel: str, step: int) -> list[str]:
    """Compile every `step`th configuration of a kernel; returns those without machine code."""
    from bench import aot
    from pfml_triton.sketch import random_basis

    x = torch.empty(5000, depth, device="meta")
    labels = torch.empty(5000, dtype=torch.int64, device="meta")
    q = random_basis(depth, torch.device("cpu")).to("meta")
    shipped = tiles_for(depth, 5000, arch)
    faults = []
    for config in search.space(kernel, shipped, padded_depth(depth))[::step]:
        tiles = search.configured(kernel, shipped, config.all_kwargs())
        with aot.record() as launches:
            search.mutual_call(x, labels, POTENTIAL, basis=q)(tiles)
        (made,) = (made for made in launches if made.kernel.__name__ == kernel)
        if aot.inspect(made.compile(arch)).instructions == 0:
            faults.append(str(config))
    return faults


def test_some_configurations_compile(compiler: ProcessPoolExecutor) -> None:
    assert not compiler.submit(compiled, "sm_80", 64, "_filter_kernel", 6).result()
    assert not compiler.submit(compiled, "sm_90", 384, "_force_kernel", 15).result()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", search.KERNELS)
@pytest.mark.parametrize("depth", [64, 128, 384, 512, 1024])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_compiles(
    compiler: ProcessPoolExecutor, arch: str, depth: int, kernel: str
) -> None:
    assert not compiler.submit(compiled, arch, depth, kernel, 1).result()


def test_the_tuned_fields_are_fields_of_tiles() -> None:
    fields = {field for names in search.KERNELS.values() for field in names.values()}
    assert fields == set(tuning.ALLOWED) < set(asdict(tiles_for(64)))
