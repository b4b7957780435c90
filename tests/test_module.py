"""`PFMLLoss`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from pfml_triton import PFMLLoss, torch_backend
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
@pytest.mark.parametrize(("m", "depth"), [(0, D), (1, D), (M, D), (M, 70), (M, 150)])
def test_energy_and_gradients(m: int, depth: int, normalize: bool, backend: str) -> None:
    """The kernels take 32 of the depth at a time, 128 in backward."""
    loss = PFMLLoss(
        C, depth, m, delta=0.7, delta_rep=1.1, min_distance=0.1, normalize=normalize,
        backend=backend,
    )  # fmt: skip
    x = EMBEDDINGS if depth == D else torch.randn(B, depth)
    x = x.clone().requires_grad_()
    parameters = [x, loss.proxies] if m else [x]
    value = loss(x, LABELS)
    true = reference_loss(loss, x, LABELS)
    ours = torch.autograd.grad(3 * value, parameters)
    exact = torch.autograd.grad(3 * true, parameters)
    assert value.item() == pytest.approx(true.item(), rel=1e-6)
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a, b.to(a.dtype), rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_proxies_of_any_strides(backend: str) -> None:
    loss = PFMLLoss(C, D, 1, backend=backend)
    expected = loss(EMBEDDINGS, LABELS)
    wide = torch.stack([loss.proxies.detach(), torch.full((C, 1, D), torch.nan)], 3)
    loss.proxies = torch.nn.Parameter(wide[..., 0])
    assert loss.proxies.stride(2) == 2
    assert torch.equal(loss(EMBEDDINGS, LABELS), expected)


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
    x = torch.randn(200, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x, torch.arange(200))
        (grad,) = torch.autograd.grad(inside, x)
    outside = loss(x, torch.arange(200))
    assert torch.equal(inside, outside)
    assert torch.equal(grad, torch.autograd.grad(outside, x)[0])


def test_double_backward_is_refused() -> None:
    loss = PFMLLoss(C, D, M)
    (grad,) = torch.autograd.grad(loss(EMBEDDINGS, LABELS), loss.proxies, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lengths_that_overflow_show(backend: str) -> None:
    """The point does not become the origin."""
    loss, x = PFMLLoss(C, D, M, backend=backend), EMBEDDINGS.clone()
    x[1, 0] = 1e20
    value = loss(x.requires_grad_(), LABELS)
    value.backward()
    assert torch.isnan(value)
    assert x.grad is not None
    assert torch.isnan(x.grad).all()


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
        ({"prune": 1}, TypeError, "prune must be a bool, got 1"),
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


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_last_stats(backend: str, prune: bool) -> None:
    loss = PFMLLoss(C, D, M, delta=0.7, delta_rep=1.1, prune=prune, backend=backend)
    assert loss.last_stats is None
    value = loss(EMBEDDINGS.clone().requires_grad_(), LABELS)
    assert loss.last_stats is not None
    stats = {name: float(v) for name, v in loss.last_stats.items()}
    assert not any(v.requires_grad for v in loss.last_stats.values())

    points = torch.cat([EMBEDDINGS, loss.proxies.detach().flatten(0, 1)]).double()
    points = torch.nn.functional.normalize(points, dim=1)
    labels = torch.cat([LABELS, torch.arange(C).repeat_interleave(M)])
    d = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    attracts = same & (d >= 0.7)
    repels = ~same & (d < 1.1)
    assert attracts.any()
    assert repels.any()
    assert stats["attracting_pairs"] == int(attracts.sum())
    assert stats["repelling_pairs"] == int(repels.sum())
    assert stats["smallest_distance"] == pytest.approx(float(d[repels].min()), rel=1e-6)
    p = loss.potential
    energy = (reference.repulsion(d[repels], p) - p.repulsion_constant).sum()
    energy += (reference.attraction(d[attracts], p) - p.attraction_constant).sum()
    assert stats["active_energy"] == pytest.approx(float(energy), rel=1e-5)
    assert stats["active_share"] == 1.0
    at_rest = (same.sum() - len(points)) * p.attraction_constant
    at_rest += (~same).sum() * p.repulsion_constant
    assert value.item() == pytest.approx(float(energy + at_rest), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_last_stats_with_reference_embeddings_and_without_pairs(backend: str) -> None:
    loss = PFMLLoss(C, D, M, delta=0.7, backend=backend)
    with torch.no_grad():
        loss(EMBEDDINGS, LABELS)
        assert loss.last_stats is not None
        alone = loss.last_stats["repelling_pairs"]
        loss(EMBEDDINGS, LABELS, ref_emb=EMBEDDINGS, ref_labels=(LABELS + 1) % C)
        assert loss.last_stats["repelling_pairs"] > alone
        assert loss.last_stats["smallest_distance"] == 0  # a sample on itself under another label
        PFMLLoss(C, D, 0, backend=backend)(EMBEDDINGS[:0], LABELS[:0])
        far = PFMLLoss(C, D, 0, delta=1e-6, min_distance=1e-7, backend=backend)
        far(EMBEDDINGS, LABELS)
    assert far.last_stats is not None
    assert far.last_stats["smallest_distance"] == torch.inf
    assert far.last_stats["repelling_pairs"] == 0


def low_rank_batch(n: int, depth: int) -> torch.Tensor:
    """What a network gives: embeddings in a few directions, about half a unit apart."""
    return 0.125 * torch.randn(n, 8) @ torch.randn(8, depth) + torch.randn(depth)


def test_the_sketch_follows_the_embeddings_in_training() -> None:
    loss = PFMLLoss(400, 512, 1)
    x, labels = low_rank_batch(64, 512), torch.arange(0, 384, 6)
    before = loss.sketch_basis.clone()
    loss.eval()
    loss(x, labels)
    assert torch.equal(loss.sketch_basis, before)
    random_share = loss.last_stats["active_share"]
    loss.train()
    loss(x, labels)
    assert not torch.equal(loss.sketch_basis, before)
    loss.eval()
    loss(x, labels)
    assert loss.last_stats["active_share"] < random_share
    centred = torch.nn.functional.normalize(x, dim=1)
    centred = centred - centred.mean(0)
    assert (centred @ loss.sketch_basis.float()).norm() > 0.95 * centred.norm()
    settled = PFMLLoss(400, 512, 1, prune=False)
    settled(x, labels)
    assert torch.equal(settled.sketch_basis, before)


def test_the_sketch_follows_directions_where_points_are_scaled() -> None:
    x, found = low_rank_batch(64, 512), []
    for lengths in (torch.ones(64, 1), 2.0 ** (torch.arange(64)[:, None] % 20)):
        loss = PFMLLoss(64, 512, 1)
        loss(lengths * x, torch.arange(64))
        found.append(loss.sketch_basis)
    assert torch.equal(*found)


def test_calls_at_which_the_sketch_turns() -> None:
    loss, turned = PFMLLoss(8, 70, 1).requires_grad_(False), []
    for call in range(205):
        before = loss.sketch_basis.clone()
        loss(torch.randn(8, 70), torch.arange(8))
        if not torch.equal(loss.sketch_basis, before):
            turned.append(call)
    assert turned == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_sketch_is_turned_by_hand(normalize: bool) -> None:
    """In evaluation as well, as calls in training turn it, in place, and without counting."""
    ours, theirs = (PFMLLoss(8, 70, 1, normalize=normalize) for _ in range(2))
    written = ours._basis
    ours.eval()
    for _ in range(3):
        x = low_rank_batch(30, 70).requires_grad_()
        ours.update_sketch(x)
        theirs.training_calls = 1
        theirs(x, torch.arange(30) % 8)
    assert not torch.equal(ours.sketch_basis, PFMLLoss(8, 70).sketch_basis)
    assert torch.equal(ours.sketch_basis, theirs.sketch_basis)
    assert ours.training_calls == 0
    ours.sketch_basis = torch.zeros(70, 60)
    assert ours._basis is written  # which a captured graph goes on reading
    assert not written.any()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ([[1.0]], TypeError, "floating-point tensor, got list"),
        (torch.zeros(3, 70, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(70), ValueError, r"\[B, D\], got \[70\]"),
        (torch.zeros(3, 69), ValueError, r"\[B, 70\], got \[3, 69\]"),
        (torch.zeros(3, 70, device="meta"), ValueError, "device of the proxies, cpu, got meta"),
    ],
    ids=str,
)
def test_what_does_not_turn_the_sketch(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PFMLLoss(8, 70).update_sketch(given)


def test_a_captured_graph_does_not_turn_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = PFMLLoss(8, 70)
    before = loss.sketch_basis
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="between replays, not in a captured graph"):
        loss.update_sketch(torch.randn(3, 70))
    assert torch.equal(loss.sketch_basis, before)


def test_labels_have_32_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the batch and the proxies, and those of a memory bank; the result is the same."""
    loss = PFMLLoss(C, D, M, backend="torch").eval()
    given = EMBEDDINGS, LABELS, None, EMBEDDINGS + 0.1, LABELS
    expected, seen = loss(*given), []
    gather = torch_backend.gather

    def gathered(x: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(labels.dtype)
        return gather(x, labels, *args, **kwargs)

    monkeypatch.setattr(torch_backend, "gather", gathered)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    assert torch.equal(loss(*given), expected)
    assert seen == [torch.int32] * 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(7, 3, 6), (2, 3, 6), (4, 5, 6), (3, 4, 6), (4, 3, 70)])
