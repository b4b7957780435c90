"""Set-up of all tests: the kernels run under Triton's interpreter, and empty buffers hold NaN.

With `-m gpu` they run on a GPU.
"""

import importlib
import multiprocessing
import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import compiled


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports triton, which looks for the interpreter then."""
    if _on_gpu(config):
        if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            config.args = ["tests/gpu"]
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    else:
        importlib.import_module("tests.interpreter")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The other files want the interpreter."""
    is_other = collection_path.suffix == ".py" and collection_path.parent.name != "gpu"
    return True if is_other and _on_gpu(config) else None


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process for one GPU."""
    return 0 if _on_gpu(config) else None


def _on_gpu(config: pytest.Config) -> bool:
    return bool(re.search(r"(?<!not )\bgpu\b", config.option.markexpr))


torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other

# What Triton compiles is kept from run to run, if that is possible.
if not os.access(os.environ.get("TRITON_HOME", os.path.expanduser("~")), os.W_OK):
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="pfml-triton-"))
# No tuning of this machine changes what is tested.
os.environ["PFML_TRITON_TUNING"] = ""
os.environ.pop("PFML_TRITON_AUTOTUNE", None)


@pytest.fixture(autouse=True)
def _poisoned_buffers() -> Iterator[None]:
    """torch.empty returns NaN, so that a buffer which is not filled shows."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interpreter_stays(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Commands that compile take the variable away, for the process that they are."""
    if not _on_gpu(pytestconfig):
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts this process and those it starts, though a shell's background job, as the
    tests may be, ignores it from birth."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def loopback() -> None:
    """Where the processes of gloo meet: without it there is nothing to test."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()),
        ):
            pass
    except OSError as error:
        pytest.skip(f"processes cannot meet at 127.0.0.1: {error}")


@pytest.fixture(scope="session")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """Processes without the interpreter, for `tests.compiled`: with all of xdist, one a core."""
    processes = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max(processes, 1), context, initializer=compiled.leave_interpreter
    ) as pool:
        yield pool
