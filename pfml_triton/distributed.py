"""The loss over many processes: points are gathered once, and each rank does a share of the rows.

A rank owns its batch. The proxies are on all ranks, as a network under DistributedDataParallel is.
Before the field is computed, the batches of all ranks are gathered on every rank, in the order that
one process would have them. A rank then evaluates the rows of its own samples, and of the proxies
of its share of the classes, in the field of all points. The weights of pairs are symmetric, so its
rows hold the complete gradient of its points. Backward gathers the rows of the proxies, and nothing
else.

*Nobody waits for a rank that has failed.* Three times a step all ranks say, on the hosts, whether
they have done their part, and where one has not, every rank raises an error: before anything is
gathered, at the end of forward, and in backward. What is gathered is gathered into memory, and from
memory, that was there before they agreed. A rank that fails between the two agreements of forward
sends totals that are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn
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
from .potential import TOTALS, widest

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
_ALIGNMENT = 16  # bytes, of a rank's part of what is gathered
_NUMBERS = 8  # that a rank says where ranks agree, with the place and whether it failed
_TEXT = 1024  # bytes of an error that others hear of
_BEGIN, _ROOM, _END, _BACKWARD = range(4)  # of a step, where ranks agree


class ShardedPFMLLoss(PFMLLoss):
    """`PFMLLoss` over the ranks of a process group: their batches make one field.

    Each rank calls it with a batch of its own, of any size, none included. The value is that of all
    points, the same bits on every rank, and the work is shared out. It is a module like any other,
    inside or outside of a model that DistributedDataParallel or `fully_shard` wraps:

    - Every rank has all proxies. The first call makes them those of rank 0, and so does the first
      one after they were drawn, loaded or assigned. Under `fully_shard`, whose shards it cannot
      write, they have to be equal.
    - Their gradient is complete and the same on every rank. To average it changes nothing.
    - **The gradient of the embeddings is multiplied by the number of ranks**, since
      DistributedDataParallel and its like average the gradient of the network, which is then
      right. In float16 it overflows that much sooner, of which a GradScaler takes care.
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
    _is_managed = False  # by fully_shard, which makes another parameter of its shards every time

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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "proxies":
            self._is_managed |= type(value).__name__ == "DTensor"
            self._is_new |= not self._is_managed

    def reset_parameters(self) -> None:
        """As of `PFMLLoss`; the next call takes the proxies of rank 0."""
        super().reset_parameters()
        self._is_new = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_new = True

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which look for the default group themselves."""
        return super().__getstate__() | {"_ranks": None}

    def _refuse(self, error: Exception) -> NoReturn:
        with self._ranks_now().agreement(_BEGIN):
            raise error
        raise AssertionError

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
            self._ranks = Ranks(group)
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
        if is_dry_run():
            with _disable_current_modes():
                self._refuse(
                    RuntimeError("ShardedPFMLLoss cannot be called with fake tensors or make_fx")
                )
        ranks = self._ranks_now()
        with ranks.agreement(_BEGIN) as numbers:
            if is_transformed():
                raise RuntimeError("ShardedPFMLLoss cannot be called under torch.func")
            self._watch()
            self._check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            if gets_gradient(ref_emb):
                raise ValueError(
                    "ref_emb receives no force from a ShardedPFMLLoss, got one that requires a "
                    "gradient: pass ref_emb.detach()"
                )
            real = torch.promote_types(embeddings.dtype, torch.float32)
            own = _packed(embeddings, labels, ref_emb, ref_labels, real)
            room = ranks.room(own, ranks.longest)
            proxies = self._proxies_to_send()
            mine = proxies.new_full((len(TOTALS),), torch.nan, dtype=widest(proxies.device))
            rows = mine.new_empty(ranks.size * len(TOTALS))
            settings = self._common(embeddings)
            banks = 0 if ref_emb is None else len(ref_emb)
            numbers += [len(labels), banks, real.itemsize, ranks.longest, self._is_new]
            numbers.append(crc32(settings.encode()))
        *sizes, longest, news, alike = numbers
        if len(set(alike)) > 1:
            texts = ranks.texts(settings)
            other = next(rank for rank, text in enumerate(texts) if text != texts[0])
            raise ValueError(
                f"all ranks must have the same loss, got on rank 0 {texts[0]}, and on rank {other} "
                f"{texts[other]}"
            )
        parts = _parts(self.embedding_size, sizes)
        length = max(*longest, *(_aligned(sum(of_rank)) for of_rank in parts))
        if length > min(longest):
            with ranks.agreement(_ROOM):
                room = ranks.room(own, length)
            ranks.longest = length

        with ranks.agreement(_END):
            step = _Step(ranks)
            try:
                ranks.gather(*room)
                if any(news):
                    ranks.broadcast(proxies)
                    self._take(proxies)
                gathered = _unpacked(
                    room[0].view(ranks.size, length), parts, sizes, self.embedding_size
                )
                value, totals, pairs = self._own_rows(step, embeddings, labels, *gathered)
                mine.copy_(totals)
            finally:
                ranks.gather(rows, mine)
            whole = _summed(rows.view(ranks.size, -1))
            found = dict(zip(TOTALS, whole, strict=True))
            step.nothing = found["nothing"]
            with torch.no_grad():
                value.copy_(found["energy"] / pairs + found["nothing"])
            self._keep(whole)
        return value

    def _own_rows(
        self,
        step: _Step,
        embeddings: Tensor,
        labels: Tensor,
        of_points: list[Tensor],
        of_bank: list[Tensor],
        points: list[Tensor],
        bank: list[Tensor],
    ) -> tuple[Tensor, Tensor, int]:
        """Value and `TOTALS` of this rank's rows, and what the energy of all is divided by."""
        batch = torch.cat(points)
        proxies, of_proxies = self.proxies.to(batch.dtype), self._labels_of_proxies()
        everyone = torch.cat([batch, proxies.detach().flatten(0, 1)])
        share = step.ranks.share(self.num_classes)
        of_share = of_proxies.view(self.num_classes, -1)[share].flatten()
        sources = torch.cat(bank)
        value, totals = total_energy(
            embeddings,
            torch.cat([labels.to(torch.int64), of_share]),
            self.potential,
            proxies=proxies,
            sources=sources if len(sources) else None,
            source_labels=torch.cat(of_bank) if len(sources) else None,
            everyone=everyone,
            everyone_labels=torch.cat([*of_points, of_proxies]),
            basis=self._basis_for(batch),
            operator=partial(_Rows.apply, step),
            **self._settings(),
        )
        n = len(everyone)
        return value, totals, max(n * (n - 1 + len(sources)), 1) if self.reduction == "mean" else 1

    def _common(self, embeddings: Tensor) -> str:
        """What has to be the same on all ranks."""
        p = self.proxies
        names = "potential", "normalize", "reduction", "training"
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        gets = gets_gradient(p), gets_gradient(p) or gets_gradient(embeddings)
        return (
            f"proxies {list(p.shape)} {p.dtype} on {p.device.type}, {settings}, gradients: {gets}"
        )

    @property
    def _are_written(self) -> bool:
        """Can the proxies be written to? Not where they are made anew for every call."""
        own = self._parameters.get("proxies")
        return isinstance(own, torch.nn.Parameter) and not self._is_managed

    def _proxies_to_send(self) -> Tensor:
        proxies = self.proxies.detach()
        return proxies.contiguous() if self._are_written else proxies.clone()

    @torch.no_grad()
    def _take(self, proxies: Tensor) -> None:
        """Make the proxies those of rank 0."""
        if self._are_written:
            self.proxies.copy_(proxies)
        elif not torch.equal(self.proxies, proxies):
            raise ValueError(
                "proxies that fully_shard or a parametrization makes for every call must be equal "
                "on all ranks, got others on this rank than on rank 0: draw them from one seed, or "
                "load one state on all ranks"
            )
        self._is_new = False


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
        self.longest = _ALIGNMENT  # bytes of a rank's part of what was gathered so far, at most
        self._hosts: dist.ProcessGroup | None = None  # made when it is needed

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
        return slice(self.rank * most, (self.rank + 1) * most)

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
        places, failed, *others = self._heard(said).T.tolist()
        if any(failed) and len(set(places)) == 1:
            text = self.texts(_described(error))[failed.index(1)]
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
        text = own.encode(errors="replace")[:_TEXT].ljust(_TEXT, b"\0")
        said = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
        heard = self._heard(said).tolist()
        return [bytes(text).rstrip(b"\0").decode(errors="replace") for text in heard]

    def _heard(self, said: Tensor) -> Tensor:
        """What the hosts of all ranks say: [W, L] for [L], on the CPU."""
        out = said.new_empty(self.size * len(said))
        _all_gather(out, said, group=self._group_of_hosts())
        return out.view(self.size, -1)

    def room(self, own: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Memory for what all ranks send, [W L], and what this rank sends, `own` as far as it goes,
        [L]; both uint8."""
        received, sent = own.new_empty(self.size * length), own.new_empty(length)
        sent[: len(own)] = own[:length]
        return received, sent

    def gather(self, received: Tensor, sent: Tensor) -> None:
        """Fill `received` [W L] with what every rank has `sent` [L]."""
        if len(sent) > 0:
            _all_gather(received, sent, group=self.group)

    def broadcast(self, x: Tensor) -> None:
        """Make `x`, contiguous, that of rank 0."""
        if x.numel() > 0:
            dist.broadcast(x, group=self.group, group_src=0)

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


class _Step:
    """What forward leaves for backward."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.nothing: Tensor | None = None  # of the totals of all ranks


class _Rows(torch.autograd.Function):
    """`PotentialEnergy` of the rows of a rank, and the backward that all ranks take together."""

    @staticmethod
    def forward(
        ctx: Any, step: _Step, points: Tensor, labels: Tensor, proxies: Tensor, *args: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.step, ctx.classes = step, len(proxies)
        inputs = points, labels, proxies[step.ranks.share(len(proxies))], *args
        outputs = PotentialEnergy.forward(*inputs)
        PotentialEnergy.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        ranks = ctx.step.ranks
        rows: tuple[Tensor, Tensor] | None = None
        with ranks.agreement(_BACKWARD):
            if is_transformed():
                raise RuntimeError("the backward of ShardedPFMLLoss takes no batches of gradients")
            # What is NaN on one rank is NaN on all.
            grad_output = grad_output + ctx.step.nothing.to(grad_output.dtype)
            first, _, second, *others = PotentialEnergy.backward(ctx, grad_output)
            first = None if first is None else first * ranks.size
            if second is not None:
                most = -(-ctx.classes // ranks.size)
                own = second.contiguous()
                if len(own) < most:
                    own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
                every = own.new_empty(ranks.size * most, *own.shape[1:])
                rows = every.view(-1), own.detach().view(-1)
                second = every[: ctx.classes]
        if rows is not None:
            ranks.gather(*rows)
        if second is not None and torch.is_grad_enabled():
            second = OnceDifferentiable.apply(second, own)
        return None, first, None, second, *others


def _described(error: BaseException | None) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _aligned(length: int) -> int:
    return (length // _ALIGNMENT + 1) * _ALIGNMENT


def _packed(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    real: torch.dtype,
) -> Tensor:
    """What a rank has for the others, uint8 [bytes]."""
    parts = [(labels, torch.int64), (ref_labels, torch.int64), (embeddings, real), (ref_emb, real)]
    # A clone: a tensor of one element passes for contiguous whatever its stride, but has no view.
    dense = [
        part.detach().to(dtype).clone(memory_format=torch.contiguous_format).view(-1)
        for part, dtype in parts
        if part is not None
    ]
    return torch.cat([part.view(torch.uint8) for part in dense])


def _parts(dim: int, sizes: list[list[int]]) -> list[list[int]]:
    """Bytes of the parts of `_packed`, by rank, for the rows of batches and of memory banks and the
    bytes of an entry, by rank."""
    return [
        [8 * b, 8 * r, b * dim * width, r * dim * width] for b, r, width in zip(*sizes, strict=True)
    ]


def _unpacked(
    received: Tensor, parts: list[list[int]], sizes: list[list[int]], dim: int
) -> list[list[Tensor]]:
    """By rank: labels of batches, of memory banks, points of batches, and of banks."""
    widths = sizes[2]
    real = torch.float64 if 8 in widths else torch.float32
    found: list[list[Tensor]] = [[], [], [], []]
    for of_rank, lengths, width in zip(received, parts, widths, strict=True):
        dtypes = [torch.int64] * 2 + [torch.float64 if width == 8 else torch.float32] * 2
        split = of_rank[: sum(lengths)].split(lengths)
        for i, (part, dtype) in enumerate(zip(split, dtypes, strict=True)):
            values = part.view(dtype)
            found[i].append(values if i < 2 else values.view(-1, dim).to(real))
    return found


def _summed(rows: Tensor) -> Tensor:
    """The `TOTALS` of a field [T] from those of its ranks' rows [W, T]: the same bits on each."""
    whole = rows.sum(0)
    nearest = TOTALS.index("smallest_distance")
    whole[nearest] = rows[:, nearest].amin()
    return whole
