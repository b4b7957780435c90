"""Every kernel, for every chip, dtype and depth, compiled ahead of time; the binaries are read."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench.aot import SHARED_MEMORY, spills_in_loops
from bench.machine import Code
from pfml_triton.kernels.config import FENCELESS, tiles_for
from tests.compiled import (
    Shape,
    barriers_in_turns,
    compilations,
    filter_bytes,
    machine_code,
    ptx_of,
    synchronisations,
)

DEPTHS = (64, 128, 384, 512, 1024)
KINDS = ("sm_80", "sm_86", "sm_90", "sm_120", "gfx942")


def check(compiler: ProcessPoolExecutor, shapes: list[Shape], alpha: float = 3.0) -> None:
    faults = []
    for shape, codes in zip(
        shapes, compiler.map(machine_code, shapes, [alpha] * len(shapes)), strict=True
    ):
        kernels = Counter(name.partition("(")[0] for name in codes)
        once = ("_plan", "_total", "_pull_back")
        assert [kernels[f"{name}_kernel"] for name in once] == [1] * 3, kernels
        assert kernels["_count_kernel"] == 2, kernels  # of labels in 32 bits, and in 64
        assert kernels["_pack_kernel"] == 2, kernels  # gathered and scaled, or as they are
        assert kernels["_force_kernel"] >= 3, kernels  # see tests.compiled.VARIANTS
        assert min(kernels["_filter_kernel"], kernels["_join_kernel"]) >= 1, kernels
        for name, code in codes.items():
            if code.spills_in_loops:
                faults.append(f"{shape} {name} spills in a loop: {code.spills_in_loops[:3]}")
            if code.stack_bytes > 16:
                faults.append(f"{shape} {name} has {code.stack_bytes} bytes of stack")
            if code.shared_bytes > SHARED_MEMORY[shape[0]]:
                faults.append(f"{shape} {name} wants {code.shared_bytes} bytes of shared memory")
            if (
                name.startswith(("_pack", "_filter", "_force"))
                and code.tensor_core_instructions == 0
            ):
                faults.append(f"{shape} {name} has no tensor-core instruction")
    assert not faults, "\n".join(faults)


def test_sample(compiler: ProcessPoolExecutor) -> None:
    check(compiler, [("sm_90", "float32", 512), ("sm_80", "bfloat16", 128)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_chip(compiler: ProcessPoolExecutor, arch: str) -> None:
    check(compiler, [(arch, "float32", depth) for depth in DEPTHS])


# In what follows a chip stands for its kind: others of it have the same compiler and registers.


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
def test_other_dtypes(compiler: ProcessPoolExecutor, arch: str) -> None:
    """They differ in what is loaded; float16 from bfloat16 in no more than that."""
    check(compiler, [(arch, "bfloat16", 128), (arch, "bfloat16", 1024), (arch, "float16", 128)])


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 2.5])  # a logarithm, an exponential; else products
def test_other_exponents(compiler: ProcessPoolExecutor, alpha: float) -> None:
    check(compiler, [(arch, "float32", 512) for arch in KINDS], alpha)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 500, 640])  # padded: a slice, four, two programs of three
def test_odd_depths(compiler: ProcessPoolExecutor, depth: int) -> None:
    check(compiler, [(arch, "bfloat16", depth) for arch in KINDS])


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_products_see_what_was_copied(compiler: ProcessPoolExecutor, arch: str) -> None:
    """wgmma and tcgen05 read shared memory by the asynchronous proxy: a fence comes before, and
    nothing is copied by cp.async where Triton leaves the fence out."""
    for name, ptx in compiler.submit(ptx_of, (arch, "bfloat16", 512)).result().items():
        if re.search(r"wgmma\.mma_async|tcgen05\.mma", ptx):
            assert name.startswith("_filter"), name  # see config.PACK_M
            assert "fence.proxy.async" in ptx, name
            assert not (FENCELESS and re.search(r"cp\.async\.c", ptx)), name


def test_turns_keep_one_layout(compiler: ProcessPoolExecutor) -> None:
    """The loop over turns of the forces exchanges its column and its sums, and no gradients: each
    of eight slices in the layout of the product is two barriers and dozens of instructions."""
    found = compiler.submit(barriers_in_turns, ("sm_90", "float32", 512)).result()
    assert len(found) == 3
    assert all(barriers <= 6 for barriers in found.values()), found


def test_384_costs_less_than_512(compiler: ProcessPoolExecutor) -> None:
    """Work grows with the depth, and so do the registers of a program."""
    depths = (384, 512)
    machines = compiler.map(machine_code, [("sm_80", "bfloat16", depth) for depth in depths])
    less, more = (
        [warps * code.instructions, warps * code.registers]
        for warps, machine in zip((tiles_for(d).num_warps for d in depths), machines, strict=True)
        for name, code in machine.items()
        if name.startswith("_force_kernel(N=5000, placed=False, grad=True")
    )
    assert less[0] < more[0]
    assert less[1] < more[1]


LISTING = """
.L_x_0:
/*0000*/ STL [R1], R2 ;
.L_x_1:
/*0010*/ LDL R2, [R1] ;
/*0020*/ IADD3 R2, R2, 1 ;
/*0030*/ @P0 BRA `(.L_x_1) ;
/*0040*/ LDL R3, [R1] ;
/*0050*/ BRA `(.L_x_2) ;
.L_x_2:
/*0060*/ EXIT ;
"""


def test_only_spills_inside_loops_count() -> None:
    assert spills_in_loops(Code(LISTING.splitlines())) == ["LDL R2, [R1]"]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("potential_energy", 5),  # pack, filter, forces, total, pull back
        ("long lists", 8),  # and count, plan, join
        ("sources", 2 + 3 + 3 + 2 + 2),  # packs; two fields and their totals; a third; pull back
        ("class_potential", 4),
        ("PFMLLoss", 5),
    ],
)
def test_nothing_waits_for_the_device(
    compiler: ProcessPoolExecutor, call: str, expected: int
) -> None:
    """Forward and backward on meta tensors, which have no values to look at."""
    assert compiler.submit(synchronisations, call).result() == expected


@pytest.mark.parametrize(
    ("calls", "first", "later"),
    [
        ("batches", 5, {}),
        ("views", 5, {"_pack": 1}),  # aligned or not
        ("banks", 6, {"_count": 1, "_plan": 1, "_join": 1, "_force": 1}),  # without a gradient
        ("points", 7, {}),
    ],
)
def test_kernels_are_compiled_once(
    compiler: ProcessPoolExecutor, calls: str, first: int, later: dict[str, int]
) -> None:
    """Whatever the batch size, the view and the size of a memory bank: a step of a training that
    compiles takes seconds."""
    found = compiler.submit(compilations, calls).result()
    assert sum(found[0].values()) == first, found[0]
    in_sum = Counter[str]()
    for new in found[1:]:
        in_sum.update({name.removesuffix("_kernel"): count for name, count in new.items()})
    assert in_sum == later


@pytest.mark.parametrize(("n", "depth"), [(20_000, 64), (1_000_000, 256), (1_000_000, 512)])
def test_the_filter_takes_less_memory_than_the_points(
    compiler: ProcessPoolExecutor, n: int, depth: int
) -> None:
    """N^2 / 2048 bytes; the points have 2 N D in half precision."""
    nbytes = compiler.submit(filter_bytes, n, depth).result()
    assert n**2 / 2048 <= nbytes < 2 * n * depth
