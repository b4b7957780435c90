"""The loss over 1 to 4 processes, with gloo: what every one of them finds is what one would.

A number of processes is started once, and goes through all checks; a check is a function of its
rank's `World` that raises if it fails.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import itertools
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from pfml_triton import PFMLLoss, distributed, module, operators, torch_backend
from pfml_triton.distributed import ShardedPFMLLoss
from pfml_triton.metric_learning import CrossBatchMemory
from tests import interpreter  # noqa: F401  # in the processes as well

C, M, D, B = 5, 2, 7, 12
SETTINGS: dict[str, Any] = {"delta": 0.6, "delta_rep": 0.9, "min_distance": 0.1}
PATIENCE = timedelta(seconds=120)  # until ranks that wait for each other are a failure


@dataclass
class World:
    """What a check knows: it runs on every rank at once."""

    rank: int
    size: int
    folder: Path
    thorough: bool = False
    met: int = 0  # times

    def meet(self) -> None:
        dist.init_process_group(
            init_method=f"file://{self.folder}/meet{self.size}.{self.met}", rank=self.rank,
            world_size=self.size, timeout=PATIENCE,
        )  # fmt: skip
        self.met += 1

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def loss(self, **settings: Any) -> ShardedPFMLLoss:
        return ShardedPFMLLoss(C, D, M, **SETTINGS | settings)

    def pair(self, **settings: Any) -> tuple[ShardedPFMLLoss, PFMLLoss]:
        """The loss of many processes and that of one, with the same proxies."""
        many = self.loss(**settings)
        one = PFMLLoss(C, D, M, **SETTINGS | settings)
        one.load_state_dict(many.state_dict())
        return many, one

    def share(self, rows: int = B) -> slice:
        """This rank's rows of a batch: uneven, and none for the second of three ranks or more."""
        weights = [0 if i == 1 and self.size > 2 else i + 1 for i in range(self.size)]
        ends = [round(rows * sum(weights[: i + 1]) / sum(weights)) for i in range(self.size)]
        return slice(ends[self.rank - 1] if self.rank else 0, ends[self.rank])


def batch(rows: int = B, depth: int = D, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, depth, generator=generator).to(dtype), torch.arange(rows) % C


def near(ours: Tensor, theirs: Tensor, allowed: float = 1e-6) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert torch.allclose(ours.double(), theirs.double(), rtol=0, atol=allowed * scale), (
        f"{float((ours.double() - theirs.double()).abs().max()):.3g} of {scale:.3g}"
    )


def same_on_all(world: World, ours: Tensor) -> None:
    """Bit for bit."""
    every = [torch.empty_like(ours) for _ in range(world.size)]
    dist.all_gather(every, ours.detach().contiguous())
    assert all(torch.equal(theirs, every[0]) for theirs in every)


def gradients(world: World, dtype: torch.dtype, exact: bool, **settings: Any) -> None:
    many, one = world.pair(**settings)
    x, labels = batch(dtype=dtype)
    ours = x[world.share()].clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    value, whole = many(ours, labels[world.share()]), one(theirs, labels)
    (3 * value).backward()
    (3 * whole).backward()
    near(value, whole)
    # What the ranks will average is as many times too large.
    assert ours.grad is not None
    assert theirs.grad is not None
    rounding = {torch.bfloat16: 2.0**-7, torch.float64: 1e-12}.get(dtype, 1e-6)
    near(ours.grad / world.size, theirs.grad[world.share()], rounding)
    near(many.proxies.grad, one.proxies.grad)
    if exact:  # a row is the same sum
        assert torch.equal(ours.grad, world.size * theirs.grad[world.share()])
        assert torch.equal(many.proxies.grad, one.proxies.grad)
    stats, of_one = many.last_stats, one.last_stats
    assert stats is not None
    assert of_one is not None
    for name in ("attracting_pairs", "repelling_pairs", "smallest_distance"):
        near(stats[name], of_one[name])
    near(stats["active_energy"], of_one["active_energy"], 1e-5)
    same_on_all(world, value)
    same_on_all(world, many.proxies.grad)


def gradients_of_torch(world: World) -> None:
    gradients(world, torch.float32, exact=False, backend="torch")
    gradients(world, torch.float64, exact=False, backend="torch", reduction="mean")
    gradients(world, torch.bfloat16, exact=False, backend="torch", normalize=False)


def gradients_of_the_kernels(world: World) -> None:
    """Bit for bit those of one process; three times is no power of two, so a multiple rounds."""
    exact = world.size != 3
    gradients(world, torch.float32, exact=exact, backend="triton")
    gradients(world, torch.float32, exact=exact, backend="triton", prune=False, reduction="mean")