def test_sizes_that_change_together(sizes: tuple[int, int, int], backend: str) -> None:
    """After a call with others, as a loss that was built with them."""
    loss, other = PFMLLoss(C, D, M, backend=backend), PFMLLoss(*sizes[::2], sizes[1])
    loss(EMBEDDINGS, LABELS)
    loss.num_classes, loss.proxies_per_class, loss.embedding_size = sizes
    loss.proxies = torch.nn.Parameter(other.proxies.detach().clone())
    x, labels = torch.randn(B, sizes[2]), torch.arange(B) % sizes[0]
    assert torch.allclose(loss(x, labels), other(x, labels), rtol=1e-5)
    ours, theirs = (torch.autograd.grad(f(x, labels), f.proxies)[0] for f in (loss, other))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert loss.sketch_basis.shape == other.sketch_basis.shape


@pytest.mark.parametrize("name", ["num_classes", "proxies_per_class", "embedding_size", "proxies"])
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    loss = PFMLLoss(C, D, M)
    loss(EMBEDDINGS, LABELS)
    for change in (-1, 1):
        other = copy.deepcopy(loss)
        if name == "proxies":
            other.proxies = torch.nn.Parameter(torch.randn(C + change, M, D))
        else:
            setattr(other, name, getattr(other, name) + change)
        with pytest.raises(ValueError, match=r"proxies must be \[num_classes, .* got \["):
            other(EMBEDDINGS, LABELS)
    loss.proxies = None
    with pytest.raises(ValueError, match=r"proxies must be \[num_classes, .* got None"):
        loss(EMBEDDINGS, LABELS)


