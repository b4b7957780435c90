"""The loss over many processes: points are gathered once, gradients never.

A rank owns its batch and its shard of the proxies. Before the field is computed, the points of all
ranks are gathered on every rank, in the order that one process would have them. A rank then
evaluates the rows of its own points in the field of all. The weights of pairs are symmetric, so its
rows hold the complete gradient of its points: backward communicates nothing, and a row is the same
sum as on one process.

Two small exchanges go with it: the sizes of the batches before, between the hosts where the group
has a backend for the CPU, and the totals of all rows after. Otherwise the host waits for nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .operators import check_finite, check_range
from .potential import TOTALS

_BLOCK = 256  # classes whose proxies are drawn from one generator
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
_ALIGNMENT = 16  # bytes, of a rank's part of the buffer


class Everyone(NamedTuple):
    """The points of all ranks, detached."""

    points: Tensor  # [A, D], the batches by rank, then the proxies by class
    labels: Tensor  # [A] int64
    batch: int  # how many are of batches
    sources: Tensor | None  # [R, D], the memory banks by rank
    source_labels: Tensor | None  # [R] int64

    @property
    def pairs(self) -> int:
        """Ordered pairs of distinct points, and those of a point and a source."""
        a = self.points.shape[0]
        return a * (a - 1 + (0 if self.sources is None else self.sources.shape[0]))


class Ranks:
    """A process group, as the loss sees it.

    Args:
        group: of torch.distributed. All its ranks build the loss, and call it equally often.
        classes: C, whose proxies are shared out: ranks have ceil(C / W) in turn, the last fewer.

    Raises:
        TypeError: not a group, or one that this rank is not in.
    """

    def __init__(self, group: dist.ProcessGroup, classes: int) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, "
                f"got {group!r}"
            )
        self.group, self.classes = group, classes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.shard = -(-classes // self.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def classes_of(self, rank: int) -> range:
        """The classes whose proxies a rank holds."""
        first = min(rank * self.shard, self.classes)
        return range(first, min(first + self.shard, self.classes))

    @property
    def own_classes(self) -> range:
        """Those of this rank."""
        return self.classes_of(self.rank)

    def sharded(self, local: Tensor) -> Tensor:
        """The proxies of all classes [C, M, D] as a DTensor, of which `local` is this rank's."""
        mesh = DeviceMesh.from_group(self.group, local.device.type)
        _, m, d = local.shape
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False,
            shape=torch.Size((self.classes, m, d)), stride=(m * d, d, 1),
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, proxies: Tensor, std: float) -> None:
        """Fill `proxies` [C, M, D] from N(0, std^2), whatever the number of ranks.

        They are drawn in blocks of classes, each from a generator of its own, so that no rank draws
        more than its part and a block.
        """
        local: Tensor = proxies.to_local()  # type: ignore[attr-defined]
        seed = torch.randint(2**31, (1,), device=self._host(local.device))
        dist.broadcast(seed, group=self.group, group_src=0)
        own, base = self.own_classes, int(seed)
        for first in range(own.start // _BLOCK * _BLOCK, own.stop, _BLOCK):
            generator = torch.Generator(local.device).manual_seed(base + first)
            block = torch.empty((_BLOCK, *local.shape[1:]), dtype=local.dtype, device=local.device)
            block.normal_(std=std, generator=generator)
            low, high = max(first, own.start), min(first + _BLOCK, own.stop)
            local[low - own.start : high - own.start] = block[low - first : high - first]

    def check(
        self,
        proxies: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        *,
        validate: bool,
    ) -> None:
        """The checks that are only of many ranks, and those of values, while all can hear of it."""
        if ref_emb is not None and ref_emb.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "ref_emb receives no force with a process_group, got one that requires a "
                "gradient: pass ref_emb.detach()"
            )
        if validate or labels.device.type == "cpu":
            check_range(labels.to(torch.int64), self.classes)
        if validate:
            local: Tensor = proxies.to_local()  # type: ignore[attr-defined]
            check_finite(local.flatten(0, 1), "proxies")
            check_finite(embeddings, "embeddings")
            check_finite(ref_emb, "ref_emb")

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes are known when they come
    def gather(
        self,
        fault: Exception | None,
        proxies: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> Everyone:
        """The points of all ranks, on each of them.

        Args:
            fault: why this rank refuses what it was given, or None.
            proxies: [C, M, D], a DTensor.
            embeddings: [B, D]; B may differ from rank to rank.
            labels: [B] integers.
            ref_emb, ref_labels: [R, D] and [R]; R may differ, None is 0.

        Raises:
            TypeError, ValueError: the fault; on all ranks, if they have losses of different shapes.
            RuntimeError: another rank has one.
        """
        device, (_, m, d) = proxies.device, proxies.shape
        own: list[Tensor] = []
        own_sizes = [0, 0, 0, 1, self.classes, m, d]
        if fault is None:
            if ref_emb is None or ref_labels is None:
                ref_emb, ref_labels = embeddings[:0], labels[:0]
            own = [labels.to(torch.int64), ref_labels.to(torch.int64), embeddings, ref_emb]
            is_wide = embeddings.dtype == torch.float64
            own_sizes[:4] = embeddings.shape[0], ref_emb.shape[0], int(is_wide), 0
        sizes = self._gathered(torch.tensor(own_sizes, device=self._host(device)))
        batches, banks, wide, faults, *shapes = sizes.T.tolist()
        if fault is not None:
            raise fault
        if any(faults):
            raise RuntimeError(
                f"rank {faults.index(1)} of {self.size} refuses what it was given: its own error "
                "says why"
            )
        if any(len(set(of_ranks)) > 1 for of_ranks in shapes):
            raise ValueError(
                "proxies must be [C, M, D] of one C, M and D on all ranks, got "
                f"{[list(shape) for shape in zip(*shapes, strict=True)]}"
            )
        dtype = torch.float64 if any(wide) else torch.float32
        shards = [len(self.classes_of(rank)) * m for rank in range(self.size)]

        local: Tensor = proxies.to_local()  # type: ignore[attr-defined]
        own[2:] = [t.detach().to(dtype) for t in (*own[2:], local.flatten(0, 1))]
        flat = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in own])
        width = d * dtype.itemsize
        rows_of = list(zip(batches, banks, shards, strict=True))
        longest = max(8 * (b + r) + width * (b + r + c) for b, r, c in rows_of)
        buffer = flat.new_zeros(-(-longest // _ALIGNMENT) * _ALIGNMENT)
        buffer[: flat.shape[0]] = flat

        parts: list[list[Tensor]] = [[], [], [], [], []]
        for received, (b, r, c) in zip(self._gathered(buffer), rows_of, strict=True):
            sizes_of = [8 * b, 8 * r, width * b, width * r, width * c]
            for part, piece in zip(parts, received[: sum(sizes_of)].split(sizes_of), strict=True):
                part.append(piece)
        batch_labels, bank_labels = (torch.cat(part).view(torch.int64) for part in parts[:2])
        bank = torch.cat(parts[3]).view(dtype).view(-1, d)
        classes = torch.arange(self.classes, device=device).repeat_interleave(m)
        return Everyone(
            torch.cat([*parts[2], *parts[4]]).view(dtype).view(-1, d),
            torch.cat([batch_labels, classes]),
            sum(batches),
            bank if any(banks) else None,
            bank_labels if any(banks) else None,
        )

    def averaged(self, embeddings: Tensor) -> Tensor:
        """`embeddings`, with a gradient that is right once it is averaged over the ranks."""
        scaled: Tensor = _TimesRanks.apply(embeddings, self.size)
        return scaled

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def total(self, value: Tensor, totals: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        """The value and the `TOTALS` of all ranks' rows, the same bits on every rank.

        Args:
            value: of this rank's rows; the gradient goes there.
            totals: of this rank's rows.
            pairs: that the energy is divided by.
        """
        rows = self._gathered(totals)
        whole = rows.sum(0)
        found = dict(zip(TOTALS, whole, strict=True))
        nearest = TOTALS.index("smallest_distance")
        whole[nearest] = rows[:, nearest].amin()
        energy = (found["energy"] / max(pairs, 1) + found["nothing"]).to(value.dtype)
        return energy + (value - value.detach()), whole

    def _gathered(self, own: Tensor) -> Tensor:
        """What every rank has of a tensor [L]: [W, L]."""
        out = own.new_empty(self.size * own.shape[0])
        _all_gather(out, own, group=self.group)
        return out.view(self.size, -1)

    def _host(self, device: torch.device) -> torch.device:
        """Where numbers are exchanged that the host wants to read: on the CPU, if the group can."""
        if "cpu" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        # NCCL alone: not even the seed of proxies that are still on the CPU can go there.
        return device if device.type != "cpu" else torch.device("cuda", torch.cuda.current_device())


class _TimesRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.ranks, None