def network_is_that_of_one(world: World, wrapped: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, D))
    many, one = world.pair()
    alone = copy.deepcopy(net)
    x, labels = batch(depth=4)
    model = wrapped(net)  # whose hooks average the gradients, as long as it lives
    many(model(x[world.share()]), labels[world.share()]).backward()
    one(alone(x), labels).backward()
    ours = [*net.parameters(), many.proxies]
    for mine, theirs in zip(ours, [*alone.parameters(), one.proxies], strict=True):
        near(whole(mine.grad), theirs.grad)


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def mesh_of(world: World) -> DeviceMesh:
    return init_device_mesh("cpu", (world.size,))


def network_under_ddp(world: World) -> None:
    network_is_that_of_one(world, DistributedDataParallel)


def network_under_fsdp2(world: World) -> None:
    network_is_that_of_one(world, lambda net: fully_shard(net, mesh=mesh_of(world)))


class Model(nn.Module):
    """A network that owns its loss."""

    def __init__(self, loss: PFMLLoss) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.loss = nn.Linear(4, D), loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.loss(self.net(x), labels)
        return value


def with_the_loss(
    world: World,
    wrapped: Callable[[Model], Callable[..., Tensor]],
    max_norm: float = 1e9,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Three steps of a model that owns the loss, as those of one process.

    All parameters are in one optimizer and clipped together, and an average follows them (which
    fully_shard does not allow).
    """
    ours, theirs = (Model(loss).double() for loss in world.pair())
    called, averages = wrapped(ours), []
    for model, call, share in ((ours, called, world.share()), (theirs, theirs, slice(None))):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        average = None if isinstance(model, FSDPModule) else AveragedModel(model)
        for step in range(3):
            x, labels = batch(depth=4, dtype=torch.float64)
            optimizer.zero_grad()
            value = call((x + step)[share], labels[share])
            if model is ours and scaler is not None:
                scaler.scale(value).backward()
                scaler.unscale_(optimizer)
            else:
                value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            model.to("cpu")  # which must not lose a gradient
            if model is ours and scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if average is not None:
                average.update_parameters(model)
        averages.append(average)
    pairs = [(ours, theirs)] if averages[0] is None else [(ours, theirs), averages]
    for a, b in pairs:
        for mine, of_one in zip(a.parameters(), b.parameters(), strict=True):
            near(whole(mine), of_one, 1e-9)
    assert ours.loss.last_stats is not None
    assert ours.loss.training_calls == theirs.loss.training_calls


def in_a_model(world: World) -> None:
    """Under each wrapper, clipped or not."""
    for max_norm in (1e9, 10.0):
        with_the_loss(world, DistributedDataParallel, max_norm)
        with_the_loss(world, lambda model: each_wrapped(model), max_norm)
        with_the_loss(world, lambda model: fully_shard(model, mesh=mesh_of(world)), max_norm)
        with_the_loss(world, lambda model: both_sharded(model, mesh_of(world)), max_norm)
    with_the_loss(world, DistributedDataParallel, 10.0, torch.amp.GradScaler("cpu"))
    with_the_loss(
        world, lambda model: DistributedDataParallel(model, find_unused_parameters=True), 10.0
    )
    with_the_loss(world, lambda model: DistributedDataParallel(model, static_graph=True), 10.0)


def each_wrapped(model: Model) -> Callable[..., Tensor]:
    """As `Accelerator.prepare(network, loss)` does it."""
    net, loss = DistributedDataParallel(model.net), DistributedDataParallel(model.loss)
    return lambda x, labels: loss(net(x), labels)


def both_sharded(model: Model, mesh: DeviceMesh) -> Model:
    fully_shard(model.loss, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def accumulation(world: World) -> None:
    """Two batches a step, the first of them without averaging."""
    ours, theirs = (Model(loss).double() for loss in world.pair())
    ddp, share = DistributedDataParallel(ours), world.share()
    x, labels = batch(depth=4, dtype=torch.float64)
    with ddp.no_sync():
        ddp(x[share], labels[share]).backward()
    ddp(x[share] + 1, labels[share]).backward()
    theirs(x, labels).backward()
    theirs(x + 1, labels).backward()
    for mine, of_one in zip(ours.parameters(), theirs.parameters(), strict=True):
        near(mine.grad, of_one.grad, 1e-9)


def sharded_and_called_from_outside(world: World) -> None:
    """Where the hooks of fully_shard do not see it."""
    many, _ = world.pair()
    model = Model(many)
    fully_shard(model, mesh=mesh_of(world))
    x, labels = batch()
    with pytest.raises(TypeError, match="proxies must be a plain parameter in forward, got a DTe"):
        model.loss(x, labels)
    with pytest.raises(TypeError, match="set_num_classes comes before fully_shard"):
        model.loss.set_num_classes(C + 1, None)


def training(world: World) -> None:
    """Ten steps of Adam: the network and the proxies follow those of one process."""
    torch.manual_seed(1)
    net = nn.Linear(4, D).double()
    many, one = (loss.double() for loss in world.pair())
    alone = copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    steps = []
    for model, loss in ((ddp, many), (alone, one)):
        groups = [{"params": model.parameters()}, *loss.param_groups(lr=1e-3)]
        steps.append((model, loss, torch.optim.Adam(groups, lr=1e-3)))
    for step in range(10):
        rows = B - step  # a batch of another size every time
        x, labels = batch(rows, 4, torch.float64)
        for (model, loss, optimizer), share in zip(
            steps, (world.share(rows), slice(None)), strict=True
        ):
            optimizer.zero_grad()
            loss(model(x[share]), labels[share]).backward()
            optimizer.step()
    for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
        near(ours.detach(), theirs.detach(), 1e-9)
    near(many.proxies, one.proxies, 1e-9)
    same_on_all(world, many.proxies)
    assert many.training_calls == one.training_calls == 10


def out_of_step(world: World) -> None:
    """Ranks with fewer batches go on with empty ones, until the last has none left."""
    torch.manual_seed(1)
    net = nn.Linear(4, D).double()
    many, one = (loss.double() for loss in world.pair())
    alone = copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    x, labels = batch(depth=4, dtype=torch.float64)
    own = [slice(2 * i, 2 * i + 2) for i in range(world.rank, 6, world.size)]
    own = own[: world.rank + 1]  # as many batches as the rank's number, and one
    steps = torch.tensor(len(own))
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own)
    for step in range(int(steps)):
        mine = own[step] if step < len(own) else slice(0)
        ddp.zero_grad()
        many(ddp(x[mine]), labels[mine]).backward()
        rows = torch.cat([torch.arange(B)[s[step]] for s in everyone if step < len(s)])
        alone.zero_grad()
        one(alone(x[rows]), labels[rows]).backward()
        for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
            near(ours.grad, theirs.grad, 1e-9)


def a_loss_under_fsdp2(world: World) -> None:
    """One that is not sharded: the proxies are whole in forward, and every rank's field its own."""
    _, one = world.pair()
    sharded = copy.deepcopy(one)
    fully_shard(sharded, mesh=mesh_of(world))
    x, labels = batch()
    value, expected = sharded(x, labels), one(x, labels)
    assert torch.equal(value, expected)
    value.backward()
    expected.backward()
    near(sharded.proxies.grad.full_tensor(), one.proxies.grad)


def memory_bank(world: World) -> None:
    many, one = world.pair()
    x, labels = batch()
    bank, bank_labels = x.roll(1, 0) + 0.2, labels.roll(2)
    share = world.share()
    ours, theirs = x[share].clone().requires_grad_(), x.clone().requires_grad_()
    value = many(ours, labels[share], ref_emb=bank[share], ref_labels=bank_labels[share])
    whole = one(theirs, labels, ref_emb=bank, ref_labels=bank_labels)
    near(value, whole)
    value.backward()
    whole.backward()
    near(ours.grad / world.size, theirs.grad[share])
    near(many.proxies.grad, one.proxies.grad)
    with pytest.raises((ValueError, RuntimeError), match="ref_emb receives no force|rank . of ."):
        many(ours, labels[share], ref_emb=ours, ref_labels=labels[share])


def the_sketch_turns_alike(world: World) -> None:
    many, one = ShardedPFMLLoss(C, 70, 1), PFMLLoss(C, 70, 1)
    x, labels = batch(depth=70)
    for _ in range(3):
        many(x[world.share()], labels[world.share()])
        one(x, labels)
    near(many.sketch_basis, one.sketch_basis)
    assert not torch.equal(many.sketch_basis, PFMLLoss(C, 70, 1).sketch_basis)
    bases = [torch.empty(70 * 60) for _ in range(world.size)]
    dist.all_gather(bases, many.sketch_basis.float().flatten())
    assert all(torch.equal(basis, bases[0]) for basis in bases)


def no_batch_at_all(world: World) -> None:
    many, one = world.pair()
    value, whole = (loss(torch.empty(0, D), torch.empty(0).long()) for loss in (many, one))
    near(value, whole)
    value.backward()
    whole.backward()
    near(many.proxies.grad, one.proxies.grad)


def dtypes_that_differ(world: World) -> None:
    """The widest of them serves all."""
    many, one = world.pair()
    x, labels = batch(dtype=torch.float64)
    mine = x[world.share()].to(torch.float64 if world.rank == 0 else torch.bfloat16)
    ours = mine.clone().requires_grad_()
    value = many(ours, labels[world.share()])
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, mine.double())
    assert value.dtype == torch.float64
    near(value, one(torch.cat(parts), labels), 1e-9)
    value.backward()
    assert ours.grad.dtype == ours.dtype


