"""The registered operators: opcheck, graphs, torch.func, checkpointing, CUDA graphs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pfml_triton import PFMLLoss, Potential, class_potential, potential_energy
from tests.clouds import cloud

POTENTIAL = Potential(delta=0.5, delta_rep=0.8)
X, LABELS = cloud("clusters", 14, 7, 3, torch.float32)
OPS = torch.ops.pfml_triton

backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def energy(x: Tensor, labels: Tensor = LABELS, **kwargs: Any) -> Tensor:
    return potential_energy(x, labels[: x.shape[0]], POTENTIAL, **kwargs)


def with_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    (grad,) = torch.autograd.grad(3 * value, x)
    return value.detach(), grad


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def arguments(
    dtype: torch.dtype = torch.float32,
    *,
    n: int = 9,
    proxies: bool = False,
    sources: bool = False,
    unit: bool = False,
    mean: bool = False,
    prune: bool = True,
    backend: str = "torch",
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Any, ...]:
    """What the operator takes; the points are a view with strides of its own."""
    x = X.to(dtype)[:n].t().contiguous().t()
    p = X[:6].view(3, 2, 7).clone() if proxies else None
    s = X[9:].to(dtype).clone() if sources else None
    wanted = [t is not None and need for t, need in zip((x, p, s), needs, strict=True)]
    for tensor, need in zip((x, p, s), wanted, strict=True):
        if tensor is not None:
            tensor.requires_grad_(need)
    labels = torch.cat([LABELS[:n], torch.arange(6) // 2]) if proxies else LABELS[:n]
    return (
        x, labels, p, s, LABELS[9:] if sources else None, None, None, None, 3.0, 0.5, 0.8, 0.01,
        unit, mean, prune, backend, 3 if proxies else None, False, *wanted,
    )  # fmt: skip


@backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "prune": False},
        {"dtype": torch.float16, "n": 0},
        {"n": 1, "mean": True},
        {"proxies": True, "unit": True},
        {"proxies": True, "unit": True, "dtype": torch.bfloat16, "needs": (False, True, False)},
        {"proxies": True, "sources": True, "unit": True, "mean": True},
        {"sources": True, "needs": (True, False, False)},
        {"sources": True, "needs": (False, False, True)},
        {"proxies": True, "needs": (False, False, False)},
    ],
    ids=str,
)
def test_opcheck_of_the_energy(options: dict[str, Any], backend: str) -> None:
    torch.library.opcheck(OPS.potential_energy.default, arguments(**options, backend=backend))


@backends
def test_opcheck_of_the_others(backend: str) -> None:
    query = X[:5].clone().requires_grad_()
    field = 1, 3.0, 0.5, 0.8, 0.01, True, backend, False
    torch.library.opcheck(OPS.class_potential.default, (query, X, LABELS, *field, True))
    torch.library.opcheck(OPS.class_potential.default, (X[:0], X, LABELS, *field, False))
    for unit in (True, False):
        args = arguments(proxies=True, unit=unit, backend=backend)
        with torch.no_grad():
            _, totals, *found = OPS.potential_energy(*args)
        for first, second in ((torch.bfloat16, torch.float32), (None, torch.float32)):
            given = (args[0].detach(), args[2].detach(), None, torch.tensor(2.0), totals, found[0])
            placed = found[1:3] if unit else (None, None)
            shape = (len(X[:9]), first, second, 1, True, backend)
            torch.library.opcheck(OPS.pull_back.default, (*given, *placed, *shape))
    basis = torch.randn(70, 60).bfloat16()
    torch.library.opcheck(
        OPS.turn_basis.default, (basis, torch.tensor(0), torch.randn(9, 70), True)
    )


@backends
def test_the_operator_is_the_function(backend: str) -> None:
    """Bit for bit: eager mode applies the function, graphs call the operator."""
    results = []
    for unit in (True, False):
        for apply in (OPS.potential_energy, None):
            args = arguments(proxies=True, sources=True, unit=unit, backend=backend)
            leaves = args[0], args[2], args[3]
            if apply is None:
                from pfml_triton.operators import potential_energy as apply
            value, totals, *_ = apply(*args)
            assert not totals.requires_grad
            results.append((value, totals, *torch.autograd.grad(2 * value, leaves)))
    assert same(results[0], results[1])
    assert same(results[2], results[3])


@backends
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_of_the_function(dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: energy(2 * x, backend=backend).square(),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for n in (14, 9, 5):
        eager = with_grad(lambda x: energy(2 * x, backend=backend).square(), X[:n])
        assert same(with_grad(compiled, X[:n]), eager)


def steps(loss: Callable[..., Tensor], inner: PFMLLoss) -> list[Tensor]:
    """Three steps of training with different batches, then one of evaluation."""
    found = []
    optimizer = torch.optim.SGD(inner.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    for n in (24, 24, 17, 9):
        inner.train(n != 9)
        x = torch.randn(n, 70, generator=generator).requires_grad_()
        optimizer.zero_grad()
        value = loss(x, torch.arange(n) % 4)
        value.backward()
        optimizer.step()
        assert x.grad is not None
        assert inner.last_stats is not None
        found += [value.detach(), x.grad, inner.last_stats["active_energy"]]
    return [*found, inner.proxies.detach(), inner.sketch_basis, torch.tensor(inner.training_calls)]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("validate", [True, False])
def test_compile_of_the_module(validate: bool, dynamic: bool) -> None:
    """The sketch turns in the graph as it does outside, and the statistics come out of it."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    eager = PFMLLoss(4, 70, 2, delta=0.9, delta_rep=1.3, validate=validate)
    inner = copy.deepcopy(eager)
    before = inner.sketch_basis
    compiled = torch.compile(inner, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert same(tuple(steps(compiled, inner)), tuple(steps(eager, eager)))
    assert not torch.equal(inner.sketch_basis, before)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\), got values in \[0, 4\]"):
        compiled(torch.randn(9, 70), torch.arange(9) % 5)


