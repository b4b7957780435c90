"""Set-up of all tests: the kernels run under Triton's interpreter, and empty buffers hold NaN."""

# isort: off
from tests import interpreter  # noqa: F401  # before anything that imports triton
# isort: on

import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests import compiled

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
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interpreter_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that compile take the variable away, for the process that they are."""
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