def compiled_around(world: World) -> None:
    many, one = world.pair()
    x, labels = batch()
    share = world.share()
    value = torch.compile(many, backend="aot_eager")(x[share], labels[share])
    near(value, one(x, labels))
    value.backward()
    assert many.proxies.grad is not None


def no_proxies(world: World) -> None:
    many, one = ShardedPFMLLoss(C, D, 0, **SETTINGS), PFMLLoss(C, D, 0, **SETTINGS)
    x, labels = batch()
    ours = x[world.share()].clone().requires_grad_()
    value = many(ours, labels[world.share()])
    near(value, one(x, labels))
    value.backward()
    assert ours.grad is not None


def nan_everywhere(world: World) -> None:
    """A point of the last rank that is not finite shows on all."""
    many, _ = world.pair()
    x, labels = batch()
    x[-1, 3] = torch.nan
    ours = x[world.share()].clone().requires_grad_()
    value = many(ours, labels[world.share()])
    value.backward()
    assert value.isnan()
    assert ours.grad.isnan().all()
    assert many.proxies.grad.isnan().all()


def all_in_error(world: World, of_last: Callable[[], Any], says: str, call: Any) -> None:
    """What the last rank does is an error there, and what the others do is one that names it."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        of_last() if world.is_last else call()
    others = f"rank {world.size - 1} of {world.size} failed, and so do all: .*{says}"
    assert caught.match(says if world.is_last else others)


def a_wrong_label_shows_everywhere(world: World) -> None:
    """One of the last rank, where nobody looks at them: NaN on all, and counted once."""
    many, _ = world.pair()
    x, labels = batch()
    labels[-1] = C
    ours = x[world.share()].clone().requires_grad_()
    with mock.patch.object(operators, "check_range"):
        value = many(ours, labels[world.share()])
    value.backward()
    assert value.isnan()
    assert many.last_stats["labels_out_of_range"] == 1
    assert ours.grad.isnan().all()
    assert many.proxies.grad.isnan().all()


def one_rank_in_error(world: World) -> None:
    """Nobody hangs, everybody hears of it, and the next call works."""
    many, _ = world.pair()
    x, labels = batch()
    x, labels = x[world.share()], labels[world.share()]
    for bad, says in (
        (lambda: many(x, labels + C), r"labels must be in \[0, 5\)"),
        (lambda: many(x[:, :3], labels), r"embeddings must be \[B, 7\]"),
        (lambda: many(x.numpy(), labels), "embeddings must be a Tensor"),
        (lambda: many(x, labels, object()), "indices_tuple must be None"),
        (lambda: many(x, labels, None, x), "ref_emb and ref_labels go together"),
        (lambda: in_fake_mode(many, x, labels), "cannot be called with fake tensors or make_fx"),
        (lambda: torch.func.grad(lambda x: many(x, labels))(x), "cannot be called under torch.fu"),
    ):
        all_in_error(world, bad, says, lambda: many(x, labels))
        assert many(x, labels).isfinite()
    if world.is_last:
        many.num_classes += 1
    all_in_error(world, lambda: many(x, labels), "proxies must be", lambda: many(x, labels))
    many.num_classes = C
    many.validate = True
    if world.is_last:
        with torch.no_grad():
            many.proxies[0, 0, 0] = torch.nan
    if world.size == 1:  # the last rank's share of the proxies, if it has any, is not all
        all_in_error(world, lambda: many(x, labels), "proxies must be finite", None)


def in_fake_mode(loss: PFMLLoss, *given: Tensor) -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        loss(*given)


FAULTS = (RuntimeError("no luck"), MemoryError("too much"), KeyboardInterrupt("stop"))


def one_rank_fails_anywhere(world: World) -> None:
    """Wherever that is in a step, before, between and after the collectives."""
    x, labels = batch(depth=70)
    x, labels = x[world.share()], labels[world.share()]

    def step(loss: ShardedPFMLLoss) -> None:
        loss(x.clone().requires_grad_(), labels).backward()

    places = (
        (distributed, "_packed"), (distributed.Ranks, "room"), (distributed, "total_energy"),
        (distributed.Ranks, "share"), (operators.PotentialEnergy, "forward"),
        (operators.PotentialEnergy, "backward"), (operators, "turn_now"), (module, "turn_basis"),
        (torch_backend, "field_terms"), (torch_backend, "pull_back"), (torch, "promote_types"),
    )  # fmt: skip
    cases = itertools.product(places, FAULTS, (0, 1))
    for (owner, name), fault, warm in itertools.islice(cases, 0, None, 1 if world.thorough else 5):
        loss = ShardedPFMLLoss(C, 70, 1)
        for _ in range(warm):  # more memory is wanted in the first call
            step(loss)
        loss.training_calls = 0
        call = partial(step, loss)
        failing = mock.patch.object(owner, name, side_effect=fault)
        with failing if world.is_last else nullcontext():
            all_in_error(world, call, str(fault), call)
        loss.zero_grad()
        call()
        assert loss.proxies.grad.isfinite().all()


def whatever_the_error_says(world: World) -> None:
    """Text that is no UTF-8, and none at all."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    many, _ = world.pair()
    x, labels = batch()
    for error, says in ((OSError("\udcff file"), "OSError: . file"), (Mute(), "Mute")):
        failing = mock.patch.object(distributed, "_packed", side_effect=error)
        with failing if world.is_last else nullcontext(), pytest.raises(Exception) as caught:  # noqa: PT011
            many(x, labels)
        if world.is_last:
            assert caught.value is error
        else:
            assert caught.match(
                f"rank {world.size - 1} of {world.size} failed, and so do all: {says}"
            )


