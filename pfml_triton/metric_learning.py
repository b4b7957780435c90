"""`PFMLLoss` and `CrossBatchMemory` for those who train with pytorch-metric-learning.

That library is no dependency of this package, so `pfml_triton` does not import this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import module
from .functional import _check_cloud

try:
    from pytorch_metric_learning import losses
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pfml_triton.metric_learning needs pytorch-metric-learning, which is not installed: "
        "pip install pytorch-metric-learning",
        name=error.name,
    ) from error


class PFMLLoss(module.PFMLLoss, losses.BaseMetricLossFunction):  # type: ignore[misc]
    """`pfml_triton.PFMLLoss`, with its arguments, values and state, as a loss of that library.

    What its trainers and wrappers expect of a loss comes on top: it is a `BaseMetricLossFunction`;
    labels may be on any device, though moving them from the CPU waits for a GPU; and its proxies
    follow the embeddings to theirs. A `distance`, a `reducer` or an `embedding_regularizer` is not
    taken, and those it inherits are not used.

    In `DistributedLossWrapper` every rank computes the field of the gathered batch, and after
    DistributedDataParallel's averaging the network has the gradient of one process. Three limits:

    - The gradient of the proxies is `world_size` times that of one process, as that of the
      library's own losses is. Adam takes no notice; for SGD divide the learning rate by it. To
      keep the proxies equal on all ranks put the wrapper into DistributedDataParallel.
    - All ranks need batches of one size, as the library gathers them.
    - `efficient=True` is refused: forces between ranks would count half as much as others.
    """

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """See `pfml_triton.PFMLLoss.forward`."""
        _refuse_tuples(indices_tuple)
        if isinstance(embeddings, Tensor) and embeddings.device != self.proxies.device:
            self.to(embeddings.device)
        return super().forward(
            embeddings,
            _moved(labels, embeddings),
            ref_emb=ref_emb,
            ref_labels=_moved(ref_labels, ref_emb),
        )


class CrossBatchMemory(losses.CrossBatchMemory):  # type: ignore[misc]
    """That library's `CrossBatchMemory` for PFML: the memory adds its field, and feels none.

    The class of that name in the library takes the losses on its own list only, and gives them a
    memory that holds the batch already, with tuples of all pairs of which none is that of a sample
    and its copy. A field has no tuples. So here the memory acts without the rows of the batch,
    which act as themselves: a batch that fills the memory has the loss that it has without one.

    Args:
        loss: a `PFMLLoss`, of this module or of `pfml_triton`.
        embedding_size: that of the loss.
        memory_size: rows of the memory, >= 1. In `DistributedLossWrapper` a multiple of the
            gathered batch: the ranks gather it in different orders, and would else forget
            different rows of it.
        miner: must be None: the field takes every pair, there is nothing to mine.
        kwargs: `collect_stats`, as in the library.

    The memory is in the state with its position, so that a run resumes as it was.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(
        self,
        loss: module.PFMLLoss,
        embedding_size: int,
        memory_size: int = 1024,
        miner: None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(loss, module.PFMLLoss):
            raise TypeError(
                f"loss must be a PFMLLoss, got {type(loss).__name__}: other losses go into "
                "pytorch_metric_learning.losses.CrossBatchMemory"
            )
        if embedding_size != loss.embedding_size:
            raise ValueError(
                f"embedding_size must be that of the loss, {loss.embedding_size}, "
                f"got {embedding_size!r}"
            )
        memory_size = module._size(1)("memory_size", memory_size)
        if miner is not None:
            raise ValueError(
                "miner must be None: PFML takes every pair, so there are no tuples to mine, "
                f"got {type(miner).__name__}"
            )
        super().__init__(loss, embedding_size, memory_size, **kwargs)

    @staticmethod
    def supported_losses() -> list[str]:
        """The name of the one loss that this memory is for."""
        return ["PFMLLoss"]

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Nothing: the library asks for the name, and __init__ for the type."""

    # The loss is one operator with nothing to fuse, and each position would make another graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The energy of a batch and the proxies in the field of the memory, which then takes it.

        Args:
            embeddings: [B, D] floating point.
            labels: [B] integers in [0, C), on any device.
            indices_tuple: must be None.
            enqueue_mask: [B] bool, or None. Rows where it is True go into the memory and act from
                there, without receiving a force; the others are the batch, and are not memorised.
                On a GPU counting them waits for it.

        Returns:
            Scalar, as of the loss.

        Raises:
            TypeError, ValueError: as the loss; a mask that does not fit; more rows for the memory
                than it has. The memory is then as before.
        """
        try:
            memory, batch, queued = self._of_call(embeddings, labels, indices_tuple, enqueue_mask)
        except (TypeError, ValueError) as error:
            self.loss._refuse(error)
        value: Tensor = self.loss(*batch)
        self.embedding_memory, self.label_memory = memory
        if len(queued[0]) > 0:  # the library takes an empty queue that gets nothing for a full one
            self.add_to_memory(*queued, len(queued[0]))
        return value

    def _of_call(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None,
        enqueue_mask: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...], tuple[Tensor, Tensor]]:
        """The memory where a call needs it, the arguments of the loss, and what to memorise."""
        _refuse_tuples(indices_tuple)
        labels = _moved(labels, embeddings)
        _check_cloud(embeddings, labels, "embeddings", "labels", "B")
        device, labels = embeddings.device, labels.to(torch.int64)  # as those of the memory
        queued, queued_labels = embeddings, labels
        if enqueue_mask is not None:
            is_mask = isinstance(enqueue_mask, Tensor) and enqueue_mask.dtype == torch.bool
            if not is_mask or enqueue_mask.shape != embeddings.shape[:1]:
                got = type(enqueue_mask).__name__
                if isinstance(enqueue_mask, Tensor):
                    got = f"{list(enqueue_mask.shape)} {enqueue_mask.dtype}"
                raise ValueError(
                    f"enqueue_mask must be [B] bool with B = {len(embeddings)}, got {got}"
                )
            mask = enqueue_mask.to(device)
            queued, queued_labels = embeddings[mask], labels[mask]
            embeddings, labels = embeddings[~mask], labels[~mask]
        count = len(queued)
        if count > self.memory_size:
            raise ValueError(
                f"memory_size must be at least the rows of a batch, got {count} rows for a "
                f"memory of {self.memory_size}"
            )
        memory = self.embedding_memory.to(device, embeddings.dtype), self.label_memory.to(device)

        # From the oldest row on, what was never filled comes first, and what the batch is going to
        # replace. The rows are copies: autograd keeps them, and the memory changes after the call.
        held = self.memory_size if self.has_been_filled else self.queue_idx
        first = max(self.memory_size - held, count)
        rows = torch.arange(first, self.memory_size, device=device) + self.queue_idx
        rows %= self.memory_size
        ref_emb, ref_labels = (table[rows] for table in memory)
        if enqueue_mask is not None:
            ref_emb = torch.cat([ref_emb, queued.detach()])
            ref_labels = torch.cat([ref_labels, queued_labels])
        return memory, (embeddings, labels, None, ref_emb, ref_labels), (queued, queued_labels)

    def get_extra_state(self) -> Tensor:
        """The position in the memory and whether it has been filled, beside its rows."""
        return torch.tensor([self.queue_idx, int(self.has_been_filled)], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` returned."""
        self.queue_idx, filled = state.tolist()
        self.has_been_filled = bool(filled)


def _moved(labels: Any, points: Any) -> Any:
    """`labels` where `points` are; what is no tensor is left to the check of types."""
    if isinstance(labels, Tensor) and isinstance(points, Tensor):
        return labels.to(points.device)
    return labels


def _refuse_tuples(indices_tuple: object) -> None:
    if indices_tuple is not None:
        raise ValueError(
            "indices_tuple must be None: PFML takes every pair, so there are no tuples to mine, "
            f"got {type(indices_tuple).__name__}. pytorch-metric-learning passes one of its own in "
            "DistributedLossWrapper(efficient=True), where efficient=False is right, and in its "
            "CrossBatchMemory, for which pfml_triton.metric_learning has another"
        )
