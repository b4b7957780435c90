"""What training tools do with the loss in one process: send it elsewhere, change its classes,
average, scale, clip and save it. Many ranks are in `test_distributed`."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel

from pfml_triton import PFMLLoss, Potential, class_potential, module
from pfml_triton.metric_learning import CrossBatchMemory

B, D, C, M = 12, 70, 5, 2  # of a depth at which the sketch turns
SETTINGS: dict[str, Any] = {"delta": 0.6, "delta_rep": 0.9, "min_distance": 0.1}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.arange(B) % C


def trained(steps: int = 3, **settings: Any) -> tuple[PFMLLoss, torch.optim.Optimizer]:
    loss = PFMLLoss(C, D, M, **SETTINGS | settings)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    train(loss, optimizer, steps)
    return loss, optimizer


def train(loss: PFMLLoss, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        x, labels = batch(step)
        optimizer.zero_grad()
        loss(x, labels % loss.num_classes).backward()
        optimizer.step()


# Other processes


def in_another_process(rank: int, loss: PFMLLoss, x: Tensor, folder: Path) -> None:
    """Train on: what is written in place must not come back to whoever sent it."""
    before = loss.training_calls
    loss(x, torch.arange(len(x)) % C)
    torch.save((before, loss.training_calls, loss.sketch_basis), folder / f"{rank}.pt")


@pytest.mark.parametrize(("start", "steps"), [("spawn", 3), ("forkserver", 0)])
def test_processes_that_are_started_with_the_loss(steps: int, start: str, tmp_path: Path) -> None:
    loss, _ = trained(steps)
    basis, (x, _) = loss.sketch_basis, batch(9)
    torch.multiprocessing.start_processes(
        in_another_process, (loss, x, tmp_path), nprocs=2, start_method=start
    )
    assert loss.training_calls == steps
    assert torch.equal(loss.sketch_basis, basis)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    loss(x, torch.arange(B) % C)
    for before, after, theirs in found:
        assert (before, after) == (steps, steps + 1)
        assert torch.equal(theirs, loss.sketch_basis)


def test_a_queue_of_another_process() -> None:
    """What is sent is pickled in a thread, when the sender may have gone on."""
    context = torch.multiprocessing.get_context("spawn")
    there, back = context.SimpleQueue(), context.SimpleQueue()
    loss, _ = trained()
    process = context.Process(target=pass_on, args=(there, back), daemon=True)
    process.start()
    there.put(loss)
    calls, kept = back.get()
    process.join()
    assert calls == 3
    assert kept == loss.sketch_basis.tolist()


def pass_on(there: Any, back: Any) -> None:
    loss = there.get()
    back.put((loss.training_calls, loss.sketch_basis.tolist()))


def test_copies_share_nothing_that_is_written() -> None:
    loss, _ = trained(1)
    whole = io.BytesIO()
    torch.save(loss, whole)
    whole.seek(0)
    for twin in (
        copy.deepcopy(loss), copy.copy(loss), pickle.loads(pickle.dumps(loss)),
        torch.load(whole, weights_only=False),
    ):  # fmt: skip
        twin(*batch(5))
        assert (loss.training_calls, twin.training_calls) == (1, 2)
        assert not torch.equal(loss.sketch_basis, twin.sketch_basis)


# Classes that come and go


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("classes", "keep"), [(8, None), (3, None), (5, None), (6, [4, 0]), (2, [3]), (2, []), (1, [2])]
)
def test_another_number_of_classes(classes: int, keep: list[int] | None, optimizer: str) -> None:
    """What was learned stays, and so does what the optimizer has of it; the rest is new."""
    loss = PFMLLoss(C, D, M, **SETTINGS)
    other = nn.Linear(3, 3)
    groups = [{"params": other.parameters(), "lr": 1.0}, *loss.param_groups(1e-4)]
    optim = OPTIMIZERS[optimizer](groups)
    train(loss, optim)
    old, state = loss.proxies, dict(optim.state[loss.proxies])
    calls, basis = loss.training_calls, loss.sketch_basis
    loss.set_num_classes(classes, optim, keep=keep)

    kept = list(range(min(C, classes))) if keep is None else keep
    assert loss.proxies.shape == (classes, M, D)
    assert torch.equal(loss.proxies[: len(kept)], old[kept])
    new = loss.proxies[len(kept) :].detach()
    if new.numel() > 200:
        assert new.square().mean() == pytest.approx(1 / D, rel=0.5)
    assert (loss.training_calls, loss.num_classes) == (calls, classes)
    assert torch.equal(loss.sketch_basis, basis)
    assert optim.param_groups[1]["params"] == [loss.proxies]
    assert optim.param_groups[1]["lr"] == 0.01
    assert old not in optim.state
    for name, value in optim.state[loss.proxies].items():
        before = state[name]
        if isinstance(before, Tensor) and before.dim() > 0 and len(before) == C:
            assert torch.equal(value[: len(kept)], before[kept]), name
            assert (value[len(kept) :] == (0.01 if name == "step_size" else 0)).all()
        else:
            assert value is before
    before = loss.proxies.detach().clone()
    train(loss, optim)
    assert not torch.equal(loss.proxies, before)


def test_classes_that_came_and_went() -> None:
    """The training goes on as it would have, to the bit."""
    (loss, optimizer), x = trained(), batch(7)
    twin, of_twin = copy.deepcopy((loss, optimizer))
    loss.set_num_classes(C + 3, optimizer)
    loss.set_num_classes(C, optimizer)
    for each, its in ((loss, optimizer), (twin, of_twin)):
        its.zero_grad()
        each(*x).backward()
        its.step()
    assert torch.equal(loss.proxies, twin.proxies)
    assert str(optimizer.state_dict()) == str(of_twin.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0, None), ValueError, "num_classes must be >= 1, got 0"),
        ((2.0, None), TypeError, "num_classes must be an int, got 2.0"),
        ((3, None, [0, 0]), ValueError, r"keep must be at most 3 different classes in \[0, 5\)"),
        ((3, None, [5]), ValueError, r"keep must be .* got \[5\]"),
        ((3, None, [0, 1, 2, 3]), ValueError, r"keep must be at most 3"),
        ((3, None, [-1]), ValueError, "keep must be >= 0, got -1"),
        ((3, None, ["a"]), TypeError, "keep must be an int, got 'a'"),
        ((3, torch.optim.SGD([torch.zeros(3)], 1.0)), ValueError, "must have the proxies of the"),
        ((3, torch.optim.LBFGS([torch.zeros(3)])), TypeError, "got LBFGS: make a new one"),
    ],
    ids=str,
)
def test_what_changes_no_classes(
    arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    loss, optimizer = trained()
    proxies, state = loss.proxies, str(optimizer.state_dict())
    number, given, *keep = arguments
    with pytest.raises(error, match=says):
        loss.set_num_classes(number, given, keep=keep[0] if keep else None)
    assert loss.proxies is proxies
    assert loss.num_classes == C
    assert str(optimizer.state_dict()) == state


def test_classes_that_come_in_inference_mode() -> None:
    loss, optimizer = trained()
    with torch.inference_mode():
        loss.set_num_classes(C + 1, optimizer)
    before = loss.proxies.detach().clone()
    train(loss, optimizer)
    assert not torch.equal(loss.proxies, before)


def test_numbers_of_numpy() -> None:
    loss = PFMLLoss(np.int64(C), np.int32(D), np.uint8(M), delta=np.float32(0.5))
    assert [type(n) for n in (loss.num_classes, loss.embedding_size)] == [int, int]
    loss.set_num_classes(np.int16(4), None, keep=np.arange(3))
    x, labels = batch()
    loss(x, labels.clamp_max(3))
    class_potential(x, x, labels, np.int64(2))
    CrossBatchMemory(loss, np.int64(D), np.int64(20))(x, labels.clamp_max(3))
    with pytest.raises(TypeError, match="num_classes must be an int, got .*True"):
        PFMLLoss(np.bool_(True), D)
    with pytest.raises(TypeError, match="memory_size must be an int, got 2.5"):
        CrossBatchMemory(loss, D, 2.5)


# Attributes


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("reduction", "men", ValueError, r"reduction must be one of \('sum', 'mean'\), got 'men'"),
        ("backend", "cuda", ValueError, "backend must be one of .*, got 'cuda'"),
        ("normalize", 1, TypeError, "normalize must be a bool, got 1"),
        ("prune", "no", TypeError, "prune must be a bool, got 'no'"),
        ("validate", None, TypeError, "validate must be a bool, got None"),
        ("num_classes", 0, ValueError, "num_classes must be >= 1, got 0"),
        ("embedding_size", 2.0, TypeError, "embedding_size must be an int, got 2.0"),
        ("proxies_per_class", -1, ValueError, "proxies_per_class must be >= 0, got -1"),
        ("potential", 3.0, TypeError, "potential must be a Potential, got 3.0"),
        ("alpha", 2, AttributeError, r"loss.potential = .*replace\(loss.potential, alpha=2\)"),
        ("delta", 0.5, AttributeError, "delta is a field of the potential"),
        ("delta_rep", 0.5, AttributeError, "delta_rep is a field of the potential"),
        ("min_distance", 0.5, AttributeError, "min_distance is a field of the potential"),
        ("training_calls", -1, ValueError, "training_calls must be >= 0, got -1"),
        ("last_stats", {}, AttributeError, "last_stats"),
        ("proxies", torch.zeros(3), TypeError, "as parameter 'proxies'"),
    ],
)
def test_what_cannot_be_assigned(name: str, value: Any, error: type[Exception], says: str) -> None:
    loss, _ = trained()
    before = {name: id(attribute) for name, attribute in vars(loss).items()}
    with pytest.raises(error, match=says):
        setattr(loss, name, value)
    assert {name: id(attribute) for name, attribute in vars(loss).items()} == before


def test_what_is_assigned_counts() -> None:
    loss, other = PFMLLoss(C, D, M), PFMLLoss(C, D, M, alpha=1.5, reduction="mean", prune=False)
    other.load_state_dict(loss.state_dict())
    loss.potential = dataclasses.replace(loss.potential, alpha=1.5)
    loss.reduction, loss.prune = "mean", False
    assert torch.equal(loss(*batch()), other(*batch()))
    assert loss.potential == Potential(1.5)


# Proxies that nobody trains


def warned(loss: PFMLLoss, steps: int, after: Callable[[], Any] = lambda: None) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            loss(*batch()).backward()
            after()
    return [str(w.message) for w in found if "proxies have not changed" in str(w.message)]


def test_calls_under_torch_func_are_not_watched() -> None:
    """Nothing of theirs is kept: an ensemble goes on, and the module can be copied."""
    losses = [PFMLLoss(C, D, 1) for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(losses)
    x, labels = batch()

    def of(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = torch.func.functional_call(losses[0], parameters, (x, labels))
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(module._PATIENCE + 2):
            torch.func.vmap(torch.func.grad(of))(stacked)
        for _ in range(3 * module._PATIENCE + 2):
            torch.func.grad(of)(dict(losses[0].named_parameters()))
            torch.func.grad(lambda x: losses[1](x, labels))(x)
    for twin in (copy.deepcopy(losses[0]), pickle.loads(pickle.dumps(losses[0]))):
        assert twin.training_calls == losses[0].training_calls > 400


def test_copies_and_loaded_proxies_are_watched() -> None:
    """Those that the optimizer does not know, because it has the original's."""
    loss = PFMLLoss(C, D, 1)
    optimizer = torch.optim.SGD(loss.parameters(), 0.1)
    assert warned(loss, 5, optimizer.step) == []
    assert len(warned(copy.deepcopy(loss), 310, optimizer.step)) == 1
    late = PFMLLoss(C, D, 1)
    warned(late, 1)
    late.load_state_dict(loss.state_dict())
    assert len(warned(late, 310)) == 1


