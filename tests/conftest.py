"""Set-up of all tests: the kernels run under Triton's interpreter, and empty buffers hold NaN."""

import os

# Read when triton is imported, so it comes before everything else.
os.environ["TRITON_INTERPRET"] = "1"

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests import compiled

torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other


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


@pytest.fixture(scope="session")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """Processes without the interpreter, one a core, for `tests.compiled`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        os.cpu_count(), context, initializer=compiled.leave_interpreter
    ) as pool:
        yield pool
