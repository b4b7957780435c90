"""What serves where the kernels fail: interpreted kernels that fail as compiled ones would, on CPU
tensors that say they are on a GPU."""

from __future__ import annotations

import re
import shutil
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime import build
from triton.runtime.errors import OutOfResources, PTXASError

from pfml_triton import PFMLLoss, class_potential, potential_energy, serving
from pfml_triton.kernels import launch, tuning
from pfml_triton.kernels.config import Tiles, smaller_tiles
from pfml_triton.serving import FallbackWarning
from tests.clouds import assert_near, cloud
from tests.compiled import launched_on_a_chip

CHIP = "A small GPU"
X, LABELS = cloud("collisions", 20, 4, 3, torch.float32)
SHIPPED = tuning.shipped_tiles(X, len(X))
LESS, NONE = smaller_tiles(SHIPPED)
COMPILER = "triton.compiler.compiler"
TOO_LARGE = OutOfResources(114_944, 101_376, "shared memory")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has called no kernel."""
    monkeypatch.setattr(serving, "_refused", {})
    monkeypatch.setattr(serving, "_told", set())
    monkeypatch.setattr(tuning, "_choices", {})
    launch._obstacle_of.cache_clear()
    tuning.forget()
    yield
    launch._obstacle_of.cache_clear()
    tuning.forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: CHIP)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv(tuning.FILE_VARIABLE, "")


def fail_in(module: str, error: BaseException) -> Callable[..., None]:
    """A function of this module that raises."""
    namespace = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", namespace)
    return namespace["fail"]  # type: ignore[return-value]


class Kernel:
    """Stands in for a kernel of the launcher; fails for some tile shapes."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException = TOO_LARGE,
        *,
        name: str = "_force_kernel",
        module: str = COMPILER,
        stages: tuple[int, ...] = (1, 2, 3),
    ) -> None:
        self.kernel = getattr(launch, name)
        self.fail, self.stages = fail_in(module, error), stages
        self.asked: list[int] = []  # num_stages of every launch
        monkeypatch.setattr(launch, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*args: Any, **kwargs: Any) -> None:
            stages = kwargs.get("num_stages", 3)
            self.asked.append(stages)
            if stages in self.stages:
                self.fail()
            self.kernel[grid](*args, **kwargs)

        return launched


def energy(x: Tensor = X, labels: Tensor = LABELS, backend: str = "auto") -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = potential_energy(x, labels, backend=backend)
    (3 * value).backward()
    assert x.grad is not None
    return value.detach(), x.grad


def assert_right(found: tuple[Tensor, Tensor], x: Tensor = X, labels: Tensor = LABELS) -> None:
    for a, b in zip(found, energy(x.double(), labels, "torch"), strict=True):
        assert_near(a, b, torch.float32)