def one_rank_has_something_else(world: World) -> None:
    """A copy of the loss, a memory bank, or what raises an error late."""
    x, labels = batch()
    x, labels = x[world.share()].clone().requires_grad_(), labels[world.share()]
    many, _ = world.pair()
    many(x, labels)
    loss = copy.deepcopy(many) if world.is_last else many  # which has gathered nothing yet
    assert torch.equal(loss(x, labels), many(x, labels))

    def expanded() -> None:
        loss = ShardedPFMLLoss(C, D, 1, **SETTINGS)
        if world.is_last:
            loss.proxies = nn.Parameter(torch.ones(1, 1, 1).expand(C, 1, D))
        loss(x, labels)

    def warned() -> None:
        loss = ShardedPFMLLoss(C, D, M, **SETTINGS)
        if world.is_last:
            loss._unmoved, loss._bits = (3 * module._PATIENCE, loss.proxies._version), True
        with warnings.catch_warnings():
            warnings.simplefilter("error" if world.is_last else "ignore")
            loss(x, labels)

    def hooked() -> None:
        def packed(t: Tensor) -> Tensor:
            if world.is_last:
                raise RuntimeError("no room")
            return t

        with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
            many(x, labels)

    def remembered() -> None:
        memory = CrossBatchMemory(many, D, 12)
        rows = torch.arange(13 if world.is_last else 3) % C
        memory(torch.randn(len(rows), D), rows)

    def many_gradients() -> None:
        value = many(x, labels)
        batched, count = world.is_last, torch.ones(2)
        torch.autograd.grad(
            value, many.proxies, count if batched else None, is_grads_batched=batched
        )

    for call, says in (
        (expanded, "more than one element"), (warned, "have not changed in 300 training calls"),
        (hooked, "no room"), (remembered, "memory_size must be at least the rows of a batch"),
        (many_gradients, "atching rule|no batches of gradients"),
    ):  # fmt: skip
        all_in_error(world, call, says, call)
        assert many(x, labels).isfinite()


