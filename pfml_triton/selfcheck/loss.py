"""The loss as its users call it, against what it should be.

A kernel cannot be the judge of itself: the Triton kernels are held against the torch backend in
float64, and the torch backend against the dense formula of truth.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import PFMLLoss, potential_energy
from . import machine, truth
from .result import Comparison, Log
from .truth import FLOOR, LOSSES, POTENTIAL

RUNS = 20  # that have to agree to the bit
_UPSTREAM = 3.0  # the derivative in the loss: not 1, so that its place in backward shows
_PROXIES = 3  # of a class
_DENSE, _DOUBLE = "the dense formula in float64", "the torch backend in float64"


def check(log: Log, backend: str, dtypes: list[torch.dtype], depths: list[int], n: int) -> None:
    """All checks of whole losses.

    Args:
        backend: "triton" or "torch".
        n: points; the dtypes and depths of the first check are all combined.
    """
    against = _DOUBLE if backend == "triton" else _DENSE
    for dtype in dtypes:
        for depth in depths:
            log.run(
                "loss", "value, statistics and gradients of PFMLLoss", against,
                partial(_loss, backend, log.device, dtype, depth, n),
                dtype=dtype, depth=depth, points=n,
            )  # fmt: skip
    depth, single = depths[-1], torch.float32

    def run(name: str, what: str, against: str, body: Callable[..., None]) -> None:
        compare = partial(body, backend, log.device, depth, n)
        log.run(name, what, against, compare, dtype=single, depth=depth, points=n)

    run("near points", "points of two classes down to 1e-4 apart, and duplicates", against, _near)
    run("pruning", "skipping pairs that exert no force changes nothing", "prune=False", _pruned)
    run("not a number", "one NaN point makes the loss NaN, not a wrong number", "NaN", _nan)
    if log.how != "interpreter" and machine.served_by(log.device)[0] == backend:
        run("choice of backend", 'backend="auto" takes it', f'backend="{backend}"', _auto)
    if backend == "torch" and log.device.type == "cuda":
        log.skip(
            f"whether the torch backend repeats itself to the bit on {log.device}",
            "it does not claim to: PyTorch's own sums on a GPU come in any order",
        )
    else:
        run("repeatable", f"{RUNS} runs agree to the bit, forward and backward", "the first",
            _repeats)  # fmt: skip
    if log.how == "gpu":
        for mode in ("evaluation", "training"):
            run(f"CUDA graph of {mode}", f"captured in {mode}, replayed on two other batches",
                "the same, uncaptured", partial(_graph, mode == "training"))  # fmt: skip


def example(
    backend: str, device: torch.device, dtype: torch.dtype, depth: int, n: int, *, seed: int = 0
) -> tuple[PFMLLoss, Tensor, Tensor]:
    """A loss whose proxies lie among the points, with a batch: embeddings [B, D], labels [B]."""
    points, labels = truth.cloud(n, depth, dtype, device, seed=seed)
    classes = int(labels.max()) + 1
    loss = PFMLLoss(
        classes, depth, _PROXIES, delta_rep=POTENTIAL.delta_rep, reduction="mean", backend=backend
    ).to(device)
    # As many proxies as there are places for, of points that were drawn; the rest is the batch.
    is_proxy = torch.zeros_like(labels, dtype=torch.bool)
    with torch.no_grad():
        for label in range(classes):
            of_class = (labels == label).nonzero().flatten()[:_PROXIES]
            loss.proxies[label, : len(of_class)] = points[of_class].float()
            is_proxy[of_class] = True
    return loss.eval(), points[~is_proxy], labels[~is_proxy]


def _gradients(loss: PFMLLoss, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, and the gradients of embeddings and proxies."""
    leaf = embeddings.detach().clone().requires_grad_()
    loss.proxies.grad = None
    value = loss(leaf, labels)
    (_UPSTREAM * value).backward()
    assert leaf.grad is not None
    assert loss.proxies.grad is not None
    return value.detach(), leaf.grad, loss.proxies.grad