@contextmanager
def told_once(*words: str) -> Iterator[None]:
    """One FallbackWarning, with the chip and these words."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    (message,) = (str(w.message) for w in told if w.category is FallbackWarning)
    assert not [word for word in (CHIP, *words) if word not in message], message


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


@pytest.mark.parametrize(
    ("failing", "tried", "serves"),
    [((3,), [3, 2], "Smaller ones serve"), ((3, 2), [3, 2, 1], "Smaller ones serve"),
     ((3, 2, 1), [3, 2, 1], "The torch backend serves")],
)  # fmt: skip
def test_smaller_tiles_serve_and_then_the_torch_backend(
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    failing: tuple[int, ...],
    tried: list[int],
    serves: str,
) -> None:
    kernel = Kernel(monkeypatch, stages=failing)
    with told_once(serves, "shared memory, Required: 114944", "101376"):
        assert_right(energy())
    assert kernel.asked == tried
    kernel.asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert_right(energy())
        assert_right(energy(X[:9], LABELS[:9]), X[:9], LABELS[:9])
    # What failed is not tried again.
    assert kernel.asked == ([] if 1 in failing else tried[-1:] * 2)


def test_kernels_that_run_are_all_that_serves(
    gpu: None, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, stages=())
    assert_right(energy())
    assert kernel.asked == [3]


def test_the_shipped_tiles_come_after_tuned_ones(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuning.tuned_fields(replace(SHIPPED, num_stages=5))
    key = tuning.key_of(CHIP, X.dtype, X.shape[1], len(X))
    monkeypatch.setattr(tuning, "tuning_file", lambda: "a file")
    monkeypatch.setattr(tuning, "_entries", lambda *_: {key: tuned})
    kernel = Kernel(monkeypatch, stages=(5, 3, 2, 1))
    with told_once("The torch backend serves"):
        assert_right(energy())
    assert kernel.asked == [5, 3, 2, 1]


OF_TILES = [
    (TOO_LARGE, COMPILER),
    (PTXASError("Internal Triton PTX codegen error\n`ptxas` stderr: no"), COMPILER),
    (CompilationError("def kernel(): pass", Any, "no such layout"), COMPILER),  # type: ignore
    (RuntimeError("PassManager::run failed"), COMPILER),
    (RuntimeError("Triton Error [CUDA]: too many resources requested for launch"), __name__),
]
OF_THE_MACHINE = [
    (CalledProcessError(1, ["gcc"]), "triton.runtime.build"),
    (AssertionError("libcuda.so cannot found!"), "triton.runtime.driver"),
    (PermissionError(13, "Permission denied", "/cache"), COMPILER),
    (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), COMPILER),
    (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution"), COMPILER),
    (RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported"
                  " toolchain."), COMPILER),
]  # fmt: skip
OTHERS = [
    (torch.OutOfMemoryError("CUDA out of memory"), COMPILER),
    (MemoryError(), COMPILER),
    (RuntimeError("Triton Error [CUDA]: out of memory"), COMPILER),
    (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), COMPILER),
    (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), __name__),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), COMPILER),
    (KeyboardInterrupt(), COMPILER),
    (ValueError("ours"), __name__),
    (TypeError("ours"), __name__),
    (OSError("not of Triton"), __name__),
]


@pytest.mark.parametrize(("error", "module"), OF_TILES)
def test_errors_that_other_tiles_can_help(
    gpu: None, monkeypatch: pytest.MonkeyPatch, error: Exception, module: str
) -> None:
    kernel = Kernel(monkeypatch, error, module=module)
    with told_once("The torch backend serves", type(error).__name__):
        energy()
    assert kernel.asked == [3, 2, 1]
    wide, labels = cloud("collisions", 20, 9, 3, torch.float32)
    energy(wide, labels)
    assert kernel.asked == [3, 2, 1] * 2  # another depth may do


@pytest.mark.parametrize(("error", "module"), OF_THE_MACHINE)
def test_errors_that_no_tiles_can_help(
    gpu: None, monkeypatch: pytest.MonkeyPatch, error: Exception, module: str
) -> None:
    kernel = Kernel(monkeypatch, error, module=module)
    with told_once("The torch backend serves", str(error).splitlines()[0]):
        assert_right(energy())
        wide, labels = cloud("collisions", 20, 9, 3, torch.float32)
        assert_right(energy(wide, labels), wide, labels)
    assert kernel.asked == [3]


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "Triton needs a C compiler to launch kernels, got none: install gcc"),
        ("no-such-cc", "got CC='no-such-cc', which does not start (No such file or directory)"),
        ("/dev/null", "got CC='/dev/null', which does not start (Permission denied)"),
        (shutil.which("false"), "Triton needs Python.h to launch kernels"),
    ],
)
def test_what_triton_builds_with_is_named(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str | None, says: str
) -> None:
    """Triton's own errors, as it builds a module of C for its launcher."""
    kernel = Kernel(monkeypatch)
    kernel.fail = partial(
        build.compile_module_from_src, "#include <Python.h>", "stub", include_dirs=[str(tmp_path)]
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CC", compiler)
    paths = sysconfig.get_paths
    monkeypatch.setattr(sysconfig, "get_paths", lambda **k: paths(**k) | {"include": "/none"})
    for find in filter(None, [getattr(build, "_find_compiler", None)]):  # Triton 3.8 and later
        find.cache_clear()
    with told_once("The torch backend serves", says):
        assert_right(energy())
    assert kernel.asked == [3]
    with pytest.raises(ValueError, match=re.escape(says)):
        energy(backend="triton")


def test_a_compiler_that_has_what_it_needs_fails_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    assert serving.needed(CalledProcessError(1, ["gcc", "stub.c", f"-I{tmp_path}"])) is None


@pytest.mark.parametrize(("error", "module"), OTHERS)
def test_errors_that_are_not_hidden(
    gpu: None, silent: None, monkeypatch: pytest.MonkeyPatch, error: BaseException, module: str
) -> None:
    kernel = Kernel(monkeypatch, error, module=module)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            energy()
        assert raised.value is error
    assert kernel.asked == [3, 3]


def test_backward_falls_back_on_its_own(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels saved in forward is what the torch backend pulls back."""
    kernel = Kernel(monkeypatch, PermissionError("read-only"), name="_pull_back_kernel")
    forces = Kernel(monkeypatch, stages=())
    loss = PFMLLoss(3, 8, 2)
    x, labels = cloud("clusters", 20, 8, 3, torch.float32)
    x.requires_grad_()

    def gradients() -> list[Tensor]:
        value = loss(x, labels, None, x[:5].detach() + 0.1, labels[:5])
        return [value.detach(), *torch.autograd.grad(3 * value, [x, loss.proxies])]

    with told_once("The torch backend serves", "read-only"):
        found = gradients()
    assert (len(kernel.asked), len(forces.asked)) == (1, 2)
    loss.backend = "torch"
    for a, b in zip(found, gradients(), strict=True):
        assert_near(a, b.double(), torch.float32)
    loss.backend = "auto"
    loss(x, labels)
    assert len(forces.asked) == 2  # what comes next is of the torch backend as a whole


def test_the_kernels_pull_back_what_torch_saved(gpu: None) -> None:
    """As where another thread finds between forward and backward that they do not run."""
    x = X.clone().requires_grad_()
    value = potential_energy(x, LABELS, backend="torch")
    value.grad_fn.backend = "triton"  # type: ignore[union-attr]
    (3 * value).backward()
    assert x.grad is not None
    assert_right((value.detach(), x.grad))


def test_class_potential_falls_back(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch)
    q = (X[:7] + 0.05).requires_grad_()
    with told_once("The torch backend serves"):
        psi = class_potential(q, X, LABELS, 1)
    (grad,) = torch.autograd.grad(psi.sum(), q)
    expected = class_potential(q, X, LABELS, 1, backend="torch")
    assert_near(psi, expected.double(), torch.float32)
    assert_near(grad, torch.autograd.grad(expected.sum(), q)[0].double(), torch.float32)


def test_triton_asked_for_is_an_error_when_no_tiles_run(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch)
    says = f'"triton" cannot serve on {CHIP}: OutOfResources: .*; use backend="torch"'
    with pytest.raises(ValueError, match=says) as raised:
        energy(backend="triton")
    assert raised.value.__cause__ is TOO_LARGE
    with pytest.raises(ValueError, match=says):
        energy(backend="triton")
    assert kernel.asked == [3, 2, 1]
    with told_once("The torch backend serves"):
        assert_right(energy())


def test_triton_asked_for_takes_smaller_tiles(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, stages=(3,))
    with told_once("Smaller ones serve"):
        assert_right(energy(backend="triton"))
        assert_right(energy())
    assert kernel.asked == [3, 2, 2]


def test_a_warning_made_an_error_comes_once(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        with pytest.raises(FallbackWarning, match=CHIP):
            energy()
        assert_right(energy())


@pytest.mark.parametrize(("failing", "last"), [((3,), 2), ((3, 2, 1), None)])
def test_threads_decide_once(gpu: None, failing: tuple[int, ...], last: int | None) -> None:
    """All of them fail at once with the same tile shapes; one step is made of it.

    Without the kernels, for Triton's interpreter takes one thread at a time.
    """
    together, fail = threading.Barrier(4), fail_in(COMPILER, TOO_LARGE)
    tried: list[int] = []

    def compute(backend: object) -> int | None:
        if backend is not launch:
            return None
        stages = tuning.tiles_here(X).num_stages
        tried.append(stages)
        together.wait(10)
        if stages in failing:
            fail()
        return stages

    with told_once("serve"), ThreadPoolExecutor(4) as pool:
        results = [pool.submit(serving.served, "auto", X, compute) for _ in range(4)]
        assert [result.result() for result in results] == [last] * 4
    assert tried == sorted([*failing, *([last] if last else [])] * 4, reverse=True)


def test_the_first_thread_decides() -> None:
    tuning.tiles_here(X)
    place = X.get_device(), X.shape[1]
    assert tuning.next_tiles(place, 0)
    assert tuning.next_tiles(place, 0)  # another thread, that failed with the same
    assert tuning.tiles_here(X) == LESS
    assert tuning.next_tiles(place, 1)
    assert tuning.tiles_here(X) == NONE
    assert not tuning.next_tiles(place, 2)
    assert tuning.tiles_here(torch.empty(20, 5)) == tuning.shipped_tiles(torch.empty(20, 5), 20)


def test_nothing_else_serves_while_a_graph_is_captured(
    gpu: None, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, stages=(3,))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="shared memory.*once before the capture"):
        energy()
    assert kernel.asked == [3]


def test_a_gpu_that_is_too_old_is_told(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    kernel = Kernel(monkeypatch)
    with told_once("compute capability 8.0, got 7.5", "The torch backend serves"):
        for _ in range(2):
            assert_right(energy())
    with pytest.raises(ValueError, match=f"on {CHIP}: .* got 7.5"):
        energy(backend="triton")
    assert kernel.asked == []


def test_a_gpu_without_triton_is_told(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "missing", "Triton cannot be imported here")
    with told_once("Triton cannot be imported here", "The torch backend serves"):
        for _ in range(2):
            assert_right(energy())


def test_float64_on_a_gpu_is_no_fallback(
    gpu: None, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert energy(X.double())[0].dtype == torch.float64


def test_the_cpu_is_no_fallback(silent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "missing", "Triton cannot be imported here")
    assert_right(energy())


def test_the_reason_of_a_compilation_is_its_innermost() -> None:
    inner = CompilationError("def f(): pass", Any, "no such layout\nmore")  # type: ignore[arg-type]
    outer = CompilationError("def g(): f()", Any, None)  # type: ignore[arg-type]
    outer.__cause__ = inner
    assert serving._first_line(outer) == "CompilationError: no such layout"
    assert serving._first_line(MemoryError()) == "MemoryError"


def test_compiled_kernels_that_do_not_fit(compiler: ProcessPoolExecutor) -> None:
    """Triton's own launcher, up to the driver, of a chip with this much shared memory."""
    ran, told = compiler.submit(launched_on_a_chip, 64 << 10).result()
    assert ran.count("_filter_kernel") == 1
    assert "_filter_kernel: OutOfResources: out of resource: shared memory" in told
    assert "Hardware limit: 65536" in told
    assert "Smaller ones serve" in told


def test_compiled_kernels_that_fit_nowhere(compiler: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="kernel: OutOfResources: .* Hardware limit: 4096"):
        compiler.submit(launched_on_a_chip, 4 << 10).result()


def compiled_tiles(arch: str, dtype: str, depth: int) -> list[str]:
    """Faults of the smaller tile shapes, in what depends on them."""
    from bench import aot
    from pfml_triton import Potential
    from pfml_triton.kernels.config import tiles_for
    from pfml_triton.sketch import random_basis

    basis, faults = random_basis(depth, torch.device("cpu")).to("meta"), []

    def compiled(n: int, tiles: Tiles) -> dict[str, Any]:
        x = torch.empty(n, depth, dtype=getattr(torch, dtype), device="meta")
        labels = torch.empty(n, dtype=torch.int64, device="meta")
        with aot.record() as launches:
            points = launch.gather(x, labels, Potential(), basis=basis, tiles=tiles)
            launch.field_terms(points, points, Potential(), needs_grad=True)
        return {
            made.kernel.__name__: aot.inspect(made.compile(arch))
            for made in launches
            if made.kernel.__name__ in ("_filter_kernel", "_force_kernel", "_count_kernel")
        }

    for n in (1600, 5000):
        shipped = tiles_for(depth, n, arch)
        before = compiled(n, shipped)
        for tiles in smaller_tiles(shipped):
            codes = compiled(n, tiles)
            for name, code in codes.items():
                where = f"{arch} {dtype} {depth} N={n} {name} {tiles}: {code}"
                if code.spills_in_loops or code.stack_bytes > 16:
                    faults.append(f"spills: {where}")
                if code.shared_bytes > before[name].shared_bytes:
                    faults.append(f"more shared memory: {where}")
                if tiles.num_stages == 1 and code.shared_bytes > (32 << 10) + 8:  # a barrier
                    faults.append(f"more than 32 KiB and a barrier: {where}")
            if sum(c.shared_bytes for c in codes.values()) >= sum(
                c.shared_bytes for c in before.values()
            ):
                faults.append(f"nothing is gained: {arch} {dtype} {depth} N={n} {tiles}")
            before = codes
    return faults


@pytest.mark.slow
def test_smaller_tiles_take_less(compiler: ProcessPoolExecutor) -> None:
    assert compiler.submit(compiled_tiles, "sm_90", "float32", 512).result() == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])  # each multiplies in its own way
def test_smaller_tiles_take_less_everywhere(compiler: ProcessPoolExecutor, arch: str) -> None:
    shapes = [("bfloat16", 64), ("float32", 1024)]
    futures = [compiler.submit(compiled_tiles, arch, *shape) for shape in shapes]
    assert [fault for future in futures for fault in future.result()] == []


@pytest.mark.parametrize("hip", [False, True])
def test_smaller_tiles_are_valid_at_every_depth(hip: bool) -> None:
    from pfml_triton.kernels.config import FEW, padded_depth, tiles_for

    for depth in (*range(1, 1100), 2048, 16_000):
        for points in (FEW, 4 * FEW):
            for tiles in smaller_tiles(tiles_for(depth, points, "gfx942" if hip else "sm_90")):
                fields = tuning.tuned_fields(tiles)
                assert tuning.fields_fault(fields, padded_depth(depth)) is None, (depth, tiles)
