"""`potential_energy` and `class_potential`: what they add to a backend, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pfml_triton import Potential, class_potential, potential_energy, serving, torch_backend
from pfml_triton.kernels import launch
from reference import potential_field as reference
from tests.clouds import cloud

X, LABELS = cloud("clusters", 20, 4, 3, torch.float32)

backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@backends
@pytest.mark.parametrize("n", [0, 1])
def test_no_pair_is_no_energy_and_no_force(n: int, backend: str) -> None:
    for reduction in ("sum", "mean"):
        x = torch.randn(n, 3, requires_grad=True)
        u = potential_energy(
            x, torch.zeros(n, dtype=torch.int64), reduction=reduction, backend=backend
        )
        u.backward()
        assert u.item() == 0
        assert x.grad is not None
        assert x.grad.shape == (n, 3)
        assert not x.grad.any()


@backends
def test_mean_is_over_the_ordered_pairs(backend: str) -> None:
    kwargs: dict[str, Any] = {"sources": X[:5] + 0.1, "source_labels": LABELS[:5]}
    for extra, pairs in (({}, 20 * 19), (kwargs, 20 * 19 + 20 * 5)):
        total = potential_energy(X, LABELS, backend=backend, **extra)
        mean = potential_energy(X, LABELS, reduction="mean", backend=backend, **extra)
        assert mean.item() == pytest.approx(total.item() / pairs, rel=1e-6)


@backends
def test_sources_act_once_and_not_on_each_other(backend: str) -> None:
    p = Potential()
    sources, source_labels = cloud("clusters", 9, 4, 4, torch.float64, seed=2)
    x = X.double()
    both = potential_energy(
        x, LABELS, p, sources=sources, source_labels=source_labels, backend=backend
    )
    alone = potential_energy(x, LABELS, p, backend=backend)
    field = sum(
        reference.class_potential(x[i : i + 1], sources, source_labels, int(LABELS[i]), p)
        for i in range(20)
    )
    assert (both - alone).item() == pytest.approx(float(field), rel=1e-12)


@backends
def test_points_that_are_their_own_sources(backend: str) -> None:
    """With the same labels or others: d = 0 is a pair like any."""
    p = Potential()
    x = X.double()
    for source_labels in (LABELS, LABELS + 1):
        both = potential_energy(
            x, LABELS, p, sources=x, source_labels=source_labels, backend=backend
        )
        alone = potential_energy(x, LABELS, p, backend=backend)
        field = sum(
            reference.class_potential(x[i : i + 1], x, source_labels, int(LABELS[i]), p)
            for i in range(20)
        )
        assert (both - alone).item() == pytest.approx(float(field), rel=1e-7)


@backends
def test_only_what_requires_a_gradient_gets_one(backend: str) -> None:
    x = X.clone().requires_grad_()
    s = (X[:6] + 0.2).requires_grad_()
    kwargs: dict[str, Any] = {"source_labels": LABELS[:6], "backend": backend}
    potential_energy(x, LABELS, sources=s.detach(), **kwargs).backward()
    assert x.grad is not None
    only_points, x.grad = x.grad.clone(), None
    potential_energy(x.detach(), LABELS, sources=s, **kwargs).backward()
    assert x.grad is None
    assert s.grad is not None
    only_sources, s.grad = s.grad.clone(), None
    potential_energy(x, LABELS, sources=s, **kwargs).backward()
    assert torch.equal(x.grad, only_points)
    assert torch.equal(s.grad, only_sources)
    assert not potential_energy(X, LABELS, backend=backend).requires_grad


@backends
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32]
)
def test_label_dtypes(dtype: torch.dtype, backend: str) -> None:
    expected = potential_energy(X, LABELS, backend=backend)
    assert torch.equal(potential_energy(X, LABELS.to(dtype), backend=backend), expected)


@backends
def test_label_values_only_have_to_differ(backend: str) -> None:
    expected = potential_energy(X, LABELS, backend=backend)
    odd = torch.tensor([-(2**62), 2**62 + 1, -1])[LABELS]
    assert potential_energy(X, odd, backend=backend).item() == pytest.approx(expected.item())


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_point_that_is_not_finite_shows(bad: float, backend: str) -> None:
    x = X.clone()
    x[3, 1] = bad
    assert torch.isnan(potential_energy(x, LABELS, backend=backend))
    assert torch.isnan(
        potential_energy(X, LABELS, sources=x, source_labels=LABELS, backend=backend)
    )
    y = x.clone().requires_grad_()
    potential_energy(y, LABELS, backend=backend).backward()
    assert y.grad is not None
    assert torch.isnan(y.grad).all()
    field = class_potential(x, X, LABELS, 0, backend=backend)
    assert torch.isnan(field).nonzero().flatten().tolist() == [3]
    others = torch.arange(len(X)) != 3
    alone = class_potential(X, X, LABELS, 0, backend=backend)
    assert torch.allclose(field[others], alone[others], rtol=1e-6)
    queries = X.clone().requires_grad_()
    field = class_potential(queries, x, LABELS, 0, backend=backend)
    assert torch.isnan(field).all()
    assert torch.isnan(torch.autograd.grad(field.sum(), queries)[0]).all()
    for call in (
        lambda: potential_energy(x, LABELS, validate=True, backend=backend),
        lambda: potential_energy(
            X, LABELS, sources=x, source_labels=LABELS, validate=True, backend=backend
        ),
        lambda: class_potential(x, X, LABELS, 0, validate=True, backend=backend),
        lambda: class_potential(X, x, LABELS, 0, validate=True, backend=backend),
    ):
        with pytest.raises(ValueError, match="NaN or Inf in 1 of 20 rows, the first being row 3"):
            call()


@backends
def test_norms_beyond_float32_show(backend: str) -> None:
    x = torch.tensor([[1e20, 0.0], [1e20, 0.0], [-1e20, 0.0]])
    assert torch.isnan(potential_energy(x, torch.tensor([0, 1, 0]), backend=backend))


def test_no_gradient_is_computed_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["needs_grad"])
        return field_terms(*args, **kwargs)

    field_terms = torch_backend.field_terms
    monkeypatch.setattr(torch_backend, "field_terms", spy)
    x = X.clone().requires_grad_()
    with torch.no_grad():
        potential_energy(x, LABELS)
        class_potential(x, X, LABELS, 0)
    potential_energy(x, LABELS)
    assert asked == [False, False, True]


@backends
def test_nothing_of_the_caller_changes(backend: str) -> None:
    x, labels = X.clone().requires_grad_(), LABELS.to(torch.int16)
    before = x.detach().clone(), labels.clone()
    potential_energy(x, labels, backend=backend).backward()
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(labels, before[1])


def test_double_backward_is_refused() -> None:
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(potential_energy(x, LABELS), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (grad.sum() + x.sum()).backward()
    sources = X.flip(1).requires_grad_()
    energy = potential_energy(X, LABELS, sources=sources, source_labels=LABELS)
    (grad,) = torch.autograd.grad(energy, sources, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"points": [1.0]}, TypeError, "points must be a Tensor, got list"),
        ({"points": X[0]}, ValueError, r"must be \[N, D\] with 1 <= D <= 16000, got \[4\]"),
        ({"points": X[:, :1].expand(20, 16_001)}, ValueError, r"got \[20, 16001\]"),
        ({"points": X[:, :0]}, ValueError, r"got \[20, 0\]"),
        ({"points": X.int()}, TypeError, "points must have dtype float32, .*, got torch.int32"),
        ({"points": X[:7]}, ValueError, r"labels must be \[N\] with N = 7, .*, got \[20\]"),
        ({"points": X.to_sparse()}, TypeError, "points must be dense .*, got torch.sparse_coo"),
        ({"labels": LABELS.float()}, TypeError, "integer dtype, got torch.float32"),
        ({"labels": LABELS.bool()}, TypeError, "integer dtype, got torch.bool"),
        ({"labels": LABELS[:, None]}, ValueError, r"got \[20, 1\]"),
        ({"labels": LABELS.tolist()}, TypeError, "labels must be a Tensor, got list"),
        ({"labels": LABELS.to("meta")}, ValueError, "on the device of points, cpu, got meta"),
        ({"potential": 3.0}, TypeError, "potential must be a Potential, got float"),
        ({"reduction": "none"}, ValueError, r"one of \('sum', 'mean'\), got 'none'"),
        ({"backend": "cuda"}, ValueError, r"\('auto', 'triton', 'torch'\), got 'cuda'"),
        ({"prune": None}, TypeError, "prune must be a bool, got None"),
        ({"sources": X}, ValueError, "source_labels is None"),
        ({"source_labels": LABELS}, ValueError, "sources is None"),
        (
            {"sources": X[:, :3], "source_labels": LABELS},
            ValueError,
            r"one depth D, got \[20, 3\] and \[20, 4\]",
        ),
        (
            {"sources": X.double(), "source_labels": LABELS},
            TypeError,
            "dtype of points, torch.float32, got torch.float64",
        ),
        (
            {"potential": Potential(8.0, 0.2, None, 1e-4)},
            ValueError,
            "overflows: .* for torch.float32, got 8e\\+40 for alpha = 8.0, min_distance = 0.0001",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"points": X, "labels": LABELS} | change
    points, labels = arguments.pop("points"), arguments.pop("labels")
    with pytest.raises(error, match=says):
        potential_energy(points, labels, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"queries": X[:, :2]}, ValueError, r"one depth D, got \[20, 2\] and \[20, 4\]"),
        ({"queries": X.half()}, TypeError, "dtype of points, torch.float32, got torch.float16"),
        ({"class_index": 2**63}, ValueError, r"in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
        ({"prune": 0}, TypeError, "prune must be a bool, got 0"),
        ({"class_index": 1.0}, TypeError, "class_index must be an int, got 1.0"),
        ({"points": X.clone().requires_grad_()}, ValueError, r"pass points.detach\(\)"),
    ],
)
def test_bad_input_of_class_potential(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    arguments: dict[str, Any] = {
        "queries": X, "points": X, "labels": LABELS, "class_index": 0,
    } | change  # fmt: skip
    with pytest.raises(error, match=says):
        class_potential(**arguments)


def test_triton_where_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="need tensors on a GPU, .*, got points on cpu"):
        potential_energy(X, LABELS, backend="triton")
    monkeypatch.setattr(serving, "missing", "Triton cannot be imported here")
    with pytest.raises(ValueError, match="Triton cannot be imported here"):
        potential_energy(X, LABELS, backend="triton")
    assert torch.isfinite(potential_energy(X, LABELS))


def test_auto_on_the_cpu_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Tensor, **kwargs: Any) -> None:
        raise AssertionError("the kernels were called")

    monkeypatch.setattr(launch, "field_terms", fail)
    assert torch.isfinite(potential_energy(X, LABELS))
