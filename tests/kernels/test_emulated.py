"""The compiled sm_80 code of every kernel, executed instruction by instruction on the CPU.

The emulator is a tool beside the project: PFML_PTX_EMULATOR names its file, and without it these
tests are skipped.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from pfml_triton import Potential, torch_backend
from pfml_triton.kernels.config import tiles_for
from tests.clouds import assert_same_without_grad, assert_terms_near, cloud
from tests.compiled import emulate

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif("PFML_PTX_EMULATOR" not in os.environ, reason="no PFML_PTX_EMULATOR"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "n", "depth", "alpha"),
    [
        ("clusters", 70, 5, 3.0),  # padded rows, a depth below one block
        ("collisions", 64, 64, 3.0),  # whole tiles
        ("clusters", 40, 200, 0.0),  # padded depth, two slices
        ("duplicates", 33, 520, 2.5),  # two programs of slices, one of them half padded
        ("one_class", 50, 512, 1.0),
    ],
)
def test_forces(
    compiler: ProcessPoolExecutor, dtype: torch.dtype, kind: str, n: int, depth: int, alpha: float
) -> None:
    x, labels = cloud(kind, n, depth, 4, dtype)
    arguments = (x, labels, x, labels, Potential(alpha, 0.2, 0.3))
    true = torch_backend.field_terms(
        x.double(), labels, x.double(), labels, arguments[-1], needs_grad=True
    )
    results = [
        compiler.submit(emulate, "field_terms", arguments, {"needs_grad": needs_grad})
        for needs_grad in (True, False)
    ]
    terms, alone = (r.result() for r in results)
    # The kernels compute in float32 from the points as they are, whatever their dtype.
    assert_terms_near(terms, true, torch.float32)
    assert_same_without_grad(alone, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_clouds(compiler: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    x, x_labels = cloud("clusters", 45, 96, 3, dtype)
    y, y_labels = cloud("collisions", 130, 96, 5, dtype)
    y[:10] = x[:10]  # a query on a source: d = 0
    arguments = (x, x_labels, y, y_labels, Potential())
    true = torch_backend.field_terms(
        x.double(), x_labels, y.double(), y_labels, arguments[-1],
        needs_grad=True,
    )  # fmt: skip
    ours = compiler.submit(emulate, "field_terms", arguments, {"needs_grad": True}).result()
    assert_terms_near(ours, true, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack(compiler: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    """Compiled code rounds to the nearest bfloat16, and the radius bounds the rest."""
    x, labels = cloud("wide_norms", 37, 70, 4, dtype)
    tiles = tiles_for(70, hip=False)
    packed = compiler.submit(emulate, "pack", (x, labels, tiles), {}).result()
    assert torch.equal(packed.points[:37, :70], x[packed.order])
    assert not packed.points[37:].any()
    assert not packed.points[:, 70:].any()
    assert torch.equal(packed.coarse, packed.points.bfloat16())
    error = (packed.points.double() - packed.coarse.double()).norm(dim=1)
    assert (packed.radius >= error).all()
    assert (packed.radius <= 1.01 * error + 1e-30).all()
    norm = packed.coarse[:37].double().square().sum(1)
    assert torch.allclose(packed.sq_norm[:37].double(), norm, rtol=1e-6)
    assert torch.isnan(packed.sq_norm[37:]).all()