class FailsAt(TorchDispatchMode):
    """An error at one of the package's operations in a step, but for those of an agreement."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left, self.is_agreeing = at, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_agreeing and is_of_the_package() and not func.name().startswith("c10d"):
            self.left -= 1
            if self.left == 0:
                raise ValueError(f"at {func.name()}")
        return func(*args, **kwargs or {})


def is_of_the_package() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("pfml_triton"):
            return True
        frame = frame.f_back
    return False


def an_operation_that_fails(world: World) -> None:
    """Any of those of a step, at first, when memory for more points is wanted, and later."""
    x, labels = batch(depth=70)
    x, labels = x[world.share()].clone().requires_grad_(), labels[world.share()]
    bank, agree = x.detach() + 0.1, distributed.Ranks._agree

    def step(loss: ShardedPFMLLoss) -> None:
        loss(x, labels, None, bank, labels).backward()

    every = 1 if world.thorough else 101
    for warm in (0, 1):
        at, is_through = 1, False
        while not is_through:
            loss = ShardedPFMLLoss(C, 70, M, **SETTINGS)
            for _ in range(warm):
                step(loss)
            mode = FailsAt(at)

            def agreed(ranks: Any, *args: Any) -> Any:
                mode.is_agreeing = True  # noqa: B023
                try:
                    return agree(ranks, *args)
                finally:
                    mode.is_agreeing = False  # noqa: B023

            found = None
            with mock.patch.object(distributed.Ranks, "_agree", agreed):
                try:
                    with mode if world.is_last else nullcontext():
                        step(loss)
                except Exception as error:
                    found = str(error)
            through = torch.tensor(int(world.is_last and mode.left > 0))
            dist.all_reduce(through)
            is_through = bool(through)
            assert (found is None) == is_through, found
            if not is_through:
                assert "at aten" in found, found
            loss.zero_grad()
            step(loss)
            at += every


def ranks_out_of_step(world: World) -> None:
    """A rank that goes on without backward meets the others there."""
    if world.size == 1:
        return
    many, _ = world.pair()
    x, labels = batch()
    value = many(x[world.share()], labels[world.share()])
    with pytest.raises(RuntimeError, match="equally often, forward and backward, got .*'forward'"):
        many(x, labels) if world.is_last else value.backward()
    assert many(x, labels).isfinite()


def tensors_of_any_layout(world: World) -> None:
    """A tensor of one element passes for contiguous, whatever its stride."""
    many, one = world.pair()
    wide, labels = batch(2 * world.size * 5)
    pairs = torch.stack([labels, labels + 1], 1)
    for start in (0, 1):
        for rows in (0, 1, 2, 3):
            mine = slice(rows * world.rank, rows * (world.rank + 1))
            every = slice(rows * world.size)
            for x, y in (
                (wide[start::2], pairs[start::2, 0]),
                (wide[:, :1].expand(-1, D), labels.flip(0)[:1].expand(len(labels))),
                (wide.T.contiguous().T, labels.to(torch.uint8)),
                (torch.stack([wide, wide], 2)[..., start], pairs.to(torch.int16)[:, 0]),
            ):
                ours = x[mine].detach().requires_grad_()
                value = many(ours, y[mine], None, x[mine], y[mine])
                value.backward()
                near(value, one(x[every], y[every], None, x[every], y[every]))
                assert ours.grad.shape == ours.shape


def losses_that_differ(world: World) -> None:
    x, labels = batch()
    if world.size == 1:
        return
    first = world.rank == 0
    for settings in (
        {"proxies_per_class": M + first}, {"num_classes": C + first}, {"normalize": first},
        {"alpha": 2.0 + first}, {"reduction": ("sum", "mean")[first]},
    ):  # fmt: skip
        given = {"num_classes": C, "embedding_size": D, "proxies_per_class": M} | settings
        with pytest.raises(ValueError, match="the same loss, got on rank 0 proxies"):
            ShardedPFMLLoss(**given)(x, labels)
    for changed in (
        lambda loss: loss.train(first), lambda loss: loss.requires_grad_(first),
        lambda loss: loss.double() if first else loss,
    ):  # fmt: skip
        loss = world.loss()
        changed(loss)
        with pytest.raises(ValueError, match="the same loss, got on rank 0 proxies"):
            loss(x, labels)


def dtensors_are_refused(world: World) -> None:
    x, labels = batch()
    for loss in world.pair():
        with pytest.raises(TypeError, match=r"embeddings must be a plain Tensor, .*to_local"):
            loss(distribute_tensor(x, mesh_of(world), [Replicate()]), labels)
        with pytest.raises(TypeError, match=r"labels must be a plain Tensor, .*to_local"):
            loss(x, distribute_tensor(labels, mesh_of(world), [Replicate()]))


def proxies_of_rank_0(world: World) -> None:
    """At first, and after all that draws or loads them."""
    torch.manual_seed(world.rank)
    loss = ShardedPFMLLoss(C, D, M, **SETTINGS)
    x, labels = batch()
    labels = labels.clamp_max(C - 2)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for changed in (
        lambda: None,
        lambda: loss.reset_parameters(),
        lambda: loss.load_state_dict(PFMLLoss(C, D, M).state_dict()),
        lambda: loss.set_num_classes(C + 2, optimizer),
        lambda: loss.set_num_classes(C - 1, optimizer, keep=[2, 6]),
        lambda: loss.load_state_dict({"proxies": torch.randn(C - 1, M, D)}, strict=False),
        lambda: assign(loss, optimizer, torch.randn(C + 1, M, D)),
    ):
        changed()
        ours = loss.proxies.detach().clone()
        every = [torch.empty_like(ours) for _ in range(world.size)]
        dist.all_gather(every, ours)
        assert all(not torch.equal(other, every[0]) for other in every[1:])
        optimizer.zero_grad()
        loss(x[world.share()], labels[world.share()]).backward()
        assert torch.equal(loss.proxies, every[0])
        optimizer.step()
        same_on_all(world, loss.proxies)
        assert not torch.equal(loss.proxies, every[0])


def assign(loss: PFMLLoss, optimizer: torch.optim.Optimizer, proxies: Tensor) -> None:
    loss.num_classes, loss.proxies = len(proxies), nn.Parameter(proxies)
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = [loss.proxies]


def proxies_that_cannot_be_written(world: World) -> None:
    """Of fully_shard with replicas, or of a parametrization: they have to be equal."""
    if world.size == 1:
        return
    x, labels = batch()

    def replicated(loss: PFMLLoss) -> None:
        fully_shard(loss, mesh=init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("r", "s")))

    def parametrized(loss: PFMLLoss) -> None:
        nn.utils.parametrize.register_parametrization(loss, "proxies", nn.Identity())

    for wrapped in (replicated, parametrized):
        for differ in (True, False):
            torch.manual_seed(world.rank if differ else 0)
            loss, one = world.pair()
            wrapped(loss)
            if wrapped is parametrized:
                wrapped(one)
            if differ:
                with pytest.raises(Exception, match="must be equal on all ranks, got others on"):
                    loss(x[world.share()], labels[world.share()])
            else:
                near(loss(x[world.share()], labels[world.share()]), one(x, labels))


def built_before_there_is_a_group(world: World) -> None:
    """The group of a call is the one that there is then."""
    one, x, labels = PFMLLoss(C, D, M), *batch()
    loss = ShardedPFMLLoss(C, D, M)
    loss.load_state_dict(one.state_dict())
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"there is none yet: call .*init_process_group\(\)"):
        loss(x, labels)
    for _ in range(2):
        world.meet()
        near(loss(x[world.share()], labels[world.share()]), one(x, labels))
        dist.destroy_process_group()
    world.meet()


def groups_of_some_ranks(world: World) -> None:
    """Those that are given, and copies of the loss keep."""
    groups = [dist.new_group([rank]) for rank in range(world.size)]
    loss = ShardedPFMLLoss(C, D, M, process_group=groups[world.rank])
    one = PFMLLoss(C, D, M)
    one.load_state_dict(loss.state_dict())
    x, labels = batch()
    x = x + world.rank
    assert torch.equal(copy.deepcopy(loss)(x, labels), one(x, labels))
    with pytest.raises(TypeError, match="a process_group cannot be pickled: leave it out"):
        pickle.dumps(loss)
    twin = pickle.loads(pickle.dumps(world.loss()))
    assert twin(x, labels).isfinite()
    if world.size > 1:
        with pytest.raises(TypeError, match="process_group must be .* that this rank is in"):
            ShardedPFMLLoss(C, D, process_group=groups[world.rank - 1])


def no_backend_for_the_cpu(world: World) -> None:
    """As NCCL alone: the hosts have a group of their own."""
    x, labels = batch()
    many, one = world.pair()
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        near(many(x[world.share()], labels[world.share()]), one(x, labels))
    assert many._ranks._hosts is not dist.group.WORLD


def state(world: World) -> None:
    """Saved by as many ranks, with the state of Adam: read by other numbers, see below."""
    for name, wrapped in STATES.items():
        torch.manual_seed(3)
        many, _ = world.pair()
        loss = wrapped(many, world)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        x, labels = batch()
        loss(x[world.share()], labels[world.share()]).backward()
        optimizer.step()
        assert list(many.state_dict()) == ["proxies", "_extra_state"]
        dcp.save(saved(loss, optimizer), checkpoint_id=world.folder / f"{name}{world.size}")


STATES: dict[str, Callable[[PFMLLoss, World], PFMLLoss]] = {
    "plain": lambda loss, world: loss,
    "sharded": lambda loss, world: fully_shard(loss, mesh=mesh_of(world)),
}


def saved(loss: PFMLLoss, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"loss": loss.state_dict(), "adam": optimizer.state_dict()["state"]}


def state_of_others(world: World) -> None:
    """What the first ranks saved, on fewer, sharded or not, and with a loss of one process."""
    sizes = {int(path.name.removeprefix("plain")) for path in world.folder.glob("plain*")}
    found = []
    for name, wrapped in itertools.product(STATES, STATES.values()):
        for loss in world.pair():
            loss = wrapped(loss, world)
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
            loss.proxies.grad = torch.zeros_like(loss.proxies)
            optimizer.step()  # makes the state
            with torch.no_grad():
                loss.proxies.zero_()
            into = saved(loss, optimizer)
            dcp.load(into, checkpoint_id=world.folder / f"{name}{max(sizes)}")
            loss.load_state_dict(into["loss"])
            assert loss.training_calls == 1
            of_adam = into["adam"][0]
            parts = loss.proxies.detach(), of_adam["exp_avg"], of_adam["exp_avg_sq"]
            found.append([whole(t) for t in parts])
    assert all(t.any() for t in found[0])
    for parts in found[1:]:
        for ours, theirs in zip(parts, found[0], strict=True):
            near(ours, theirs, 1e-6)


def from_one_process_and_back(world: World) -> None:
    """State dicts and safetensors, which know nothing of ranks."""
    many, one = world.pair()
    x, labels = batch(depth=D)
    many(x[world.share()], labels[world.share()])
    one.load_state_dict(many.state_dict())
    assert one.training_calls == 1
    path = world.folder / f"loss{world.size}.{world.rank}.safetensors"
    safetensors = pytest.importorskip("safetensors.torch") if has_safetensors() else None
    if safetensors is not None:
        safetensors.save_file(one.state_dict(), path)
        world.loss().load_state_dict(safetensors.load_file(path))
    again = world.loss()
    again.load_state_dict(one.state_dict())
    assert again.training_calls == 1
    near(again(x[world.share()], labels[world.share()]), one(x, labels))


def has_safetensors() -> bool:
    return importlib.util.find_spec("safetensors") is not None


def casts_and_moves(world: World) -> None:
    many, _ = world.pair()
    optimizer = torch.optim.SGD(many.parameters(), lr=1.0)
    many.double().to("cpu")
    assert many.proxies.dtype == torch.float64
    assert optimizer.param_groups[0]["params"][0] is many.proxies
    x, labels = batch(dtype=torch.float64)
    many(x[world.share()], labels[world.share()]).backward()
    many.to("cpu")
    assert many.proxies.grad is not None
    fixed = x[world.share()]
    ours = fixed.clone().requires_grad_()
    for given, leaf in ((ours, ours), (ours, many.proxies), (fixed, many.proxies)):
        value = many(given, labels[world.share()])
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (grad.sum() + leaf.sum()).backward()


CHECKS: tuple[Callable[[World], None], ...] = (
    gradients_of_torch, gradients_of_the_kernels, network_under_ddp, training, out_of_step,
    network_under_fsdp2, in_a_model, accumulation, sharded_and_called_from_outside,
    a_loss_under_fsdp2, memory_bank, the_sketch_turns_alike, no_batch_at_all,
    dtypes_that_differ, compiled_around, no_proxies, nan_everywhere,
    a_wrong_label_shows_everywhere, one_rank_in_error, one_rank_fails_anywhere,
    whatever_the_error_says, one_rank_has_something_else, an_operation_that_fails,
    proxies_that_cannot_be_written, ranks_out_of_step, tensors_of_any_layout,
    losses_that_differ, dtensors_are_refused, proxies_of_rank_0, groups_of_some_ranks,
    no_backend_for_the_cpu, state, state_of_others, from_one_process_and_back, casts_and_moves,
    built_before_there_is_a_group,
)  # fmt: skip


def work(rank: int, size: int, folder: Path, thorough: bool) -> None:
    """All checks, on one rank; what fails is written down."""
    torch.set_num_threads(1)
    world, failures = World(rank, size, folder, thorough), {}
    world.meet()
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check(world)
        except BaseException:
            failures[check.__name__] = traceback.format_exc()
            break  # the others wait for this rank: it may be anywhere
    torch.save(failures, folder / f"failures{size}.{rank}")
    if not failures:
        dist.barrier()
    os._exit(0)  # a thread of gloo that has not ended aborts a process that does, now and then


def failures_of(size: int, folder: Path, thorough: bool) -> str:
    """What fails on that many ranks, or nothing."""
    context = torch.multiprocessing.spawn(work, (size, folder, thorough), size, join=False)
    try:
        while not context.join(timeout=1):
            pass
    finally:
        for process in context.processes:
            process.kill()
    texts = []
    for rank in range(size):
        found: dict[str, str] = torch.load(folder / f"failures{size}.{rank}")
        texts += [f"{name}, rank {rank} of {size}\n{text}" for name, text in found.items()]
    return "\n".join(texts)


@pytest.mark.parametrize("group", ["nccl", -100, True])  # -100 has a rank that is not in the group
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(TypeError, match=f"process_group must be .* got {group!r}"):
        ShardedPFMLLoss(C, D, process_group=group)


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("sizes", [(4, 2), pytest.param((3, 1), marks=pytest.mark.slow)])
def test_ranks(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """The first save a state, which the others read."""
    for size in sizes:
        assert not (failures := failures_of(size, tmp_path, sizes[0] == 3)), failures