@pytest.mark.slow
# Its cache on disk knows nothing of what an operator returned in another version.
@torch.compiler.config.patch(force_disable_caches=True)
def test_inductor() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    eager = PFMLLoss(4, 70, 2, delta=0.9, delta_rep=1.3)
    inner = copy.deepcopy(eager)
    ours = steps(torch.compile(inner, fullgraph=True), inner)
    for a, b in zip(ours, steps(eager, eager), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_compile_of_class_potential() -> None:
    torch._dynamo.reset()

    def psi(x: Tensor) -> Tensor:
        return class_potential(x, X, LABELS, 1, POTENTIAL).sum()

    compiled = torch.compile(psi, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (14, 5):
        assert same(with_grad(compiled, X[:n] + 0.1), with_grad(psi, X[:n] + 0.1))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(7, 5)
        self.loss = PFMLLoss(3, 5, 2, delta=0.9)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.layer(x), labels)


@pytest.mark.parametrize("train", [True, False])
def test_export(train: bool) -> None:
    net = Net().train(train)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        net, (X, LABELS), dynamic_shapes={"x": {0: batch}, "labels": {0: batch}}
    )
    for n in (14, 5):
        exported = program.module()(X[:n], LABELS[:n])
        assert torch.equal(exported, net(X[:n], LABELS[:n]))


def test_make_fx() -> None:
    def both(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return with_grad(lambda x: energy(x, labels), x)

    graph = make_fx(both, tracing_mode="symbolic")(X, LABELS)
    assert "pfml_triton.potential_energy" in graph.code
    assert "pfml_triton.pull_back" in graph.code
    assert same(graph(X[:9], LABELS[:9]), with_grad(energy, X[:9]))


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        loss = PFMLLoss(4, 70)
        x = torch.empty(9, 70, requires_grad=True)
        loss(x, torch.empty(9, dtype=torch.int64)).backward()
        assert x.grad.shape == (9, 70)


def test_operations_are_counted_inside() -> None:
    with FlopCounterMode(display=False) as mode:
        with_grad(energy, X)
    assert mode.get_total_flops() > 0


@backends
def test_torch_func(backend: str) -> None:
    def of(x: Tensor) -> Tensor:
        return energy(x, backend=backend)

    value, grad = with_grad(of, X)
    grad = grad / 3
    ours, theirs = torch.func.grad_and_value(of)(X)
    assert torch.allclose(ours, grad)
    assert torch.equal(theirs, value)
    clouds = torch.stack([X, X + 0.1, 2 * X])
    each = [with_grad(of, x) for x in clouds]
    values, grads = (torch.stack(t) for t in zip(*each, strict=True))
    assert torch.equal(torch.func.vmap(of)(clouds), values)
    assert torch.allclose(torch.func.vmap(torch.func.grad(of))(clouds), grads / 3)
    assert torch.allclose(
        torch.func.grad(lambda x: torch.func.vmap(of)(x).sum())(clouds), grads / 3
    )
    psi = torch.func.vmap(
        lambda q: class_potential(q, X, LABELS, 1, POTENTIAL, backend=backend), in_dims=0
    )(clouds)
    assert torch.equal(psi[1], class_potential(clouds[1], X, LABELS, 1, POTENTIAL, backend=backend))


def test_an_ensemble_of_modules() -> None:
    """torch.func.functional_call with stacked parameters."""
    nets = [Net().eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)

    def of(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = torch.func.functional_call(nets[0], parameters, (X, LABELS))
        return value

    grads = torch.func.vmap(torch.func.grad(of))(stacked)
    for i, net in enumerate(nets):
        net(X, LABELS).backward()
        for name, parameter in net.named_parameters():
            assert torch.allclose(grads[name][i], parameter.grad, rtol=1e-5), name
    assert nets[0].loss.last_stats is not None


@pytest.mark.parametrize("call", ["energy", "class_potential"])
def test_second_derivatives_are_refused(call: str) -> None:
    def of(x: Tensor) -> Tensor:
        if call == "energy":
            return energy(x)
        return class_potential(x, X, LABELS, 1, POTENTIAL).sum()

    x = X + 0.1
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.jacrev(torch.func.grad(of))(x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(of, (x,), (x,))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    net = Net()
    ours, plain = [], []
    for found, apply in ((ours, checkpoint), (plain, None)):
        x = X.clone().requires_grad_()
        net.zero_grad()
        if apply is None:
            net(x, LABELS).backward()
        else:
            apply(net, x, LABELS, use_reentrant=reentrant).backward()
        found += [x.grad, *(p.grad.clone() for p in net.parameters())]
    assert same(tuple(ours), tuple(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The loss is that of float32 for what it is given, whatever the ambient dtype."""
    x = X.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        inside = with_grad(energy, x)
    assert same(inside, with_grad(energy, x))
    assert inside[0].dtype == torch.float32
    assert inside[1].dtype == dtype


def test_pickle_and_deepcopy_after_a_call() -> None:
    loss = PFMLLoss(3, 7)
    loss(X, LABELS)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.training_calls == 1
        assert torch.equal(twin(X, LABELS), loss(X, LABELS))
        loss.training_calls = 1
        twin._calls.add_(5)
        assert loss.training_calls == 1
    potential = pickle.loads(pickle.dumps(POTENTIAL))
    assert potential == POTENTIAL
