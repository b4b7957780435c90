"""The loss over many processes: points are gathered once, and each rank does a share of the rows.

A rank owns its batch. The proxies are on all ranks, as a network under DistributedDataParallel is.
Before the field is computed, the batches of all ranks are gathered on every rank, in the order that
one process would have them. A rank then evaluates the rows of its own samples, and of the proxies
of its share of the classes, in the field of all points. The weights of pairs are symmetric, so its
rows hold the complete gradient of its points. Backward gathers the rows of the proxies, and nothing
else.

*Nobody waits for a rank that has failed.* Before points, totals or gradients are gathered, all
ranks say, on the hosts, whether they have done their part. Where one could not, every rank raises
an error, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .functional import total_energy
from .module import PFMLLoss
from .operators import (
    OnceDifferentiable,
    PotentialEnergy,
    gets_gradient,
    is_dry_run,
    is_transformed,
)
from .potential import TOTALS

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
_ALIGNMENT = 16  # bytes, of a rank's part of what is gathered
_NUMBERS = 8  # that a rank can say where ranks agree, with the place and whether it failed
_TEXT = 1024  # bytes of an error that others hear of
_POINTS, _ROOM, _TOTALS, _BACKWARD = range(4)  # of a step, where ranks agree


class ShardedPFMLLoss(PFMLLoss):
    """`PFMLLoss` over the ranks of a process group: their batches make one field.

    Each rank calls it with a batch of its own, of any size, none included. The value is that of all
    points, the same bits on every rank, and the work is shared out. It is a module like any other,
    inside or outside of a model that DistributedDataParallel or `fully_shard` wraps:

    - Every rank has all proxies. The first call makes them those of rank 0, and so does the first
      one after `reset_parameters`, `set_num_classes` or `load_state_dict`.
    - Their gradient is complete and the same on every rank. To average it changes nothing.
    - **The gradient of the embeddings is multiplied by the number of ranks**, since
      DistributedDataParallel and its like average the gradient of the network, which is then right.
    - Memory banks may differ from rank to rank. They act on all points, and feel no force.
    - All ranks call it equally often, forward and backward. An error of one rank is raised on all.

    `fully_shard(loss)` shares out the proxies, and the state of their optimizer, by class.

    Args:
        num_classes, embedding_size, proxies_per_class: as of `PFMLLoss`.
        process_group: of torch.distributed. None is the default group at the time of a call, so
            that the loss may be built before there is one.
        settings: the other arguments of `PFMLLoss`.

    Raises:
        TypeError: `process_group` is no group, or one that this rank is not in.
        TypeError, ValueError: as `PFMLLoss`.
    """

    _group: Ranks | None  # that was given
    _ranks: Ranks | None = None  # of the last call
    _is_new = True  # are the proxies still to be those of rank 0?

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        proxies_per_class: int = 15,
        *,
        process_group: dist.ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxies_per_class, **settings)
        self._group = None if process_group is None else Ranks(process_group)

    def reset_parameters(self) -> None:
        """As of `PFMLLoss`; the next call takes the proxies of rank 0."""
        super().reset_parameters()
        self._is_new = True

    def set_num_classes(self, *args: Any, **kwargs: Any) -> None:
        """As of `PFMLLoss`, on all ranks; the next call takes the proxies of rank 0."""
        super().set_num_classes(*args, **kwargs)
        self._is_new = True

    def set_extra_state(self, state: Tensor) -> None:
        """As of `PFMLLoss`; the next call takes the proxies of rank 0."""
        super().set_extra_state(state)
        self._is_new = True

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which look for the default group themselves."""
        return super().__getstate__() | {"_ranks": None}

    def _ranks_now(self) -> Ranks:
        if self._group is not None:
            return self._group
        if not dist.is_initialized():
            raise RuntimeError(
                "ShardedPFMLLoss needs a process group, and there is none yet: call "
                "torch.distributed.init_process_group() before the loss, or take PFMLLoss, which "
                "is for one process"
            )
        group = dist.group.WORLD
        assert group is not None
        if self._ranks is None or self._ranks.group is not group:
            self._ranks, self._is_new = Ranks(group), True
        return self._ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes are known when they come
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The energy of the batches of all ranks and the proxies.

        Args:
            embeddings: [B, D] floating point. B and the dtype may differ from rank to rank; the
                widest dtype serves.
            labels, indices_tuple, ref_emb, ref_labels: as of `PFMLLoss`.

        Returns:
            Scalar: float32, or float64 if the embeddings of a rank are.

        Raises:
            TypeError, ValueError: as of `PFMLLoss`. Also for losses that differ between ranks.
            RuntimeError: there is no process group; another rank failed; ranks do not call equally
                often.
        """
        ranks = self._ranks_now()
        if is_dry_run():
            with _disable_current_modes(), ranks.agreement(_POINTS):
                raise RuntimeError("ShardedPFMLLoss cannot be called with fake tensors or make_fx")
        with ranks.agreement(_POINTS) as numbers:
            if is_transformed():
                raise RuntimeError("ShardedPFMLLoss cannot be called under torch.func")
            self._check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            if gets_gradient(ref_emb):
                raise ValueError(
                    "ref_emb receives no force from a ShardedPFMLLoss, got one that requires a "
                    "gradient: pass ref_emb.detach()"
                )
            settings = self._common(embeddings)
            real = torch.promote_types(embeddings.dtype, torch.float32)
            own = _packed(embeddings, labels, ref_emb, ref_labels, real)
            room = ranks.room(own.device)
            banks = 0 if ref_emb is None else len(ref_emb)
            numbers += [len(labels), banks, real.itemsize, self._is_new, crc32(settings.encode())]
        *sizes, news, alike = numbers
        if len(set(alike)) > 1:
            texts = ranks.texts(settings)
            other = next(rank for rank, text in enumerate(texts) if text != texts[0])
            raise ValueError(
                f"all ranks must have the same loss, got on rank 0 {texts[0]}, and on rank {other} "
                f"{texts[other]}"
            )

        with ranks.agreement(_TOTALS):
            if any(news):
                ranks.broadcast(self.proxies)
                self._is_new = False
            of_points, of_bank, points, bank = ranks.gather(own, room, self.embedding_size, sizes)
            real = torch.float64 if 8 in sizes[2] else torch.float32
            batch = torch.cat([p.to(real) for p in points])
            proxies, of_proxies = self.proxies.to(real), self._labels_of_proxies()
            everyone = torch.cat([batch, proxies.detach().flatten(0, 1)])
            share = ranks.share(self.num_classes)
            of_share = of_proxies.view(self.num_classes, -1)[share].flatten()
            sources = torch.cat([p.to(real) for p in bank]) if any(sizes[1]) else None
            value, totals = total_energy(
                embeddings,
                torch.cat([labels.to(torch.int64), of_share]),
                self.potential,
                proxies=proxies,
                sources=sources,
                source_labels=None if sources is None else torch.cat(of_bank),
                everyone=everyone,
                everyone_labels=torch.cat([*of_points, of_proxies]),
                basis=self._basis_for(batch),
                operator=partial(_Rows.apply, ranks),
                **self._settings(),
            )
            rows = totals.new_empty(ranks.size * len(totals))
            n, others = len(everyone), 0 if sources is None else len(sources)
            pairs = max(n * (n - 1 + others), 1) if self.reduction == "mean" else 1
        value, totals = ranks.total(value, totals, rows, pairs)
        self._keep(totals)
        return value

    def _common(self, embeddings: Tensor) -> str:
        """What has to be the same on all ranks."""
        p = self.proxies
        names = "potential", "normalize", "reduction", "training"
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        gets = gets_gradient(p), gets_gradient(p) or gets_gradient(embeddings)
        return (
            f"proxies {list(p.shape)} {p.dtype} on {p.device.type}, {settings}, gradients: {gets}"
        )


class Ranks:
    """A process group, as the loss sees it.

    Args:
        group: of torch.distributed.

    Raises:
        TypeError: not a group, or one that this rank is not in.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, "
                f"got {group!r}"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._hosts: dist.ProcessGroup | None = None  # made when it is needed
        self._longest = 0  # bytes of a rank's part of what was gathered so far

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ShardedPFMLLoss that was given a process_group cannot be pickled: leave it out, "
            "and the loss takes the default group of the process that it is sent to"
        )

    def share(self, classes: int) -> slice:
        """The classes whose proxies' rows this rank has: ceil(C / W) in turn, the last fewer."""
        most = -(-classes // self.size)
        return slice(min(self.rank * most, classes), min((self.rank + 1) * most, classes))

    @contextmanager
    def agreement(self, place: int) -> Iterator[list[Any]]:
        """Do what is in the block on every rank, or raise on every rank.

        Args:
            place: where in a step this is.

        Yields:
            A list for the ints that this rank has to say. After the block it holds lists with what
            all ranks said, by rank.

        Raises:
            RuntimeError: the block failed on another rank, or the others are at another place.
        """
        numbers: list[Any] = []
        try:
            yield numbers
        except BaseException as error:
            self._agree(place, [], error)
            raise
        numbers[:] = self._agree(place, numbers, None)[: len(numbers)]

    def _agree(self, place: int, own: list[int], error: BaseException | None) -> list[list[int]]:
        numbers = [place, int(error is not None), *own]
        numbers += [0] * (_NUMBERS - len(numbers))
        said = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        places, failed, *others = self._gathered(said, hosts=True).T.tolist()
        if any(failed) and len(set(places)) == 1:
            text = self.texts(f"{type(error).__name__}: {error}")[failed.index(1)]
            text = f"rank {failed.index(1)} of {self.size} failed, and so do all: {text}"
        else:
            text = (
                "all ranks must call the loss equally often, forward and backward, got ranks in "
                f"{[('forward', 'backward')[place == _BACKWARD] for place in places]}"
            )
        if error is None and (any(failed) or len(set(places)) > 1):
            raise RuntimeError(text)
        return others

    def texts(self, own: str) -> list[str]:
        """What each rank says, at most `_TEXT` bytes of it."""
        text = own.encode()[:_TEXT].ljust(_TEXT, b"\0")
        said = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
        all_said = self._gathered(said, hosts=True).tolist()
        return [bytes(text).rstrip(b"\0").decode(errors="replace") for text in all_said]

    @torch.no_grad()
    def broadcast(self, proxies: Tensor) -> None:
        """Make the proxies those of rank 0."""
        if proxies.numel() > 0:
            whole = proxies.detach().contiguous()
            dist.broadcast(whole, group=self.group, group_src=0)
            proxies.copy_(whole)

    def room(self, device: torch.device, length: int | None = None) -> Tensor:
        """Memory to gather in, uint8 [W + 1, L]: what is received, and what this rank sends."""
        length = self._longest if length is None else length
        return torch.empty((self.size + 1) * length, dtype=torch.uint8, device=device)

    def gather(
        self, own: Tensor, room: Tensor, dim: int, sizes: list[list[int]]
    ) -> tuple[list[Tensor], ...]:
        """Labels of the batches, of the memory banks, points of batches and of banks, by rank.

        Args:
            own: of `_packed`.
            room: of `room`, for as much as was gathered so far.
            dim: D.
            sizes: rows of the batches, rows of the memory banks, and bytes of an entry, by rank.
        """
        lengths = [
            [8 * b, 8 * r, b * dim * width, r * dim * width]
            for b, r, width in zip(*sizes, strict=True)
        ]
        longest = (max(map(sum, lengths)) // _ALIGNMENT + 1) * _ALIGNMENT
        if longest > self._longest:
            with self.agreement(_ROOM):
                room = self.room(own.device, longest)
            self._longest = longest
        all_received, sent = room[: self.size * longest], room[self.size * longest :][:longest]
        sent[: len(own)] = own
        self._gathered(sent, all_received)
        found: list[list[Tensor]] = [[], [], [], []]
        for received, length, width in zip(
            all_received.view(self.size, longest), lengths, sizes[2], strict=True
        ):
            real = torch.float64 if width == 8 else torch.float32
            parts = received[: sum(length)].split(length)
            for i, part in enumerate(parts):
                found[i].append(part.view(torch.int64) if i < 2 else part.view(real).view(-1, dim))
        return tuple(found)

    def total(
        self, value: Tensor, totals: Tensor, rows: Tensor, pairs: int
    ) -> tuple[Tensor, Tensor]:
        """The value and the `TOTALS` of all ranks' rows, the same bits on every rank.

        Args:
            value: of this rank's rows; the gradient goes there.
            totals: of this rank's rows.
            rows: memory for the totals of all ranks.
            pairs: that the energy is divided by.
        """
        by_rank = self._gathered(totals, rows)
        whole = by_rank.sum(0)
        found = dict(zip(TOTALS, whole, strict=True))
        nearest = TOTALS.index("smallest_distance")
        whole[nearest] = by_rank[:, nearest].amin()
        energy = (found["energy"] / pairs + found["nothing"]).to(value.dtype)
        # What is NaN on one rank is NaN on all, in backward as well.
        passed_on = (value - value.detach()) * (1 + found["nothing"]).to(value.dtype)
        return energy + passed_on, whole

    def gather_rows(self, own: Tensor, rows: Tensor) -> None:
        """Fill `rows` [W S, ...] with what every rank has of `own` [S, ...], both contiguous."""
        if own.numel() > 0:
            self._gathered(own.view(-1), rows.view(-1))

    def _gathered(self, own: Tensor, out: Tensor | None = None, *, hosts: bool = False) -> Tensor:
        """What every rank has of a tensor [L]: [W, L], in `out` if it is given."""
        out = own.new_empty(self.size * own.shape[0]) if out is None else out
        _all_gather(out, own, group=self._group_of_hosts() if hosts else self.group)
        return out.view(self.size, -1)

    def _group_of_hosts(self) -> dist.ProcessGroup:
        """The group that hosts exchange numbers in, on their CPUs."""
        if self._hosts is None:
            self._hosts = self.group
            if "cpu" not in dist.get_backend_config(self.group):
                self._hosts = dist.new_group(
                    dist.get_process_group_ranks(self.group),
                    backend="gloo",
                    use_local_synchronization=True,
                )
        return self._hosts


class _Rows(torch.autograd.Function):
    """`PotentialEnergy` of the rows of a rank, and the backward that all ranks take together."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, points: Tensor, labels: Tensor, proxies: Tensor, *args: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.ranks, ctx.classes = ranks, len(proxies)
        with torch.enable_grad():  # or a second derivative would be wrong without a word
            part = proxies[ranks.share(len(proxies))]
        inputs = points, labels, part, *args
        outputs = PotentialEnergy.forward(*inputs)
        PotentialEnergy.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        with ranks.agreement(_BACKWARD):
            first, _, second, *others = PotentialEnergy.backward(ctx, *grad_outputs)
            first = None if first is None else first * ranks.size
            if second is not None:
                most = -(-ctx.classes // ranks.size)
                rows = second.new_empty(ranks.size * most, *second.shape[1:])
                missing = most - len(second)
                own = torch.cat([second, second.new_zeros(missing, *second.shape[1:])])
        if second is not None:
            ranks.gather_rows(own, rows)
            second = rows[: ctx.classes]
            if torch.is_grad_enabled():
                second = OnceDifferentiable.apply(second, own)
        return None, first, None, second, *others


def _packed(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    real: torch.dtype,
) -> Tensor:
    """What a rank has for the others, uint8 [bytes], in the order of `Ranks.gather`."""
    parts = [(labels, torch.int64), (ref_labels, torch.int64), (embeddings, real), (ref_emb, real)]
    # A clone: a tensor of one element passes for contiguous whatever its stride, but has no view.
    dense = [
        part.detach().to(dtype).clone(memory_format=torch.contiguous_format).view(-1)
        for part, dtype in parts
        if part is not None
    ]
    return torch.cat([part.view(torch.uint8) for part in dense])