@pytest.mark.parametrize("zeroed", [True, False])
def test_proxies_without_an_optimizer(zeroed: bool) -> None:
    loss = PFMLLoss(C, D, 1)
    after = loss.zero_grad if zeroed else lambda: None
    assert warned(loss, 300, after) == []
    (says,) = warned(loss, 10, after)
    assert "in 300 training calls: give them to the optimizer" in says
    assert warned(loss, 310) == []


def test_proxies_that_are_trained_frozen_or_not_there() -> None:
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        loss = PFMLLoss(C, D, 1)
        assert warned(loss, 310, torch.optim.Adam(loss.parameters(), **options).step) == []
        loss = PFMLLoss(C, D, 1).bfloat16()
        assert warned(loss, 310, torch.optim.SGD(loss.parameters(), 0.1, **options).step) == []
    x = torch.randn(B, D, requires_grad=True)
    for quiet in (
        PFMLLoss(C, D, 1).requires_grad_(False), PFMLLoss(C, D, 0), PFMLLoss(C, D, 1).eval(),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(310):
                quiet(x, batch()[1])
    late = PFMLLoss(C, D, 1)
    assert warned(late, 299) == []
    with torch.no_grad():
        late.proxies.mul_(1)  # a step
    assert warned(late, 400) == []


# Wrappers


class Model(nn.Module):
    """A network that owns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(4, D), PFMLLoss(C, D, M, **SETTINGS)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.loss(self.net(x), labels)
        return value


@pytest.mark.parametrize("scaled", [True, False])
def test_one_optimizer_for_all(scaled: bool) -> None:
    """Scaled, clipped together, moved in the middle, averaged: as by hand."""
    model = Model()
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    by_hand = torch.optim.AdamW(other.parameters(), lr=0.01)
    x, labels = torch.randn(B, 4), batch()[1]
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x, labels)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model.to("cpu")
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)

        by_hand.zero_grad()
        other(x, labels).backward()
        grads = [p.grad for p in other.parameters()]
        assert norm == pytest.approx(
            float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-5
        )
        for grad in grads:
            grad *= 1 / norm
        by_hand.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not torch.equal(average.module.loss.proxies, model.loss.proxies)
    assert average.module(x, labels).isfinite()


def test_stats_behind_wrappers() -> None:
    loss, x = PFMLLoss(C, D, M), batch()
    for wrapped, inner in (
        (torch.compile(loss, backend="aot_eager"), lambda w: w),
        (nn.DataParallel(loss), lambda w: w.module),
    ):
        loss._totals = None
        wrapped(*x)
        assert inner(wrapped).last_stats["active_share"] == 1


def test_muon_takes_the_network_and_adam_the_proxies() -> None:
    model = Model()
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(model.loss.parameters())
    optimizers = (
        torch.optim.Muon([model.net.weight], lr=0.01),
        torch.optim.AdamW([{"params": [model.net.bias]}, *model.loss.param_groups(1e-4)], lr=1e-4),
    )
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(B, 4), batch()[1]).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_training_resumes_to_the_bit(tmp_path: Path) -> None:
    """From the state alone, by way of a file."""
    runs = []
    for stops in (False, True):
        torch.manual_seed(2)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(9):
            if stops and step == 5:
                torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
                model = Model()
                optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
                states = torch.load(tmp_path / "state")
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            x = torch.randn(B, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x, batch()[1]).backward()
            optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert "loss._extra_state" in runs[0]


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    loss, _ = trained()
    safetensors.save_file(loss.state_dict(), tmp_path / "loss.safetensors")
    fresh = PFMLLoss(C, D, M)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "loss.safetensors"))
    assert torch.equal(fresh.proxies, loss.proxies)
    assert fresh.training_calls == 3


# float16


def test_float16_with_a_default_scaler() -> None:
    """The gradients of the sum are large: it skips its first steps, then trains."""
    torch.manual_seed(0)
    net, loss = nn.Linear(64, 64), PFMLLoss(100, 64, 15)
    optimizer = torch.optim.Adam([{"params": net.parameters()}, *loss.param_groups(1e-4)], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    centres, skipped, energies = torch.randn(100, 64), 0, []
    for _ in range(60):
        labels = torch.randint(0, 100, (100,))
        with torch.autocast("cpu", torch.float16):
            embeddings = net(centres[labels] + 0.3 * torch.randn(100, 64))
        optimizer.zero_grad()
        scaler.scale(loss(embeddings, labels)).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        energies.append(float(loss.last_stats["active_energy"]))
    assert 4 <= skipped <= 11
    assert energies[-1] < energies[0] / 3


def test_float16_of_a_mean_needs_a_scaler() -> None:
    """At SOP's number of points the mean's gradient is below the least float16."""
    loss = PFMLLoss(11_318, 32, 2, reduction="mean", delta=0.4)
    x = torch.randn(100, 32, dtype=torch.float16, requires_grad=True)
    value = loss(x, torch.arange(100))
    for scale, zeros in ((1.0, (0.9, 1.0)), (2.0**16, (0.0, 0.1))):
        (grad,) = torch.autograd.grad(scale * value, x, retain_graph=True)
        assert zeros[0] <= float((grad == 0).float().mean()) <= zeros[1]


# Calls that leave nothing behind


def test_fake_tensors_leave_the_module_as_it_was() -> None:
    """Those of make_fx and those that are entered by hand, in training, before a real call."""
    x, labels = batch()
    for fake in (
        lambda loss: make_fx(loss, tracing_mode="fake", _allow_non_fake_inputs=True)(x, labels),
        lambda loss: make_fx(loss, tracing_mode="real")(x, labels),
        lambda loss: make_fx(
            lambda p, x, y: torch.func.functional_call(loss, p, (x, y)), tracing_mode="symbolic"
        )(dict(loss.named_parameters()), x, labels),
        in_fake_mode,
        lambda loss: loss.to("meta")(x.to("meta"), labels.to("meta")),
    ):
        loss, twin = PFMLLoss(C, D, M), PFMLLoss(C, D, M)
        twin.load_state_dict(loss.state_dict())
        fake(loss)
        assert loss.last_stats is None or not loss.proxies.is_meta
        loss = loss.to_empty(device="cpu")
        assert loss.training_calls == 0
        loss.load_state_dict(twin.state_dict())
        assert torch.equal(loss(x, labels), twin(x, labels))
        assert loss.training_calls == 1
        assert {name: type(v) for name, v in vars(loss).items()} == {
            name: type(v) for name, v in vars(twin).items()
        }


def in_fake_mode(loss: PFMLLoss) -> None:
    x, labels = batch()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss(mode.from_tensor(x), mode.from_tensor(labels))


def test_copies_of_a_fake_module() -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        loss = PFMLLoss(C, D, M)
        copy.deepcopy(loss)(torch.empty(B, D), torch.empty(B, dtype=torch.int64))
        loss.set_num_classes(C + 1, None)


@pytest.mark.parametrize("train", [True, False])
def test_the_meta_device(train: bool) -> None:
    loss = PFMLLoss(C, D, M).train(train).to("meta")
    x, labels = (t.to("meta") for t in batch())
    x.requires_grad_()
    value = loss(x, labels, None, x.detach(), labels)
    value.backward()
    assert value.shape == ()
    assert value.is_meta
    assert x.grad.shape == (B, D)
    assert loss.proxies.grad.shape == (C, M, D)


def test_torch_func_in_training() -> None:
    """The default mode: the sketch turns as it does in eager mode."""
    ours, theirs = PFMLLoss(C, D, M), PFMLLoss(C, D, M)
    theirs.load_state_dict(ours.state_dict())
    parameters = dict(ours.named_parameters())

    def of(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(ours, parameters, (x, labels))
        return value

    for call in range(6):
        x, labels = batch(call)
        grads = torch.func.grad(of)(parameters, x, labels)
        theirs.zero_grad()
        theirs(x, labels).backward()
        assert torch.allclose(grads["proxies"], theirs.proxies.grad, rtol=1e-5)
        assert torch.equal(ours.sketch_basis, theirs.sketch_basis)
        assert ours.training_calls == theirs.training_calls == call + 1
    jacobian = torch.func.jacrev(of, argnums=1)(parameters, x, labels)
    assert jacobian.shape == x.shape
    clouds, basis = torch.randn(3, B, D), ours.sketch_basis
    ours.training_calls = 0
    grads = torch.func.vmap(torch.func.grad(of), in_dims=(None, 0, None))(
        parameters, clouds, labels
    )
    assert grads["proxies"].shape == (3, C, M, D)
    assert ours.training_calls == 1
    theirs.sketch_basis = basis
    theirs.update_sketch(clouds.flatten(0, 1))
    assert torch.equal(ours.sketch_basis, theirs.sketch_basis)


def test_the_memory_makes_no_graphs() -> None:
    """Its position would be another one in every call."""
    counter = CompileCounterWithBackend("aot_eager")
    memory = CrossBatchMemory(PFMLLoss(C, D, M), D, 30)
    compiled, alone = torch.compile(memory, backend=counter), copy.deepcopy(memory)
    for step in range(20):
        x, labels = batch(step)
        assert torch.equal(compiled(x, labels), alone(x, labels))
    assert counter.frame_count <= 1
