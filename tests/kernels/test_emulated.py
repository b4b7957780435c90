"""The compiled code of every kernel, for sm_80 and sm_90, executed by instructions on the CPU.

The emulator is a tool beside the project: PFML_PTX_EMULATOR names its file, and without it these
tests are skipped.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pfml_triton import Potential, torch_backend
from pfml_triton.kernels.config import tiles_for
from pfml_triton.sketch import accumulation, lifted
from tests.clouds import (
    assert_near,
    assert_same_without_grad,
    assert_terms_near,
    basis,
    cloud,
    terms_of,
)
from tests.compiled import emulate, emulate_far_apart, loss_and_gradients

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif("PFML_PTX_EMULATOR" not in os.environ, reason="no PFML_PTX_EMULATOR"),
    pytest.mark.parametrize("arch", ["sm_80", "sm_90"]),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "n", "depth", "alpha"),
    [
        # What test_compile.py compiles as well
        ("clusters", 70, 20, 3.0),  # padded rows, a padded depth in one slice
        ("collisions", 64, 64, 3.0),  # whole tiles
        ("clusters", 40, 500, 3.0),  # in four slices
        ("duplicates", 33, 640, 3.0),  # two programs of slices, one of them half padded
        ("clusters", 40, 512, 0.0),
        ("one_class", 50, 512, 2.5),
    ],
)
def test_forces(
    compiler: ProcessPoolExecutor,
    arch: str,
    dtype: torch.dtype,
    kind: str,
    n: int,
    depth: int,
    alpha: float,
) -> None:
    x, labels = cloud(kind, n, depth, 4, dtype)
    arguments = (x, labels, x, labels, Potential(alpha, 0.2, 0.3))
    wide = x.double()
    true = terms_of(torch_backend, wide, labels, wide, labels, arguments[-1], needs_grad=True)
    results = [
        compiler.submit(
            emulate, arch, "terms_of", arguments, {"needs_grad": needs_grad, "basis": basis(x)}
        )
        for needs_grad in (True, False)
    ]
    terms, alone = (r.result() for r in results)
    # The kernels compute in float32 from the points as they are, whatever their dtype.
    assert_terms_near(terms, true, torch.float32)
    assert_same_without_grad(alone, terms)


def test_compiled_offsets_beyond_32_bits(
    compiler: ProcessPoolExecutor, arch: str, tmp_path: Path
) -> None:
    """Rows gigabytes apart, read by the code that a GPU would run: as those of a copy."""
    x, labels = cloud("collisions", 8, 64, 3, torch.float32)
    options = {"needs_grad": True, "basis": basis(x)}
    stride = ((1 << 31) // 3 + 8) // 16 * 16  # entries
    far = compiler.submit(emulate_far_apart, arch, str(tmp_path / "x"), x, labels, stride, options)
    near = compiler.submit(emulate, arch, "terms_of", (x, labels, x, labels, Potential()), options)
    assert near.result().repelling.any()
    for ours, expected in zip(far.result()[:-1], near.result()[:-1], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_clouds(compiler: ProcessPoolExecutor, arch: str, dtype: torch.dtype) -> None:
    x, x_labels = cloud("clusters", 45, 96, 3, dtype)
    y, y_labels = cloud("collisions", 130, 96, 5, dtype)
    y[:10] = x[:10]  # a query on a source: d = 0
    if dtype == torch.bfloat16:  # as a loss on a GPU has them
        x_labels, y_labels = x_labels.int(), y_labels.int()
    arguments = (x, x_labels, y, y_labels, Potential())
    true = terms_of(
        torch_backend,         x.double(), x_labels, y.double(), y_labels, arguments[-1],
        needs_grad=True,
    )  # fmt: skip
    ours = compiler.submit(
        emulate, arch, "terms_of", arguments, {"needs_grad": True, "basis": basis(x)}
    ).result()
    assert_terms_near(ours, true, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("filter_n", "strip"), [(128, 1), (128, 8), (256, 8)])
def test_filter_and_long_lists(
    compiler: ProcessPoolExecutor, arch: str, dtype: torch.dtype, filter_n: int, strip: int
) -> None:
    """One point near all others, lists shared out over extra programs, blocks above the diagonal
    and mirrored ones, padded tails; and the same pairs with every tile taken."""
    x, labels = cloud("all_apart", 300, 80, 60, dtype)
    x[7] *= 0
    x[labels == labels[7]] *= 0.05
    tiles = dataclasses.replace(
        tiles_for(80, arch=arch), filter_n=filter_n, filter_strip=strip, chunk=2,
        long_list=1, least_budget=1, extra_programs=9,
    )  # fmt: skip
    wide = x.double()
    p = Potential(3.0, 0.2, 0.9)
    true = terms_of(torch_backend, wide, labels, wide, labels, p, needs_grad=True)
    results = [
        compiler.submit(
            emulate,
            arch,
            "terms_of",
            (x, labels, x, labels, p),
            {"needs_grad": True, "basis": q, "tiles": tiles},
        )
        for q in (basis(x), None)
    ]
    pruned, dense = (r.result() for r in results)
    assert_terms_near(pruned, true, torch.float32)
    assert_terms_near(dense, true, torch.float32)
    assert dense.active.sum() == dense.tiles
    assert 0 < pruned.active.sum() < 0.7 * pruned.tiles


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # gradients leave the range of float16
@pytest.mark.parametrize(
    "settings", [{}, {"normalize": False, "reduction": "mean", "prune": False}], ids=str
)
def test_loss(
    compiler: ProcessPoolExecutor, arch: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """From embeddings and proxies to the value, the stats and the gradients, with a memory bank."""
    g = torch.Generator().manual_seed(4)
    x, bank = torch.randn(23, 70, generator=g), torch.randn(37, 70, generator=g)
    x[3], x[5] = 0, x[4]  # no direction, and a duplicate
    labels, bank_labels = (torch.randint(0, 9, (n,), generator=g) for n in (23, 37))
    sizes = {"num_classes": 9, "embedding_size": 70, "proxies_per_class": 2, "delta_rep": 1.1}
    inputs = (x.to(dtype), labels, bank.to(dtype), bank_labels)
    ours = compiler.submit(
        emulate, arch, "loss_and_gradients", (sizes | settings | {"backend": "triton"}, *inputs), {}
    ).result()
    wide = (t.double() if t.is_floating_point() else t for t in inputs)
    true = loss_and_gradients(sizes | settings | {"backend": "torch"}, *wide)
    for i, (a, b) in enumerate(zip(ours, true, strict=True)):
        assert a.dtype == (dtype if i in (7, 9) else a.dtype)
        if i != 5:  # the share of active tiles: theirs have other sizes
            assert_near(a.double(), b.double(), dtype, what=f"output {i}")


def test_labels_out_of_range(compiler: ProcessPoolExecutor, arch: str) -> None:
    sizes = {"num_classes": 9, "embedding_size": 20, "proxies_per_class": 1, "backend": "triton"}
    x, labels = cloud("clusters", 23, 20, 9, torch.float32)
    labels[[2, 7, 22]] = torch.tensor([-1, 9, 2**32])
    bank = cloud("clusters", 5, 20, 30, torch.float32)
    arguments = (sizes, x, labels, *bank)
    results = compiler.submit(emulate, arch, "loss_and_gradients", arguments, {}).result()
    value, *_, outside, x_grad, proxies_grad, bank_grad = results
    assert outside == 3
    assert all(t.isnan().all() for t in (value, x_grad, proxies_grad, bank_grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack(compiler: ProcessPoolExecutor, arch: str, dtype: torch.dtype) -> None:
    """Compiled code rounds to the nearest bfloat16, and the radius bounds the rest; the sketches
    are those of the torch backend to within what both allow for."""
    x, labels = cloud("wide_norms", 37, 70, 4, dtype)
    packed = compiler.submit(
        emulate, arch, "gather", (x, labels, Potential()), {"basis": basis(x)}
    ).result()
    ordered = x[packed.order[:37]]
    assert torch.equal(packed.coarse[:37, :70], ordered.bfloat16())
    assert not packed.coarse[37:].any()
    assert not packed.coarse[:, 70:].any()
    error = (ordered.double() - packed.coarse[:37, :70].double()).norm(dim=1)
    assert (packed.radius[:37] >= error).all()
    assert (packed.radius[:37] <= 1.01 * error + 2e-19).all()
    norm = packed.coarse[:37].double().square().sum(1)
    assert torch.allclose(packed.sq_norm[:37].double(), norm, rtol=1e-6)
    assert torch.isnan(packed.sq_norm[37:]).all()
    sketch = packed.coarse[:37, :70].float() @ basis(x).float()
    wide = packed.radius[:37] + accumulation(70) * packed.sq_norm[:37].sqrt()
    for ours, theirs in zip((packed.left, packed.right), lifted(sketch, wide, 0.2), strict=True):
        assert torch.allclose(ours[:37].float(), theirs.float(), rtol=2.0**-7, atol=1e-6)
        assert (ours[37:].float().amin(1) == -torch.inf).all()
