"""`PFMLLoss`: the loss with its learned proxies, as a module."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .functional import REDUCTIONS, Stats, _check_cloud, _check_options, total_energy
from .operators import is_transformed, turn_basis, turn_now
from .potential import Potential
from .sketch import random_basis, sound_basis

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed import Everyone, Ranks


class PFMLLoss(nn.Module):
    """Potential Field Metric Learning (Bhatnagar and Ahuja, CVPR 2025), Eq. 6.

    The batch and M learned proxies of every class are points of one field: points of one class
    attract each other outside the radius `delta`, points of different classes repel each other
    inside `delta_rep`, and both forces decay with the distance. The loss is the energy of all of
    them, sample-sample, sample-proxy and proxy-proxy: there are no tuples to mine.

    Args:
        num_classes: C >= 1; labels are in [0, C).
        embedding_size: D in [1, 16000].
        proxies_per_class: M >= 0 (the paper: 15 on CUB and Cars, 2 on SOP); 0 is samples only.
        alpha, delta, delta_rep, min_distance: see `Potential`. The defaults are the paper's best,
            for pre-trained networks, with Eq. 2 as it is but for points nearer than 0.01. A small
            network from scratch did much better, most of all with wrong labels, at alpha 1, delta
            0.1 and delta_rep 0.2; at the defaults, with a min_distance of almost delta
            (bench/retrieval/STUDY.md in the repository).
        normalize: scale embeddings and proxies to unit length, as the paper does. Off, the radii
            are in the units of the embeddings, and all are used as they are.
        reduction: "sum" (Eq. 6), the published choice: with weight decay in Adam (not AdamW) a mean
            drowns in the decay. "mean" is over the ordered pairs of points.
        prune: skip what is proven to exert no force, see `potential_energy`. The directions of the
            sketch follow the leading directions of the embeddings, a step every 100 training calls
            and more often at first; they decide the time, never the result.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        validate: check labels and values on every call, on any device; on a GPU this waits for it.
        process_group: of torch.distributed, whose ranks make one field of their batches and share
            out the proxies, by class, as a DTensor. All of them build the loss and call it equally
            often, with batches of any size, none included; a memory bank then feels no force. The
            loss is that of all points, the same on every rank. **The gradient of the embeddings is
            multiplied by the number of ranks**, since DistributedDataParallel and its like average
            that of the network; that of the proxies is as it is. See pfml_triton.distributed.

    Attributes:
        last_stats: dict of scalar tensors without gradient, on the device of the last call, or None
            before it: "active_energy", "attracting_pairs", "repelling_pairs", "smallest_distance"
            and "active_share", as described by `pfml_triton.functional.Stats`, sums whatever the
            reduction. The energy of the loss is mostly a constant of saturated pairs; this is what
            training changes. Reading a value waits for the device.
        proxies: nn.Parameter [C, M, D] float32 (a DTensor with a process_group), drawn from a
            normal distribution scaled to about unit length. They want a learning rate of their own,
            see `param_groups`. Another number of classes, of proxies or of dimensions is assigned
            together with such a parameter, to `num_classes`, `proxies_per_class` and
            `embedding_size`; sizes that do not fit each other are an error.
        sketch_basis: [D, at most 60] bfloat16, that of the pruning, a copy. No parameter or buffer,
            so that no cast, broadcast or checkpoint touches it. One that is assigned has to have
            that shape; whatever it is, the result stays the same, but for the order in which the
            torch backend sums.
        training_calls: int, calls in training so far, which say when the basis turns. A run that is
            to be resumed to the bit keeps it and `sketch_basis` beside the state.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    proxies: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        proxies_per_class: int = 15,
        *,
        alpha: float = 3.0,
        delta: float = 0.2,
        delta_rep: float | None = None,
        min_distance: float = 0.01,
        normalize: bool = True,
        reduction: str = "sum",
        prune: bool = True,
        backend: str = "auto",
        validate: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": 1, "embedding_size": 1, "proxies_per_class": 0}
        for (name, least), value in zip(
            sizes.items(), (num_classes, embedding_size, proxies_per_class), strict=True
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        _check_options(backend, normalize=normalize, prune=prune, validate=validate)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.proxies_per_class = proxies_per_class
        self.potential = Potential(alpha, delta, delta_rep, min_distance)
        self.normalize = normalize
        self.reduction = reduction
        self.prune = prune
        self.backend = backend
        self.validate = validate
        shape = proxies_per_class, embedding_size
        self._ranks: Ranks | None = None
        if process_group is None:
            proxies = torch.empty(num_classes, *shape, dtype=torch.float32)
        else:
            from . import distributed  # not in every torch

            self._ranks = distributed.Ranks(process_group, num_classes)
            own = len(self._ranks.own_classes)
            proxies = self._ranks.sharded(torch.empty(own, *shape, dtype=torch.float32))
        self.proxies = nn.Parameter(proxies)
        # On the CPU, whatever the ambient default device is; `_basis_on` moves the first.
        self._basis = random_basis(embedding_size, torch.device("cpu")).clone()
        self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        self._proxy_labels: Tensor | None = None  # [C, M] int64, made where they are wanted
        self._totals: Tensor | None = None  # of the last call
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the proxies anew: N(0, 1/D) entries, directions uniform on the sphere."""
        std = self.embedding_size**-0.5
        if self._ranks is None:
            nn.init.normal_(self.proxies, std=std)
        else:
            self._ranks.draw(self.proxies, std)

    def _apply(self, fn: Any, recurse: bool = True) -> PFMLLoss:
        if self._ranks is None:
            return super()._apply(fn, recurse)
        # A DTensor knows its kind of device, which `fn` may change.
        with torch.no_grad():
            local = fn(self.proxies.to_local())  # type: ignore[attr-defined]
            moved = nn.Parameter(self._ranks.sharded(local), self.proxies.requires_grad)
        torch.utils.swap_tensors(self.proxies, moved)
        return self

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The energy of a batch and the proxies.

        Args:
            embeddings: [B, D] floating point, B >= 0 (0: the proxies' own energy).
            labels: [B] integers in [0, C). Values are checked on the CPU, elsewhere only with
                `validate`, since looking at them waits for the device; a label out of range is a
                class without proxies there, and 32 bits of it count.
            indices_tuple: must be None: the field takes every pair, there is nothing to mine.
            ref_emb, ref_labels: [R, D] and [R], a memory bank that adds its field to all points.
                It receives a force only if it requires a gradient.

        Returns:
            Scalar: float32, or float64 for float64 embeddings. Half-precision embeddings are
            evaluated in float32 beside the float32 proxies.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or values, naming what came.
        """
        given = embeddings, labels, indices_tuple, ref_emb, ref_labels
        ranks, everyone, seen = self._ranks, None, embeddings
        if ranks is None:
            self._check_call(*given)
            proxies, real = self.proxies, torch.promote_types(embeddings.dtype, torch.float32)
        else:
            everyone = self._everyone(ranks, *given)
            real = everyone.points.dtype  # float64 if that of any rank is
            embeddings = ranks.averaged(embeddings)
            proxies = self.proxies.to_local()  # type: ignore[attr-defined]
            ref_emb, ref_labels = everyone.sources, everyone.source_labels
            seen = everyone.points[: everyone.batch]
        basis = self._basis_on(embeddings.device) if self.prune else None
        if basis is not None and self.training and not torch.compiler.is_exporting():
            turn_basis(basis, self._calls, seen, self.normalize)
        value, totals = total_energy(
            embeddings,
            torch.cat([labels.to(torch.int64), self._labels_of_proxies()]),
            self.potential,
            proxies=proxies.to(real),
            classes=self.num_classes,
            unit=self.normalize,
            sources=ref_emb,
            source_labels=ref_labels,
            everyone=None if everyone is None else everyone.points,
            everyone_labels=None if everyone is None else everyone.labels,
            reduction=self.reduction,
            prune=self.prune,
            basis=basis,
            backend=self.backend,
            validate=self.validate,
        )
        if ranks is not None and everyone is not None:
            pairs = everyone.pairs if self.reduction == "mean" else 1
            value, totals = ranks.total(value, totals, pairs)
        if not torch.compiler.is_exporting():
            self._totals = None if is_transformed() else totals
        return value

    def _check_call(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> None:
        if indices_tuple is not None:
            raise ValueError(
                "indices_tuple must be None: PFML takes every pair, so there are no tuples to "
                f"mine, got {type(indices_tuple).__name__}"
            )
        self._check_proxies()
        _check_cloud(embeddings, labels, "embeddings", "labels", "B")
        self._check_place(embeddings)
        if (ref_emb is None) != (ref_labels is None):
            raise ValueError("ref_emb and ref_labels go together, but only one of them was given")
        if ref_emb is not None and ref_labels is not None:
            _check_cloud(ref_emb, ref_labels, "ref_emb", "ref_labels", "R")
            if ref_emb.shape[1] != self.embedding_size or ref_emb.device != embeddings.device:
                raise ValueError(
                    f"ref_emb must be [R, {self.embedding_size}] on {embeddings.device}, "
                    f"got {list(ref_emb.shape)} on {ref_emb.device}"
                )

    def _check_proxies(self) -> None:
        """The sizes are attributes, which may have been changed since."""
        sizes = (self.num_classes, self.proxies_per_class, self.embedding_size)
        if self.proxies.shape != sizes:
            raise ValueError(
                "proxies must be [num_classes, proxies_per_class, embedding_size] = "
                f"{list(sizes)}, got {list(self.proxies.shape)}: change the attributes and the "
                "parameter together"
            )
        if self._ranks is not None and self._ranks.classes != self.num_classes:
            raise ValueError(
                "num_classes cannot change with a process_group, whose ranks share out "
                f"{self._ranks.classes} classes, got {self.num_classes}: build a new loss"
            )

    def _check_place(self, embeddings: Tensor) -> None:
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings must be [B, {self.embedding_size}], got {list(embeddings.shape)}"
            )
        if embeddings.device != self.proxies.device:
            raise ValueError(
                f"embeddings must be on the device of the proxies, {self.proxies.device}, "
                f"got {embeddings.device}: move the loss with .to({str(embeddings.device)!r})"
            )

    def _everyone(self, ranks: Ranks, embeddings: Tensor, labels: Tensor, *others: Any) -> Everyone:
        """The points of all ranks, once each has found its own in order: else nobody goes on."""
        fault: Exception | None = None
        try:
            self._check_call(embeddings, labels, *others)
            ranks.check(self.proxies, embeddings, labels, *others[1:], validate=self.validate)
        except (TypeError, ValueError) as error:
            fault = error
        return ranks.gather(fault, self.proxies, embeddings, labels, *others[1:])

    def __getstate__(self) -> dict[str, Any]:
        """For copies; torch.multiprocessing would have processes share what is written in place."""
        own = {"_basis": self._basis.clone(), "_calls": self._calls.clone()}
        return self.__dict__ | own

    @torch.no_grad()
    def update_sketch(self, embeddings: Tensor) -> None:
        """Turn the directions of the sketch a step towards the leading ones of `embeddings`.

        Calls in training do this by themselves (see `prune`), except where a CUDA graph is
        captured: its replays would turn the directions every time. Where all steps are replays,
        call this between them, every 100 or so: it writes the directions in place, where the graph
        reads them. It decides how much is pruned, never the result, and waits for no device.

        Args:
            embeddings: [B, D] floating point, a batch, on the device of the proxies.

        Raises:
            TypeError, ValueError: not of that dtype, shape or device.
            RuntimeError: a CUDA graph is being captured.
        """
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise TypeError(f"embeddings must be a floating-point tensor, got {got}")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be [B, D], got {list(embeddings.shape)}")
        self._check_place(embeddings)
        if embeddings.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("update_sketch belongs between replays, not in a captured graph")
        turn_now(self._basis_on(embeddings.device), embeddings, self.normalize)

    @property
    def last_stats(self) -> dict[str, Tensor] | None:
        """What the last call found, see the attributes of the class."""
        return None if self._totals is None else Stats.of(self._totals)._asdict()

    @property
    def sketch_basis(self) -> Tensor:
        """See the attributes of the class."""
        return self._basis_on(self._basis.device).clone()

    @sketch_basis.setter
    def sketch_basis(self, basis: Tensor) -> None:
        ours = self._basis_on(self._basis.device)
        if not isinstance(basis, Tensor) or basis.shape != ours.shape:
            got = list(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
            raise ValueError(f"sketch_basis must be {list(ours.shape)}, got {got}")
        # In place, for a captured CUDA graph goes on reading it.
        ours.copy_(sound_basis(basis.detach().to(ours.device)))

    @property
    def training_calls(self) -> int:
        """See the attributes of the class."""
        return int(self._calls)

    @training_calls.setter
    def training_calls(self, calls: int) -> None:
        self._calls.fill_(calls)

    def _basis_on(self, device: torch.device) -> Tensor:
        """The basis of the sketch, from now on on this device.

        Embeddings of a network lie in few directions, all near each other in most others, and
        proxies in all: so it is the embeddings that the sketch has to tell apart, and that turn it.
        """
        if self._basis.shape[0] != self.embedding_size:  # which was changed
            self._basis = random_basis(self.embedding_size, device).clone()
        if device.type == "meta":
            return self._basis.to(device)
        if self._basis.device != device:
            with torch.inference_mode(False):  # it will be written to
                self._basis = self._basis.to(device)
        return self._basis

    def _labels_of_proxies(self) -> Tensor:
        """[C M] int64, where the proxies are. No buffer: to_empty() would leave it unfilled."""
        labels, device = self._proxy_labels, self.proxies.device
        own = range(self.num_classes) if self._ranks is None else self._ranks.own_classes
        shape = len(own), self.proxies_per_class
        if labels is None or labels.shape != shape or labels.device != device:
            classes = torch.arange(own.start, own.stop, device=device)
            labels = classes[:, None].repeat(1, shape[1])
            if not torch.compiler.is_compiling():  # a graph makes them anew
                self._proxy_labels = labels
        return labels.flatten()

    def param_groups(
        self, lr: float, proxy_lr_mult: float = 100.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Optimiser groups for the proxies, beside those of the network.

        Args:
            lr: the network's learning rate; the proxies get `lr * proxy_lr_mult` (the paper: 1e-4
                and 0.01).
            proxy_lr_mult: that factor.
            weight_decay: of the proxies.

        Raises:
            TypeError, ValueError: not a number; one that is negative or not finite.
        """
        for name, value in (
            ("lr", lr), ("proxy_lr_mult", proxy_lr_mult), ("weight_decay", weight_decay)
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a real number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        return [{"params": [self.proxies], "lr": lr * proxy_lr_mult, "weight_decay": weight_decay}]

    def extra_repr(self) -> str:
        p = self.potential
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"proxies_per_class={self.proxies_per_class}, alpha={p.alpha:g}, delta={p.delta:g}, "
            f"delta_rep={p.repulsion_radius:g}, min_distance={p.min_distance:g}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}, prune={self.prune}, "
            f"backend={self.backend!r}"
            + ("" if self._ranks is None else f", ranks={self._ranks.size}")
        )
