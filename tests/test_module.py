"""`PFMLLoss`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from pfml_triton import PFMLLoss
from reference import potential_field as reference

B, D, C, M = 12, 6, 4, 3
EMBEDDINGS = torch.randn(B, D, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(B) % C


def reference_loss(loss: PFMLLoss, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Eq. 6 in float64, differentiable in the embeddings and the proxies."""
    proxies = loss.proxies.flatten(0, 1).double()
    embeddings = embeddings.double()
    if loss.normalize:
        proxies = proxies / proxies.norm(dim=1, keepdim=True)
        embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    proxy_labels = torch.arange(loss.num_classes).repeat_interleave(loss.proxies_per_class)
    return reference.total_potential_energy(
        embeddings, labels, proxies, proxy_labels, loss.potential
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("m", [0, 1, M])
def test_energy_and_gradients(m: int, normalize: bool, backend: str) -> None:
    loss = PFMLLoss(
        C, D, m, delta=0.7, delta_rep=1.1, min_distance=0.1, normalize=normalize, backend=backend
    )
    x = EMBEDDINGS.clone().requires_grad_()
    parameters = [x, loss.proxies] if m else [x]
    value = loss(x, LABELS)
    true = reference_loss(loss, x, LABELS)
    ours = torch.autograd.grad(3 * value, parameters)
    exact = torch.autograd.grad(3 * true, parameters)
    assert value.item() == pytest.approx(true.item(), rel=1e-6)
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a, b.to(a.dtype), rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_empty_batch_is_the_proxies_own_energy(backend: str) -> None:
    loss = PFMLLoss(C, D, M, delta=0.9, backend=backend)
    x = torch.empty(0, D, requires_grad=True)
    value = loss(x, torch.empty(0, dtype=torch.int64))
    value.backward()
    assert value.item() == pytest.approx(reference_loss(loss, x, LABELS[:0]).item(), rel=1e-6)
    assert loss.proxies.grad is not None
    assert loss.proxies.grad.any()
    assert x.grad is not None
    assert x.grad.shape == (0, D)


def test_mean_is_the_sum_over_ordered_pairs() -> None:
    loss = PFMLLoss(C, D, M)
    total = loss(EMBEDDINGS, LABELS)
    loss.reduction = "mean"
    n = B + C * M
    assert loss(EMBEDDINGS, LABELS).item() == pytest.approx(total.item() / (n * (n - 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_embeddings_of_other_dtypes(dtype: torch.dtype) -> None:
    """Half precision is evaluated in float32 beside the proxies, float64 in float64."""
    loss = PFMLLoss(C, D, M)
    x = EMBEDDINGS.to(dtype).requires_grad_()
    value = loss(x, LABELS)
    value.backward()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(reference_loss(loss, x, LABELS).item(), rel=1e-6)
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_autocast_does_not_change_the_loss() -> None:
    """Many classes far apart, so that the backend takes its matrix product."""
    loss = PFMLLoss(200, 16, 1)
    x = torch.randn(200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x, torch.arange(200))
    assert torch.equal(inside, loss(x, torch.arange(200)))


def test_reference_embeddings_add_their_field_without_receiving_force() -> None:
    loss = PFMLLoss(C, D, M)
    bank = torch.randn(7, D)
    bank_labels = torch.arange(7) % C
    x = EMBEDDINGS.clone().requires_grad_()
    alone = loss(x, LABELS)
    together = loss(x, LABELS, ref_emb=bank, ref_labels=bank_labels)
    unit = torch.nn.functional.normalize
    points = unit(torch.cat([x.detach(), loss.proxies.detach().flatten(0, 1)]).double(), dim=1)
    classes = torch.cat([LABELS, torch.arange(C).repeat_interleave(M)])
    field = sum(
        reference.class_potential(
            points[i : i + 1], unit(bank.double(), dim=1), bank_labels, int(c), loss.potential
        )
        for i, c in enumerate(classes)
    )
    assert (together - alone).item() == pytest.approx(float(field), rel=1e-4)
    together.backward()
    assert bank.grad is None


def test_training_pulls_a_class_together_and_pushes_others_away() -> None:
    loss = PFMLLoss(3, 8, 2, delta=0.3)
    embeddings = torch.nn.Parameter(torch.randn(30, 8))
    labels = torch.arange(30) % 3
    optimizer = torch.optim.Adam([{"params": [embeddings], "lr": 0.02}, *loss.param_groups(1e-3)])

    def separation() -> float:
        z = torch.nn.functional.normalize(embeddings.detach(), dim=1)
        d = torch.cdist(z, z)
        same = labels[:, None] == labels[None, :]
        return (d[~same].mean() / d[same].mean()).item()

    before = separation()
    for _ in range(150):
        optimizer.zero_grad()
        loss(embeddings, labels).backward()
        optimizer.step()
    assert separation() > 2 * before


def test_parameter_groups() -> None:
    loss = PFMLLoss(C, D, M)
    (group,) = loss.param_groups(1e-4)
    assert group["params"] == [loss.proxies]
    assert group["lr"] == pytest.approx(0.01)
    assert group["weight_decay"] == 0
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got -1"):
        loss.param_groups(-1)
    with pytest.raises(TypeError, match="weight_decay must be a real number, got None"):
        loss.param_groups(1.0, weight_decay=None)  # type: ignore[arg-type]
    assert loss.param_groups(1.0, 3.0, 0.5)[0] | {"params": None} == {
        "params": None, "lr": 3.0, "weight_decay": 0.5,
    }  # fmt: skip


def test_state_copies_and_reloads() -> None:
    loss = PFMLLoss(C, D, M, alpha=2.5)
    expected = loss(EMBEDDINGS, LABELS)
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    fresh = PFMLLoss(C, D, M, alpha=2.5)
    assert not torch.equal(fresh(EMBEDDINGS, LABELS), expected)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(EMBEDDINGS, LABELS), expected)
    assert torch.equal(copy.deepcopy(loss)(EMBEDDINGS, LABELS), expected)
    assert "alpha=2.5, delta=0.2" in repr(loss)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got 2.0"),
        ({"embedding_size": 0}, ValueError, "embedding_size must be >= 1, got 0"),
        ({"proxies_per_class": -1}, ValueError, "proxies_per_class must be >= 0, got -1"),
        ({"alpha": -0.5}, ValueError, "alpha must be >= 0, got -0.5"),
        ({"delta": -1}, ValueError, "delta must be > 0, got -1"),
        ({"delta_rep": 0.1}, ValueError, "delta_rep must be >= delta = 0.2, got 0.1"),
        ({"reduction": "max"}, ValueError, r"one of \('sum', 'mean'\), got 'max'"),
        ({"normalize": "no"}, TypeError, "normalize must be a bool, got 'no'"),
        ({"validate": 1}, TypeError, "validate must be a bool, got 1"),
        ({"backend": "numpy"}, ValueError, r"one of \('auto', 'triton', 'torch'\), got 'numpy'"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PFMLLoss(**({"num_classes": C, "embedding_size": D} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((EMBEDDINGS[0], LABELS[:1]), ValueError, r"embeddings must be \[B, D\] .* got \[6\]"),
        ((EMBEDDINGS[:, :5], LABELS), ValueError, r"must be \[B, 6\], got \[12, 5\]"),
        ((EMBEDDINGS, LABELS[:5]), ValueError, r"labels must be \[B\] with B = 12, .* got \[5\]"),
        ((EMBEDDINGS, LABELS.float()), TypeError, "integer dtype, got torch.float32"),
        ((EMBEDDINGS, LABELS + 1), ValueError, r"labels must be in \[0, 4\), got .* \[1, 4\]"),
        ((EMBEDDINGS, LABELS - 1), ValueError, r"labels must be in \[0, 4\), got .* \[-1, 2\]"),
        ((EMBEDDINGS, LABELS, (1, 2, 3)), ValueError, "no tuples to mine, got tuple"),
        ((EMBEDDINGS, LABELS, None, EMBEDDINGS), ValueError, "go together"),
        (
            (EMBEDDINGS, LABELS, None, EMBEDDINGS[:, :3], LABELS),
            ValueError,
            r"ref_emb must be \[R, 6\] on cpu, got \[12, 3\] on cpu",
        ),
        ((EMBEDDINGS.to("meta"), LABELS.to("meta")), ValueError, "proxies, cpu, got meta"),
    ],
)
def test_bad_calls(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PFMLLoss(C, D, M)(*arguments)


def test_values_are_checked_on_request() -> None:
    x = EMBEDDINGS.clone()
    x[2, 0] = float("nan")
    assert torch.isnan(PFMLLoss(C, D, M)(x, LABELS))
    loss = PFMLLoss(C, D, M, validate=True)
    with pytest.raises(ValueError, match="embeddings must be finite, .* 1 of 12 rows.* row 2"):
        loss(x, LABELS)
    with torch.no_grad():
        loss.proxies[1, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="proxies must be finite, .* row 5"):
        loss(EMBEDDINGS, LABELS)