def _dense(loss: PFMLLoss, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the dense formula, in the dtype of the embeddings."""
    leaf = embeddings.detach().clone().requires_grad_()
    proxies = loss.proxies.detach().to(leaf.dtype).requires_grad_()
    points = _on_sphere(leaf, proxies)
    pairs = len(points) * (len(points) - 1)
    value = truth.energy(points, _all_labels(loss, labels), loss.potential) / pairs
    first, second = torch.autograd.grad(_UPSTREAM * value, (leaf, proxies))
    return value.detach(), first, second


def _on_sphere(embeddings: Tensor, proxies: Tensor) -> Tensor:
    return torch.nn.functional.normalize(torch.cat([embeddings, proxies.flatten(0, 1)]), dim=1)


def _all_labels(loss: PFMLLoss, labels: Tensor) -> Tensor:
    classes = torch.arange(loss.num_classes, device=labels.device)
    return torch.cat([labels, classes.repeat_interleave(loss.proxies_per_class)])


def _loss(
    backend: str, device: torch.device, dtype: torch.dtype, depth: int, n: int, c: Comparison
) -> None:
    loss, embeddings, labels = example(backend, device, dtype, depth, n)
    ours = _gradients(loss, embeddings, labels)
    stats = loss.last_stats
    wide, everyone = embeddings.double(), _all_labels(loss, labels)
    if backend == "torch":
        true = _dense(loss, wide, labels)
    else:
        other = copy.deepcopy(loss)
        other.backend = "torch"
        true = _gradients(other, wide, labels)
    in_float32 = _dense(loss, embeddings.float(), labels)
    kinds = (torch.promote_types(dtype, torch.float32), dtype, torch.float32)
    names = ("value", "gradient of the embeddings", "gradient of the proxies")
    for what, got, right, eager, kind in zip(names, ours, true, in_float32, kinds, strict=True):
        lost = float((eager.double() - right).abs().max() / right.abs().max())
        floor = FLOOR[kind] if dtype != torch.float64 or what != names[2] else FLOOR[torch.float32]
        c.near(what, got, right, floor + (0 if dtype == torch.float64 else LOSSES * lost))
    points = _on_sphere(wide, loss.proxies.detach().double())
    field = truth.field(points, everyone, points, everyone, loss.potential)
    assert stats is not None
    attracting, repelling = field.attracting.sum(), field.repelling.sum()
    c.same("pairs that attract", stats["attracting_pairs"], attracting)
    c.same("pairs that repel", stats["repelling_pairs"], repelling)
    c.holds("there are some of both", attracting.minimum(repelling) > 0)
    resting = attracting * POTENTIAL.attraction_constant + repelling * POTENTIAL.repulsion_constant
    c.near("active_energy", stats["active_energy"], field.energy.sum() - resting, 1e-5)
    nearest = field.nearest.min().sqrt()
    c.near("smallest_distance", stats["smallest_distance"], nearest, 1e-5)


def _energy(
    backend: str, points: Tensor, labels: Tensor, *, prune: bool = True
) -> tuple[Tensor, Tensor]:
    """The energy of points and its gradient."""
    leaf = points.detach().clone().requires_grad_()
    value = potential_energy(leaf, labels, POTENTIAL, backend=backend, prune=prune)
    (grad,) = torch.autograd.grad(_UPSTREAM * value, leaf)
    return value.detach(), grad


def _near(backend: str, device: torch.device, depth: int, n: int, c: Comparison) -> None:
    points, labels = truth.collisions(depth, device)
    value, grad = _energy(backend, points, labels)
    wide = points.double().requires_grad_()
    if backend == "torch":
        true = truth.energy(wide, labels, POTENTIAL)
        (true_grad,) = torch.autograd.grad(_UPSTREAM * true, wide)
    else:
        true, true_grad = _energy("torch", wide, labels)
    c.near("energy", value, true, truth.FLOAT32)
    c.near("gradient", grad, true_grad, truth.FLOAT32)


def _pruned(backend: str, device: torch.device, depth: int, n: int, c: Comparison) -> None:
    points, labels = truth.cloud(n, depth, torch.float32, device)
    value, grad = _energy(backend, points, labels)
    all_value, all_grad = _energy(backend, points, labels, prune=False)
    c.near("energy", value, all_value, truth.FLOAT32)
    c.near("gradient", grad, all_grad, truth.FLOAT32)


def _nan(backend: str, device: torch.device, depth: int, n: int, c: Comparison) -> None:
    points, labels = truth.cloud(min(n, 40), depth, torch.float32, device)
    points[7, depth // 2] = math.nan
    value, grad = _energy(backend, points, labels)
    c.holds("the energy is NaN", value.isnan())
    c.holds("the gradient is NaN", grad.isnan().all())


def _auto(backend: str, device: torch.device, depth: int, n: int, c: Comparison) -> None:
    points, labels = truth.cloud(min(n, 40), depth, torch.float32, device)
    for what, auto, named in zip(
        ("energy", "gradient"),
        _energy("auto", points, labels),
        _energy(backend, points, labels),
        strict=True,
    ):
        c.same(what, auto, named)


def _repeats(backend: str, device: torch.device, depth: int, n: int, c: Comparison) -> None:
    n = min(n, 16) if backend == "triton" and device.type == "cpu" else n  # interpreted: slow
    loss, embeddings, labels = example(backend, device, torch.float32, depth, n)
    first = _gradients(loss, embeddings, labels)
    for run in range(2, RUNS + 1):
        for what, one, other in zip(
            ("value", "gradient of the embeddings", "gradient of the proxies"),
            first,
            _gradients(loss, embeddings, labels),
            strict=True,
        ):
            c.same(f"run {run}: {what}", other, one)


def _graph(
    training: bool, backend: str, device: torch.device, depth: int, n: int, c: Comparison
) -> None:
    """A replay finds what a call does that is not captured, and leaves the sketch as it was."""
    loss, embeddings, labels = example(backend, device, torch.float32, depth, n)
    loss.train(training)
    static, static_labels = embeddings.clone().requires_grad_(), labels.clone()

    def step() -> list[Tensor]:
        static.grad = loss.proxies.grad = None
        value = loss(static, static_labels)
        (_UPSTREAM * value).backward()
        assert static.grad is not None
        assert loss.proxies.grad is not None
        return [value.detach(), static.grad, loss.proxies.grad]

    replay, captured = _captured(step, device)
    for batch in range(2):
        with torch.no_grad():
            static.copy_(embeddings.roll(batch + 1, 0))
            static_labels.copy_(labels.roll(batch, 0))  # other labels than the points had
        if training:
            loss.update_sketch(static.detach())
        basis = loss.sketch_basis
        replay()
        replayed = [t.clone() for t in captured]
        c.same(f"replay {batch + 1}: basis of the sketch", loss.sketch_basis, basis)
        plain = _gradients(copy.deepcopy(loss).eval(), static.detach(), static_labels)
        for what, one, other in zip(
            ("value", "embeddings", "proxies"), replayed, plain, strict=True
        ):
            c.same(f"replay {batch + 1}: {what}", one, other)


def _captured(
    step: Callable[[], list[Tensor]], device: torch.device
) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays a step, and the tensors that a replay fills: those that the step returns."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # warm up, as a capture wants it
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph.replay, captured
