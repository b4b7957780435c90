"""Random clouds: both backends agree with the reference whatever comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pfml_triton import Potential, potential_energy
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import tiles_for
from reference import potential_field
from tests.clouds import FLOOR, KINDS, assert_near, basis, cloud, truth


@st.composite
def potentials(draw: st.DrawFn) -> Potential:
    delta = draw(st.floats(0.05, 0.8))
    return Potential(
        alpha=draw(st.one_of(st.integers(0, 6), st.floats(0.1, 6))),
        delta=delta,
        delta_rep=delta * draw(st.floats(1, 2)),
        min_distance=delta * draw(st.floats(0.05, 0.9)),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 20),
    depth=st.integers(1, 40),
    classes=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    potential=potentials(),
)
def test_backends_agree_with_the_reference(
    kind: str, n: int, depth: int, classes: int, seed: int, potential: Potential
) -> None:
    x, labels = cloud(kind, n, depth, classes, torch.float32, seed)
    true_energy, true_grad = truth(x, labels, potential)
    for backend in ("torch", "triton"):
        points = x.clone().requires_grad_()
        energy = potential_energy(points, labels, potential, backend=backend)
        (grad,) = torch.autograd.grad(energy, points)
        assert_near(grad, true_grad, torch.float32, what=f"gradient, {backend}")
        # Attraction and repulsion may cancel in the energy: compare with the sum of their sizes.
        size = sum(
            abs(truth(x[i : i + 2], labels[i : i + 2], potential)[0]) for i in range(n - 1)
        ) + abs(true_energy)
        assert abs(energy.double() - true_energy) <= 1e-6 * size, backend


def pruned_as_dense(
    backend: str, kind: str, n: int, depth: int, classes: int, seed: int, potential: Potential
) -> None:
    x, labels = cloud(kind, n, depth, classes, torch.float32, seed)
    results = []
    for prune in (True, False):
        points = x.clone().requires_grad_()
        energy = potential_energy(points, labels, potential, prune=prune, backend=backend)
        (grad,) = torch.autograd.grad(energy, points)
        results.append((energy.detach(), grad))
    (energy, grad), (dense_energy, dense_grad) = results
    assert_near(grad, dense_grad.double(), torch.float32, what="gradient")
    assert torch.allclose(
        energy, dense_energy, rtol=1e-6, atol=1e-6 * float(dense_grad.abs().max())
    )


CONFIGURATIONS = {
    "kind": st.sampled_from(KINDS),
    "n": st.integers(2, 300),
    "depth": st.integers(1, 130),
    "classes": st.integers(1, 150),
    "seed": st.integers(0, 2**31),
    "potential": potentials(),
}


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(**CONFIGURATIONS)
def test_pruning_changes_nothing(**configuration: object) -> None:
    pruned_as_dense("torch", **configuration)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(**CONFIGURATIONS | {"n": st.integers(2, 150)})
def test_pruning_changes_nothing_in_the_kernels(**configuration: object) -> None:
    pruned_as_dense("triton", **configuration)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CONFIGURATIONS, wide=st.booleans())
def test_the_filter_kernel_drops_no_repelling_pair(
    kind: str, n: int, depth: int, classes: int, seed: int, potential: Potential, wide: bool
) -> None:
    x, labels = cloud(kind, n, depth, classes, torch.float32, seed)
    tiles = tiles_for(depth, arch="sm_90" if wide else "sm_80")
    packed = launch.gather(x, labels, potential, basis=basis(x), tiles=tiles)
    near = launch.near_tiles(packed, packed)
    bits = (near[:, :, None] >> torch.arange(8)) & 1
    let_through = bits.flatten(1).repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :n]
    x, labels = x[packed.order[:n]], labels[packed.order[:n]]
    d2 = (x[:, None] - x).square().sum(2)
    repels = (labels[:, None] != labels) & (d2 < potential.repulsion_radius**2)
    assert let_through[repels].all()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = tuple(
    getattr(torch, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x`, [N, D] or [N], elsewhere in memory."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":  # NaN between the entries
        wide = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if layout == "offset":
        return torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape)
    if layout == "rows":  # all of them the first: stride(0) is 0
        return x[:1].expand(x.shape)
    if layout == "columns":
        return x[:, :1].expand(x.shape)
    return x


LAYOUTS = ("plain", "transposed", "sliced", "offset", "rows", "columns")


def labels_as(labels: Tensor, dtype: torch.dtype, sliced: bool) -> Tensor:
    """Classes that differ where `labels` do, up to the ends of `dtype`."""
    info = torch.iinfo(dtype)
    low = labels % 2 == 0  # even ones from the lowest value on, odd ones from the highest down
    ends = torch.where(low, labels, -1 - labels)
    if dtype == torch.uint64:  # which has no arithmetic; above 2^63 as below
        odd = ends.view(torch.uint64)
    elif info.min == 0:
        odd = torch.where(low, labels, info.max - labels).to(dtype)
    else:
        odd = torch.where(low, info.min + labels, info.max - labels).to(dtype)
    return torch.stack([odd, odd], 1)[:, 0] if sliced else odd


def field_of(
    x: Tensor, labels: Tensor, s: Tensor, s_labels: Tensor, potential: Potential
) -> tuple[Tensor, Tensor]:
    """The potential of `x` in the field of `s`, and the sum of the sizes of its terms."""
    d = potential_field.distances(x, s)
    same = labels[:, None] == s_labels
    psi = torch.where(
        same, potential_field.attraction(d, potential), potential_field.repulsion(d, potential)
    )
    return psi.sum(), psi.detach().abs().sum()


@st.composite
def calls(draw: st.DrawFn, most: int) -> dict[str, Any]:
    """A call of `potential_energy`, but for its backend, and what float64 says of it."""
    dtype = draw(st.sampled_from(DTYPES))
    depth = draw(st.sampled_from((1, 2, 3, 7, 16, 33, 60, 61, 64, 65, 130)))
    classes = draw(st.sampled_from((1, 2, 3, 10, 60)))
    kind, layout = draw(st.sampled_from(KINDS)), draw(st.sampled_from(LAYOUTS))
    # Half precision ends at 65,504, and where d^2 may overflow float32 a loss is NaN.
    largest = 2 if dtype == torch.float16 else 16
    scale = draw(st.one_of(st.just(1.0), st.integers(-20, largest).map(lambda e: 10.0**e)))
    seed, clouds = draw(st.integers(0, 2**31)), []
    for i in range(2):
        n = draw(st.one_of(st.integers(0, 3), st.integers(0, most)))
        x, labels = cloud(kind, n, depth, classes, torch.float64, seed + i)
        x = laid_out((scale * x).to(dtype), layout)
        label_dtype, sliced = draw(st.sampled_from(LABEL_DTYPES)), draw(st.booleans())
        clouds.append((x, labels, label_dtype, sliced))
    label_dtype = clouds[0][2]
    has_sources = draw(st.booleans())
    return {
        "clouds": [
            (x, labels, labels_as(labels, label_dtype, sliced))
            for x, labels, _, sliced in clouds[: 1 + has_sources]
        ],
        "potential": draw(potentials()),
        "reduction": draw(st.sampled_from(("sum", "mean"))),
        "prune": draw(st.booleans()),
        "upstream": draw(st.sampled_from((1.0, -3.0, 0.0))),
    }


def agrees_with_float64(call: dict[str, Any], backend: str) -> None:
    clouds, potential = call["clouds"], call["potential"]
    x, labels, given_labels = clouds[0]
    if backend == "torch" or x.dtype != torch.float64:
        ours = [z.detach().requires_grad_() for z, _, _ in clouds]
        sources = {}
        if len(clouds) == 2:
            sources = {"sources": ours[1], "source_labels": clouds[1][2]}
        value = potential_energy(
            ours[0], given_labels, potential, reduction=call["reduction"], prune=call["prune"],
            backend=backend, **sources,
        )  # fmt: skip
        grads = torch.autograd.grad(call["upstream"] * value, ours)

        wide = [z.detach().double().requires_grad_() for z, _, _ in clouds]
        true, size = field_of(wide[0], labels, wide[0], labels, potential)
        itself = -potential.attraction_constant * len(x)
        # The constant of a point on itself, psi_att(0), is left out.
        true, pairs = true + itself, len(x) * (len(x) - 1)
        if len(clouds) == 2:
            more, more_size = field_of(wide[0], labels, wide[1], clouds[1][1], potential)
            true, size = true + more, size + more_size
            pairs += len(x) * len(wide[1])
        if call["reduction"] == "mean":
            true, size = true / max(pairs, 1), size / max(pairs, 1)
        true_grads = torch.autograd.grad(call["upstream"] * true, wide, allow_unused=True)
        floor = FLOOR[torch.float32 if x.dtype != torch.float64 else torch.float64]
        off = float(abs(value.detach().double() - true))
        assert off <= floor * size, f"energy: {off:.3g} off, of {size:.3g}"
        # A stiffness below 1e-38 is lost, and so is what is below the smallest number of the dtype.
        extent = max([float(z.abs().max()) for z, _, _ in clouds if len(z)], default=0.0)
        for ours_of, true_of, z in zip(grads, true_grads, wide, strict=True):
            true_of = torch.zeros_like(z) if true_of is None else true_of
            largest = float(true_of.abs().max()) if len(z) else 0.0
            lost = 1e-36 * extent + torch.finfo(x.dtype).smallest_normal
            assert ours_of.dtype == x.dtype
            error = (ours_of.double() - true_of).abs()
            allowed = 2 * FLOOR[x.dtype] * largest + lost
            if largest < torch.finfo(x.dtype).max:
                assert bool((error <= allowed).all()), (float(error.max()), allowed, "gradient")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(call=calls(300))
def test_whatever_comes_torch(call: dict[str, Any]) -> None:
    agrees_with_float64(call, "torch")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(call=calls(24))
def test_whatever_comes_triton(call: dict[str, Any]) -> None:
    agrees_with_float64(call, "triton")
