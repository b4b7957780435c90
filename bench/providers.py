"""What is timed: losses as their users call them, and what each of them needs.

A provider is built for a cloud: a module with its proxies as parameters. `loss(embeddings, labels)`
scales them to unit length and returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.clouds import Cloud
from bench.settings import Size
from pfml_triton import PFMLLoss, Potential
from pfml_triton.sketch import turned_basis

POTENTIAL = Potential()
GIB = 2.0**30
SETTLED = 101  # training calls after which the basis of the sketch turns once in a hundred
_TURNS = 3  # that a loss has seen by then
LONG, ENDLESS = 10.0, 600.0  # seconds of one call: run with `slow` only, and never

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """A loss that can be built for a cloud.

    Args:
        build: the loss for a cloud, with its parameters on the device of the cloud.
        computes: which loss.
        tolerance: of gradient and energy, see `PROVIDERS`; None for a loss other than Eq. 6.
        backend: of this package's loss, "auto", "triton" or "torch"; None for others.
        counted: whether its operations on a CPU show: see `bench.costs.operations`.
        requires: a module that must be there.
        bytes_needed: estimated memory of a call.
        seconds_per_product: estimated seconds of a call over N^2 D, on a CPU; 0 if that is not what
            it costs.
    """

    build: Callable[[Cloud], nn.Module]
    computes: str = "PFML, Eq. 6"
    tolerance: float | None = None
    backend: str | None = None
    counted: bool = False
    requires: str | None = None
    bytes_needed: Callable[[Size], float] = lambda size: 0
    seconds_per_product: float = 0.0


class PlainLoss(nn.Module):
    """A loss with proxies by some function of embeddings [B, D], labels [B], proxies [C, M, D] and
    their labels [C * M]."""

    def __init__(self, cloud: Cloud, function: LossFunction) -> None:
        super().__init__()
        self.proxies = nn.Parameter(cloud.proxies.clone())
        self.proxy_labels = cloud.labels[cloud.size.batch :]
        self.function = function

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.function(embeddings, labels, self.proxies, self.proxy_labels)


def gram_loss(embeddings: Tensor, labels: Tensor, proxies: Tensor, proxy_labels: Tensor) -> Tensor:
    """Eq. 6 in plain PyTorch: |x|^2 + |y|^2 - 2 x.y, then one N x N matrix a step.

    With one power for both forces, and its sum taken by rows, it is as fast and as accurate as this
    form gets. It lacks the softened core: below `min_distance` the repulsion is constant.
    """
    p = POTENTIAL
    points, classes = _on_sphere(embeddings, labels, proxies, proxy_labels)
    norms = points.square().sum(1)
    d2 = torch.addmm(norms, points, points.T, alpha=-2) + norms[:, None]
    inverse = d2.clamp_min(p.min_distance**2).rsqrt()
    same = classes[:, None] == classes
    clipped = torch.where(
        same, inverse.clamp_max(1 / p.delta), inverse.clamp_min(1 / p.repulsion_radius)
    )
    phi = clipped.pow(p.alpha)
    energy = torch.where(same, -phi, phi).sum(1).sum(dtype=torch.float64)
    return energy - len(points) * p.attraction_constant  # a point's potential on itself


def keops_loss(embeddings: Tensor, labels: Tensor, proxies: Tensor, proxy_labels: Tensor) -> Tensor:
    """Eq. 6 as a KeOps reduction over pairs, without a matrix of them; the core as in `gram_loss`.

    KeOps differentiates by each of the two points of a pair in a pass of its own. The field is
    mutual, so that one pass is enough, doubled.
    """
    with redirect_stdout(None):  # it tells what it compiles
        import pykeops
        from pykeops.torch import LazyTensor

        pykeops.set_verbose(False)

    p = POTENTIAL
    points, labels = _on_sphere(embeddings, labels, proxies, proxy_labels)
    classes = labels.float()[:, None]  # exact up to 2^24
    x, y = LazyTensor(points[:, None]), LazyTensor(points.detach()[None])
    x_class, y_class = LazyTensor(classes[:, None]), LazyTensor(classes[None])
    # Both bounds of a clamp must be finite, or its derivative is none: 5 > |x - y|^2 on the sphere.
    inverse = x.sqdist(y).clamp(p.min_distance**2, 5.0).rsqrt()
    alpha = int(p.alpha)  # a whole one, for which KeOps multiplies
    attraction = -(inverse.clamp(0, 1 / p.delta) ** alpha)
    repulsion = inverse.clamp(1 / p.repulsion_radius, 1 / p.min_distance) ** alpha
    same = 0.5 - (x_class - y_class).abs()
    energy = same.ifelse(attraction, repulsion).sum(1).sum(dtype=torch.float64)
    return 2 * energy - energy.detach() - len(points) * p.attraction_constant


def _on_sphere(
    embeddings: Tensor, labels: Tensor, proxies: Tensor, proxy_labels: Tensor
) -> tuple[Tensor, Tensor]:
    points = torch.cat([embeddings.float(), proxies.flatten(0, 1)])
    return functional.normalize(points), torch.cat([labels, proxy_labels])


def _pfml(cloud: Cloud, prune: bool, backend: str) -> nn.Module:
    """As it is in the midst of a training: the first calls, which turn the basis of the sketch
    often, are over. From now on one in a hundred does."""
    size = cloud.size
    loss = PFMLLoss(size.classes, size.depth, size.proxies, prune=prune, backend=backend)
    loss.to(cloud.points.device)
    with torch.no_grad():
        loss.proxies.copy_(cloud.proxies)
    basis = loss.sketch_basis
    for _ in range(_TURNS):
        basis = turned_basis(basis, cloud.embeddings.to(basis.device))
    loss.sketch_basis = basis
    loss.training_calls = SETTLED
    return loss


def _compiled(cloud: Cloud) -> nn.Module:
    torch.compiler.reset()  # it allows a few sizes of one function, and then no more
    return PlainLoss(cloud, torch.compile(gram_loss, dynamic=False, fullgraph=True))


def _proxy_anchor(cloud: Cloud) -> nn.Module:
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    loss = ProxyAnchorLoss(cloud.size.classes, cloud.size.depth, margin=0.1, alpha=32)
    return loss.to(cloud.points.device)


def _multi_similarity(_: Cloud) -> nn.Module:
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    return MultiSimilarityLoss(alpha=2, beta=50, base=0.5)


def _triplet(_: Cloud) -> nn.Module:
    from pytorch_metric_learning.losses import TripletMarginLoss

    return TripletMarginLoss(margin=0.2)


def _contrastive(_: Cloud) -> nn.Module:
    from pytorch_metric_learning.losses import ContrastiveLoss

    return ContrastiveLoss(pos_margin=0, neg_margin=1)


def _this(*, prune: bool, backend: str) -> Provider:
    return Provider(
        build=partial(_pfml, prune=prune, backend=backend),
        backend=backend,
        # Forces come from differences in float32: measured 3e-7.
        tolerance=1e-5,
        counted=backend != "triton",
        requires="triton" if backend == "triton" else None,
        seconds_per_product=0.0 if prune else 1.9e-11,
    )


# The Gram matrix in float32 cancels: plain PyTorch loses 4e-6 where classes are apart, and more
# where points are nearer: 3e-5 in the collapsed cloud. KeOps sums differences, but in float32 and
# one after another. Bytes and seconds are those measured at N = 6,000 and 22,736, or more, on two
# cores.
PROVIDERS = {
    "pfml": _this(prune=True, backend="auto"),
    "pfml-dense": _this(prune=False, backend="auto"),
    "pfml-triton": _this(prune=True, backend="triton"),
    "pfml-triton-dense": _this(prune=False, backend="triton"),
    "pfml-torch": _this(prune=True, backend="torch"),
    "pfml-torch-dense": _this(prune=False, backend="torch"),
    "eager": Provider(
        build=lambda cloud: PlainLoss(cloud, gram_loss),
        tolerance=1e-4,
        counted=True,
        bytes_needed=lambda size: 32 * size.n**2,
        seconds_per_product=1.4e-10,
    ),
    "compile": Provider(
        build=_compiled,
        tolerance=1e-4,
        bytes_needed=lambda size: 8 * size.n**2,
        seconds_per_product=3.3e-11,
    ),
    "keops": Provider(
        build=lambda cloud: PlainLoss(cloud, keops_loss),
        tolerance=1e-4,
        requires="pykeops",
        seconds_per_product=3.7e-9,
    ),
    # As they are published, of the batch alone but for the first; without miners, which in clouds
    # of classes that are well apart would leave them nothing to do.
    "proxy-anchor": Provider(
        build=_proxy_anchor,
        computes="ProxyAnchorLoss, margin 0.1, alpha 32, one proxy a class",
        requires="pytorch_metric_learning",
        bytes_needed=lambda size: 64 * size.batch * size.classes,
    ),
    "multi-similarity": Provider(
        build=_multi_similarity,
        computes="MultiSimilarityLoss, alpha 2, beta 50, base 0.5, all pairs of the batch",
        requires="pytorch_metric_learning",
        bytes_needed=lambda size: 100 * size.batch**2,
    ),
    "triplet": Provider(
        build=_triplet,
        computes="TripletMarginLoss, margin 0.2, all triplets of the batch",
        requires="pytorch_metric_learning",
        bytes_needed=lambda size: 100 * size.batch**2 * size.samples_per_class,
    ),
    "contrastive": Provider(
        build=_contrastive,
        computes="ContrastiveLoss, margins 0 and 1, all pairs of the batch",
        requires="pytorch_metric_learning",
        bytes_needed=lambda size: 100 * size.batch**2,
    ),
}


def obstacle(
    name: str, size: Size, device: torch.device, available: float, chosen: Sequence[str], slow: bool
) -> str | None:
    """Why a provider is not measured at a size, or None.

    Args:
        name: of `PROVIDERS`.
        available: bytes of memory.
        chosen: the providers that are measured beside it.
        slow: whether to measure what takes minutes.
    """
    provider, on_gpu = PROVIDERS[name], device.type == "cuda"
    if provider.backend == "triton" and not on_gpu:
        return f"needs a GPU, and this is the {device.type}"
    if provider.requires is not None and find_spec(provider.requires) is None:
        extra = "keops" if provider.requires == "pykeops" else "dev"
        return f"needs {provider.requires}, which is not installed: pip install -e '.[{extra}]'"
    auto = "triton" if on_gpu and find_spec("triton") is not None else "torch"
    twin = name.replace(f"-{auto}", "")
    if name != twin and twin in chosen:
        return f"is what {twin} is on this device"
    needed = provider.bytes_needed(size)
    if needed > available:
        return f"does not fit: needs {needed / GIB:,.1f} GiB, {available / GIB:,.1f} are available"
    seconds = 0.0 if on_gpu else provider.seconds_per_product * size.n**2 * size.depth
    if seconds > ENDLESS or (seconds > LONG and not slow):
        unless = "" if seconds > ENDLESS else " (--slow)"
        return f"is not run: one call takes about {seconds:,.0f} s, estimated{unless}"
    return None


def tiles_of(name: str, cloud: Cloud, device: torch.device) -> str | None:
    """The tile shapes that Triton's kernels take for a cloud; None for other providers."""
    if PROVIDERS[name].backend not in ("auto", "triton") or device.type != "cuda":
        return None
    from pfml_triton.kernels import tuning

    tiles = asdict(tuning.tiles_here(cloud.points))
    return " ".join(f"{key}={value}" for key, value in tiles.items())