def test_a_batch_that_is_not_finite_leaves_the_sketch_alone() -> None:
    loss = PFMLLoss(10, 128, 2)
    x = torch.randn(20, 128)
    x[3] = torch.nan
    before = loss.sketch_basis.clone()
    assert loss(x, torch.arange(20) % 10).isnan()
    assert torch.equal(loss.sketch_basis, before)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_module_still_prunes_exactly(cast: str) -> None:
    loss = getattr(PFMLLoss(60, 128, 3, delta=0.5), cast)()
    x = low_rank_batch(60, 128)
    results = []
    for prune in (True, False):
        loss.prune = prune
        loss.zero_grad()
        value = loss(x, torch.arange(60))
        value.backward()
        results.append((value.detach(), loss.proxies.grad.clone()))
    for pruned, dense in zip(*results, strict=True):
        assert torch.allclose(pruned, dense, rtol=1e-5, atol=1e-6 * float(dense.abs().max()))


@pytest.mark.parametrize("garbage", [100.0, 0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("how", ["written", "empty"])
@pytest.mark.parametrize("train", [True, False])
def test_a_sketch_that_is_garbage_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, train: bool, how: str, garbage: float
) -> None:
    """It is repaired when it is assigned, before any backend sees it."""
    monkeypatch.setattr(torch_backend, "_ACTIVE_SHARE", 2.0)  # what is dropped is not looked at
    loss = PFMLLoss(40, 96, 1, delta=0.9).train(train)
    x, labels = torch.randn(40, 96), torch.arange(40)
    with torch.no_grad():
        loss.proxies.mul_(0.3).add_(torch.randn(96))
        x.mul_(0.3).add_(torch.randn(96))
    loss.prune = False
    dense = loss(x, labels)
    assert loss.last_stats["repelling_pairs"] > 100
    loss.prune = True
    loss(x, labels)
    if how == "written":
        loss.sketch_basis = garbage * torch.randn(96, 60)
    else:  # what to_empty() leaves
        loss.sketch_basis = garbage * torch.randn(96, 60, dtype=torch.bfloat16)
    assert torch.allclose(loss(x, labels), dense, rtol=1e-6)
    assert torch.linalg.matrix_norm(loss.sketch_basis.double(), 2) <= 1


def test_deferred_initialisation() -> None:
    x, labels = torch.randn(20, 100), torch.arange(20) % 5
    trained = PFMLLoss(5, 100)
    for build in (lambda: PFMLLoss(5, 100).to("meta"), lambda: on_meta(5, 100)):
        loss = build().to_empty(device="cpu")
        loss.load_state_dict(trained.state_dict())
        assert torch.equal(loss(x, labels), trained(x, labels))


def on_meta(classes: int, depth: int) -> PFMLLoss:
    with torch.device("meta"):
        loss = PFMLLoss(classes, depth)
    assert loss.proxies.is_meta
    assert loss.proxies.is_meta
    return loss


@pytest.mark.parametrize("depth", [1, 6, 70])
def test_the_sketch_is_saved(depth: int) -> None:
    """Byte by byte, in a tensor that may be cast on its way."""
    loss, fresh = PFMLLoss(4, depth, 2), PFMLLoss(4, depth, 2)
    loss.training_calls = 1_234_567_890_123
    loss.update_sketch(low_rank_batch(20, depth))
    state = loss.state_dict()
    assert list(state) == ["proxies", "_extra_state"]
    for cast in (torch.uint8, torch.bfloat16, torch.float16, torch.float64):
        fresh.training_calls, fresh.sketch_basis = 0, torch.zeros_like(fresh.sketch_basis)
        fresh.load_state_dict(state | {"_extra_state": state["_extra_state"].to(cast)})
        assert fresh.training_calls == 1_234_567_890_123
        assert torch.equal(fresh.sketch_basis, loss.sketch_basis)
    state["_extra_state"].random_(0, 256)  # of a wrong file
    fresh.load_state_dict(state)
    assert fresh.training_calls >= 0
    assert torch.linalg.matrix_norm(fresh.sketch_basis.double(), 2) <= 1
    for wrong in (torch.zeros(8, dtype=torch.uint8), None, {"basis": 1}):
        with pytest.raises(ValueError, match=f"embedding_size = {depth} must be .* got"):
            fresh.set_extra_state(wrong)


def test_pruning_changes_nothing_in_a_trained_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and proxies that the loss itself has moved: clusters, and a few pairs at delta."""
    monkeypatch.setattr(torch_backend, "_ACTIVE_SHARE", 2.0)
    torch.manual_seed(1)
    classes, each, depth = 150, 4, 96
    weight = torch.nn.Parameter(torch.randn(40, depth) / 6)
    inputs = torch.randn(classes, 1, 40) + 0.3 * torch.randn(classes, each, 40)
    loss = PFMLLoss(classes, depth, 2, delta=0.3)
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": 3e-3}, *loss.param_groups(3e-3, proxy_lr_mult=10)]
    )
    labels = torch.arange(classes).repeat_interleave(each)
    batch = inputs.flatten(0, 1)
    first = None
    for step in range(60):
        value = loss(batch @ weight, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        first = first or loss.last_stats
        if step % 20 and step != 59:
            continue
        results = []
        for prune in (True, False):
            loss.prune = prune
            x = (batch @ weight).detach().requires_grad_()
            energy = loss(x, labels)
            results.append((energy.detach(), *torch.autograd.grad(energy, [x, loss.proxies])))
        assert loss.last_stats["repelling_pairs"] + loss.last_stats["attracting_pairs"] > 100
        loss.prune = True
        for pruned, dense in zip(*results, strict=True):
            assert torch.allclose(pruned, dense, rtol=1e-6, atol=1e-6 * float(dense.abs().max()))
    loss(batch @ weight, labels)
    assert 0 < loss.last_stats["active_energy"] < first["active_energy"]
    assert loss.last_stats["active_share"] < 0.9
