"""`python -m bench ranks`: what the loss costs each of many processes.

Every rank counts what it hands to torch.distributed, in forward and in backward, the operations of
its products and single pairs, and the memory that a call adds. Gradients are held against those of
one process before anything is counted.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from bench.clouds import Cloud, make_cloud
from bench.costs import operations
from bench.memory import peak_memory
from bench.results import append_row, provenance
from bench.settings import SIZES, RanksSettings, Size
from pfml_triton import PFMLLoss, distributed
from pfml_triton.distributed import ShardedPFMLLoss

ALLOWED = 1e-6  # of the largest entry of a gradient
_PATIENCE = timedelta(seconds=300)
_SENDING = (
    (distributed, "_all_gather"), (dist, "broadcast"), (dist, "all_reduce"),
    *(  # of fully_shard, by their newer names and by those before
        (dist, name) for name in (
            "all_gather_single", "reduce_scatter_single",
            "all_gather_into_tensor", "reduce_scatter_tensor",
        ) if hasattr(dist, name)
    ),
)  # fmt: skip
DESIGNS = ("whole", "sharded")  # proxies on every rank, or shared out by fully_shard

Row = dict[str, Any]


class ParityError(RuntimeError):
    """A rank's gradient is not that of one process."""


def run(settings: RanksSettings, out: Path, console: Console | None = None) -> list[Row]:
    """Measure, print a table a size, append a row a rank to ``ranks.jsonl`` in `out`.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: a process failed; `ParityError` in it says that gradients are not those of one
            process.
    """
    for name in settings.sizes:
        if name not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {name!r}")
    if not settings.ranks or min(settings.ranks) < 1:
        raise ValueError(f"ranks must be at least 1, got {list(settings.ranks)}")
    console = console or Console()
    rows: list[Row] = []
    for name in settings.sizes:
        of_size: list[Row] = []
        for ranks in settings.ranks:
            for design in DESIGNS:
                with console.status(f"{name}, {ranks} processes, proxies {design}"):
                    of_size += _measured(SIZES[name], ranks, design, settings.seed)
        about = {"bench": "ranks", "size": name, "n": SIZES[name].n, "d": SIZES[name].depth}
        about |= {"seed": settings.seed}
        for row in of_size:
            append_row(out / "ranks.jsonl", about | row | provenance(torch.device("cpu")))
        console.print(_table(name, of_size))
        rows += of_size
    return rows


def _measured(size: Size, ranks: int, design: str, seed: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (ranks, size, design, seed, folder), ranks)
        return [torch.load(Path(folder, str(rank))) for rank in range(ranks)]


def _work(rank: int, ranks: int, size: Size, design: str, seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=_PATIENCE
    )
    cloud = make_cloud(size, seed)
    share = slice(rank * size.batch // ranks, (rank + 1) * size.batch // ranks)
    loss = ShardedPFMLLoss(size.classes, size.depth, size.proxies).eval()
    with torch.no_grad():
        loss.proxies.copy_(cloud.proxies)
    if design == "sharded":
        fully_shard(loss, mesh=init_device_mesh("cpu", (ranks,)))
    assert dist.group.WORLD is not None
    own_rows = range(size.classes)[distributed.Ranks(dist.group.WORLD).share(size.classes)]
    embeddings = cloud.embeddings[share].clone().requires_grad_()
    labels = cloud.batch_labels[share]

    def step() -> None:
        embeddings.grad = loss.proxies.grad = None
        loss(embeddings, labels).backward()

    step()
    _check(cloud, loss, embeddings, share, ranks)
    forward: list[float] = []
    backward: list[float] = []
    embeddings.grad = loss.proxies.grad = None
    with _sent(forward, ranks):
        value = loss(embeddings, labels)
    with _sent(backward, ranks):
        value.backward()
    _, count = operations(step)
    dist.barrier()
    _, added = peak_memory(step, torch.device("cpu"))
    row = {
        "ranks": ranks, "rank": rank, "design": design,
        "rows": len(embeddings) + len(own_rows) * size.proxies,
        "forward_bytes": sum(forward), "forward_calls": len(forward),
        "backward_bytes": sum(backward), "backward_calls": len(backward), "operations": count,
        "added_bytes": added, "state_bytes": 4 * 4 * _local(loss.proxies).numel(),
    }  # fmt: skip
    torch.save(row, Path(folder, str(rank)))
    dist.barrier()
    os._exit(0)  # a thread of gloo that has not ended aborts a process that does, now and then


def _check(cloud: Cloud, loss: PFMLLoss, embeddings: Tensor, share: slice, ranks: int) -> None:
    one = PFMLLoss(cloud.size.classes, cloud.size.depth, cloud.size.proxies).eval()
    with torch.no_grad():
        one.proxies.copy_(cloud.proxies)
    whole = cloud.embeddings.clone().requires_grad_()
    one(whole, cloud.batch_labels).backward()
    assert embeddings.grad is not None
    assert loss.proxies.grad is not None
    assert whole.grad is not None
    assert one.proxies.grad is not None
    of_proxies = loss.proxies.grad
    if isinstance(of_proxies, DTensor):
        of_proxies = of_proxies.full_tensor()
    for what, ours, all_of_one, part in (
        ("embeddings", embeddings.grad / ranks, whole.grad, share),
        ("proxies", of_proxies, one.proxies.grad, slice(None)),
    ):
        error = float((ours - all_of_one[part]).abs().max() / all_of_one.abs().max())
        if not error <= ALLOWED:
            raise ParityError(f"gradient of the {what}: error {error:.1e}, allowed {ALLOWED:g}")


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@contextmanager
def _sent(received: list[float], ranks: int) -> Iterator[None]:
    """Collect the bytes that this rank receives in each collective, as a ring passes them on."""

    def counted(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            received.append(max(t.nbytes for t in tensors) * (ranks - 1) / ranks)
            return collective(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for module, name in _SENDING:
            collective = counted(getattr(module, name))
            patches.enter_context(mock.patch.object(module, name, collective))
        yield


def _table(name: str, rows: list[Row]) -> Table:
    table = Table(
        title=f"A step of each rank, {name}, N = {SIZES[name].n:,}, D = {SIZES[name].depth}",
        caption="Measured: what is received, as by a ring; operations of products and single "
        "pairs; memory that a call adds; proxies with their gradient and Adam's moments, which are "
        "on every rank, or shared out by fully_shard.",
        box=SIMPLE_HEAD,
    )
    for column in (
        "ranks", "proxies", "rank", "rows", "fwd, MB", "bwd, MB", "GFLOP", "call, MiB",
        "state, MiB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]), row["design"], str(row["rank"]), f"{row['rows']:,}",
            f"{row['forward_bytes'] / 1e6:.2f}", f"{row['backward_bytes'] / 1e6:.2f}",
            f"{row['operations'] / 1e9:.2f}", f"{row['added_bytes'] / 2**20:.0f}",
            f"{row['state_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    return table
