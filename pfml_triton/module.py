"""`PFMLLoss`: the loss with its learned proxies, as a module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .functional import REDUCTIONS, Stats, _check_cloud, total_energy
from .operators import is_dry_run, is_transformed, turn_basis, turn_now
from .potential import Potential
from .serving import BACKENDS
from .sketch import is_traced, random_basis, sound_basis

_PATIENCE = 100  # training calls, see `PFMLLoss._watch`


def _size(least: int) -> Callable[[str, Any], int]:
    def checked(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
        return int(value)

    return checked


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def checked(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        return value

    return checked


def _instance(of: type) -> Callable[[str, Any], Any]:
    def checked(name: str, value: Any) -> Any:
        if not isinstance(value, of):
            raise TypeError(f"{name} must be a {of.__name__}, got {value!r}")
        return value

    return checked


def _of_the_potential(name: str, value: Any) -> None:
    raise AttributeError(
        f"{name} is a field of the potential, which cannot be changed: assign "
        f"loss.potential = dataclasses.replace(loss.potential, {name}={value!r})"
    )


def _checksum(x: Tensor) -> Tensor:
    """Another number, almost surely, once a bit of `x` has changed: int64, on its device."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return x.detach().view(bits).sum(dtype=torch.int64)


# What may be assigned, in the constructor and later.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_classes": _size(1),
    "embedding_size": _size(1),
    "proxies_per_class": _size(0),
    "potential": _instance(Potential),
    **dict.fromkeys(("alpha", "delta", "delta_rep", "min_distance"), _of_the_potential),
    **dict.fromkeys(("normalize", "prune", "validate"), _instance(bool)),
    "reduction": _one_of(REDUCTIONS),
    "backend": _one_of(BACKENDS),
    "training_calls": _size(0),
}


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

    Many processes make one field with `pfml_triton.distributed.ShardedPFMLLoss`. The arguments are
    attributes, which may be assigned later, but for the potential's, which is one attribute.

    Attributes:
        last_stats: dict of scalar tensors without gradient, on the device of the last call, or None
            before it: "active_energy", "attracting_pairs", "repelling_pairs", "smallest_distance",
            "active_share" and "labels_out_of_range", as described by
            `pfml_triton.functional.Stats`, sums whatever the reduction. The energy of the loss is
            mostly a constant of saturated pairs; this is what training changes. Reading a value
            waits for the device. Wrappers have the loss as their `module`.
        potential: the `Potential`.
        proxies: nn.Parameter [C, M, D] float32, drawn from a normal distribution scaled to about
            unit length. They want a learning rate of their own, see `param_groups`; a training in
            which they do not change warns after 300 calls. `set_num_classes` changes C. Other sizes
            are assigned together, `proxies` with `num_classes`, `proxies_per_class` and
            `embedding_size`; those that do not fit each other are an error.
        sketch_basis: [D, at most 60] bfloat16, that of the pruning, a copy. No parameter or buffer,
            so that no cast or broadcast touches it. One that is assigned has to have that shape;
            whatever it is, the result stays the same, but for the order in which the torch backend
            sums.
        training_calls: int, calls in training so far, which say when the basis turns.

    The state is `proxies`, and as `_extra_state` a uint8 tensor of the last two, so that a training
    resumes to the bit.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    proxies: nn.Parameter
    _unmoved: tuple[int, int] | None  # see `_watch`
    _bits: Any = None

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
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.proxies_per_class = proxies_per_class
        self.potential = Potential(alpha, delta, delta_rep, min_distance)
        self.normalize = normalize
        self.reduction = reduction
        self.prune = prune
        self.backend = backend
        self.validate = validate
        shape = self.num_classes, self.proxies_per_class, self.embedding_size
        self.proxies = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        # On the CPU, whatever the ambient default device is; `_basis_on` moves the first.
        self._basis = random_basis(self.embedding_size, torch.device("cpu")).clone()
        self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        self._proxy_labels: Tensor | None = None  # [C, M] int64, made where they are wanted
        self._totals: Tensor | None = None  # of the last call
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the proxies anew: N(0, 1/D) entries, directions uniform on the sphere."""
        nn.init.normal_(self.proxies, std=self.embedding_size**-0.5)

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(name, value))
        if name == "proxies":
            self._unmoved = 0, -1  # fully_shard takes turns of two parameters

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
            labels: [B] integers in [0, C). Others are an error on the CPU and with `validate`.
                Elsewhere, where looking at them would wait for the device, they make the loss and
                all gradients NaN, and `last_stats["labels_out_of_range"]` counts them.
            indices_tuple: must be None: the field takes every pair, there is nothing to mine.
            ref_emb, ref_labels: [R, D] and [R], a memory bank that adds its field to all points.
                It receives a force only if it requires a gradient. Its labels are any integers,
                unchecked: those outside [0, C) repel all points.

        Returns:
            Scalar: float32, or float64 for float64 embeddings. Half-precision embeddings are
            evaluated in float32 beside the float32 proxies.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or values, naming what came.
        """
        self._check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        self._watch()
        real = torch.promote_types(embeddings.dtype, torch.float32)
        value, totals = total_energy(
            embeddings,
            torch.cat([labels.to(torch.int64), self._labels_of_proxies()]),
            self.potential,
            proxies=self.proxies.to(real),
            sources=ref_emb,
            source_labels=ref_labels,
            basis=self._basis_for(embeddings),
            **self._settings(),
        )
        self._keep(totals)
        return value

    def _settings(self) -> dict[str, Any]:
        """What `total_energy` takes from the attributes."""
        return {
            "classes": self.num_classes, "unit": self.normalize, "reduction": self.reduction,
            "prune": self.prune, "backend": self.backend, "validate": self.validate,
        }  # fmt: skip

    def _keep(self, totals: Tensor) -> None:
        """For `last_stats`."""
        if torch.compiler.is_exporting() or is_dry_run() or totals.is_meta:
            return
        self._totals = None if is_transformed() else totals

    def _watch(self) -> None:
        """Warn once if the proxies never change; a call in training, without waiting for a device.

        An optimizer's step gives them another version, but for a fused one's. If there is none for
        long, their bits are compared, and what was found is read when it has arrived.
        """
        if self._unmoved is None or not self.training or torch.compiler.is_compiling():
            return
        proxies, (calls, version) = self.proxies, self._unmoved
        if not (proxies.requires_grad and torch.is_grad_enabled()) or proxies.numel() == 0:
            return
        if is_transformed() or is_dry_run() or proxies.is_meta:
            return
        if not isinstance(self._parameters.get("proxies"), nn.Parameter):  # made for every call
            return
        if proxies.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._unmoved = calls + 1, proxies._version
        if calls > 0 and proxies._version != version:
            self._unmoved = None
        elif calls == _PATIENCE:
            self._bits = _checksum(proxies)
        elif calls == 2 * _PATIENCE:
            same = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=proxies.is_cuda)
            self._bits = same.copy_(_checksum(proxies).eq(self._bits), non_blocking=True)
        elif calls == 3 * _PATIENCE:
            self._unmoved = None
            if self._bits:
                warnings.warn(
                    f"the proxies have not changed in {calls} training calls: give them to the "
                    "optimizer, which loss.param_groups(lr) does, or freeze them with "
                    "loss.proxies.requires_grad_(False)",
                    stacklevel=5,  # the call
                )

    def _refuse(self, error: Exception) -> NoReturn:
        """Raise what came before a call."""
        raise error

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
        if type(self.proxies).__name__ == "DTensor":
            raise TypeError(
                "proxies must be a plain parameter in forward, got a DTensor: call the module that "
                "fully_shard was applied to, or apply it to the loss"
            )
        sizes = (self.num_classes, self.proxies_per_class, self.embedding_size)
        if self.proxies is None or self.proxies.shape != sizes:
            got = None if self.proxies is None else list(self.proxies.shape)
            raise ValueError(
                "proxies must be [num_classes, proxies_per_class, embedding_size] = "
                f"{list(sizes)}, got {got}: set_num_classes changes the first of them, and all are "
                "assigned together with a parameter of that shape"
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

    def get_extra_state(self) -> Tensor:
        """`training_calls` and `sketch_basis`, byte by byte: uint8 on the CPU."""
        basis = self._basis_on(self._basis.device).cpu()
        return torch.cat([t.view(torch.uint8) for t in (self._calls.view(1), basis.flatten())])

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `get_extra_state` returned.

        Raises:
            ValueError: it is of another embedding size.
        """
        basis = self._basis_on(self._basis.device)
        expected = 8 + 2 * basis.numel()
        if not isinstance(state, Tensor) or state.shape != (expected,):
            got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"the extra state of a loss with embedding_size = {self.embedding_size} must be "
                f"[{expected}], got {got}"
            )
        state = state.detach().to("cpu", torch.uint8)
        self._unmoved = 0, -1  # for the proxies were loaded
        self._calls.copy_(state[:8].clone().view(torch.int64)[0].clamp_min(0))
        self.sketch_basis = state[8:].clone().view(torch.bfloat16).view(basis.shape)

    def __getstate__(self) -> dict[str, Any]:
        """For copies. torch.multiprocessing would have processes share tensors, and these are
        written in place: so they go as bytes."""
        own: dict[str, Any] = {"_proxy_labels": None, "_bits": None}
        if not is_dry_run():  # which has no bytes
            own |= {"_basis": None, "_calls": None}
            own["_sent"] = bytes(self.get_extra_state().tolist())
        return self.__dict__ | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        sent = state.pop("_sent", None)
        super().__setstate__(state)
        if sent is not None:
            self._basis = random_basis(self.embedding_size, torch.device("cpu")).clone()
            self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
            self.set_extra_state(torch.tensor(list(sent), dtype=torch.uint8, device="cpu"))

    @torch.inference_mode(False)  # or the parameter could never be trained
    @torch.no_grad()
    def set_num_classes(
        self,
        num_classes: int,
        optimizer: torch.optim.Optimizer | None,
        *,
        keep: Sequence[int] | None = None,
    ) -> None:
        """Change the number of classes, and keep what was learned: class-incremental training.

        `proxies` becomes a new parameter. Wrappers that hold the old one, as
        DistributedDataParallel does, are made anew; `fully_shard` comes after it.

        Args:
            num_classes: C' >= 1.
            optimizer: that has the proxies, or None if there is none yet. It gets the new parameter
                in place of the old one, with what it has for the classes that are kept (Adam's
                moments, say); for new classes that is 0. LBFGS, whose history is of all parameters
                together, is refused.
            keep: the present classes that become classes 0, 1, ... in this order, at most C' of
                them. None is the first ones, as many as there can be. The proxies of the classes
                after them are drawn anew.

        Raises:
            TypeError, ValueError: a wrong number or class; an optimizer without the proxies.
                Nothing has changed then.
        """
        num_classes = _size(1)("num_classes", num_classes)
        old = self.proxies
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer must keep a state for each parameter, got LBFGS: make a new one"
            )
        if type(old).__name__ == "DTensor":
            raise TypeError(
                f"proxies must be a plain parameter, got a {type(old).__name__}: set_num_classes "
                "comes before fully_shard"
            )
        self._check_proxies()
        given = range(min(len(old), num_classes)) if keep is None else keep
        classes = [_size(0)("keep", c) for c in given]
        if (
            len(set(classes)) < len(classes)
            or len(classes) > num_classes
            or max(classes, default=0) >= len(old)
        ):
            raise ValueError(
                f"keep must be at most {num_classes} different classes in [0, {len(old)}), got "
                f"{classes}"
            )
        groups = [] if optimizer is None else [group["params"] for group in optimizer.param_groups]
        places = [(group, i) for group in groups for i, p in enumerate(group) if p is old]
        if optimizer is not None and not places:
            raise ValueError("the optimizer must have the proxies of the loss, got one without")

        def of_kept(table: Any, of_new: float = 0.0) -> Any:
            if not isinstance(table, Tensor) or table.dim() == 0 or len(table) != len(old):
                return table
            new = table.new_full((num_classes, *table.shape[1:]), of_new)
            new[: len(classes)] = table[classes]
            return new

        proxies = of_kept(old.detach())
        proxies[len(classes) :].normal_(std=self.embedding_size**-0.5)
        new = nn.Parameter(proxies, old.requires_grad)
        if optimizer is not None and old in optimizer.state:
            rate = next(g["lr"] for g in optimizer.param_groups if g["params"] is places[0][0])
            state = {
                name: of_kept(value, rate if name == "step_size" else 0.0)  # of Rprop
                for name, value in optimizer.state[old].items()
            }
            del optimizer.state[old]
            optimizer.state[new] = state
        for group, i in places:
            group[i] = new
        self.num_classes, self.proxies = num_classes, new

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

    def _basis_for(self, embeddings: Tensor) -> Tensor | None:
        """The basis of a call with these embeddings, which turn it; None takes a random one."""
        if not self.prune or is_dry_run():
            return None
        basis = self._basis_on(embeddings.device)
        if self.training and not embeddings.is_meta and not torch.compiler.is_exporting():
            turn_basis(basis, self._calls, embeddings, self.normalize)
        return basis

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
        shape = self.num_classes, self.proxies_per_class
        if labels is None or labels.shape != shape or labels.device != device:
            labels = torch.arange(shape[0], device=device)[:, None].repeat(1, shape[1])
            if not is_traced():  # a graph makes them anew
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
        )
