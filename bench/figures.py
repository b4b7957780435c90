"""Pictures of class fields: of a toy set in the plane, and of a trained embedding.

Far from every point Psi_j is the constant (points of other classes) * delta^-alpha, since repulsion
saturates. The pictures show Psi_j minus that constant, so that 0 is "nothing near": members of
class j are drawn into the wells and pushed off the hills. The scale is linear near 0 and
logarithmic beyond, for the field spans decades.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional

from pfml_triton import Potential, class_potential, potential_energy

COLORMAP = "coolwarm"
LEVELS = 41
CLASS_COLOURS = ("#ffffff", "#1a1a1a")
EDGE_COLOURS = ("#1a1a1a", "#ffffff")
ARROW_COLOUR = "#1a1a1a"
RESOLUTION = 300  # grid points along the longer side

TOY_POTENTIAL = Potential(alpha=3.0, delta=0.45, min_distance=0.05)
TOY_SAMPLES = (
    ((-1.6, 0.3), (-1.15, 1.0), (-0.3, -0.15), (-1.3, -0.8), (-0.3, 0.8), (0.4, -0.75)),
    ((1.55, 0.15), (1.0, -0.95), (1.2, 1.0), (0.6, 0.3), (1.8, -0.6), (0.0, 0.15)),
)
TOY_PROXIES = (((-0.95, 0.15), (-0.75, -1.15)), ((1.35, -0.2), (0.55, 1.15)))


def class_field_figure(path: Path) -> None:
    """Draw the fields of a two-class toy set in the plane, after the paper's picture of the method.

    Filled contours of Psi_1 and Psi_2 side by side, the samples and proxies that induce them, and
    the net force -dU/dx (Eq. 6) on the members of the panel's class: arrows in the direction of the
    force, their length growing with its logarithm.

    Args:
        path: the PNG (or other format that matplotlib writes) to create; its folder must exist.
    """
    clouds = [*map(torch.tensor, TOY_SAMPLES), *map(torch.tensor, TOY_PROXIES)]
    points = torch.cat(clouds)
    owners = torch.tensor([0, 1, 0, 1]).repeat_interleave(torch.tensor([len(c) for c in clouds]))
    is_proxy = torch.arange(len(points)) >= len(clouds[0]) + len(clouds[1])
    forces = net_forces(points, owners, TOY_POTENTIAL)

    extent = (2.45, 1.7)
    x, y, grid = _grid(extent)
    figure, axes = _two_panels(10.0, 3.75)
    fields = [_field_above_background(grid, points, owners, j, TOY_POTENTIAL) for j in range(2)]
    norm = AsinhNorm(linear_width=5.0, vmin=-150.0, vmax=150.0)
    for j, (panel, field) in enumerate(zip(axes, fields, strict=True)):
        _draw_field(panel, x, y, field, norm)
        _draw_points(panel, points, owners, is_proxy)
        own = owners == j
        arrows = forces[own]
        strength = arrows.norm(dim=1, keepdim=True)
        arrows = arrows / strength * 0.1 * torch.log1p(strength)
        panel.quiver(
            points[own, 0], points[own, 1], arrows[:, 0], arrows[:, 1],
            angles="xy", scale_units="xy", scale=1.0, color=ARROW_COLOUR, width=0.006, zorder=4,
        )  # fmt: skip
        _draw_radius(panel, TOY_POTENTIAL.delta, extent)
        panel.set_title(rf"$\Psi_{j + 1}$: the field that class {j + 1} feels")
    _finish(figure, axes, norm, ("class 1", "class 2"), proxies=True, arrows=True)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.05)


def embedding_field_figure(
    path: Path,
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    potential: Potential,
    names: Sequence[str],
) -> None:
    """Draw the fields of two neighbouring classes of an embedding, on a section of the sphere.

    A typical pair: of all classes and their nearest other class, by mean direction, the one at the
    median distance. The section is the hemisphere around both means, spanned by the direction from
    one to the other and by the direction in which their samples spread most besides, seen from
    above. The field is that of the two classes, evaluated on the section; points are drawn where
    they project to, and since they lie off it, wells and hills are lower there than at the points.

    Args:
        path: the PNG to create; its folder must exist.
        embeddings: [n, D] float, any length; normalised here.
        labels: [n] int64 in [0, C), with C >= 2 and every class present.
        proxies: [C, M, D] float, M >= 0.
        potential: of the loss.
        names: of the classes, [C].

    Raises:
        ValueError: D < 3, which leaves no direction to look from.
    """
    if embeddings.shape[1] < 3:
        raise ValueError(f"a section needs embeddings of size 3 or more, got {embeddings.shape[1]}")
    embeddings = functional.normalize(embeddings, dim=1)
    proxies = functional.normalize(proxies, dim=2)
    means = torch.zeros(len(names), embeddings.shape[1]).index_add_(0, labels, embeddings)
    means = functional.normalize(means, dim=1)
    similarity = (means @ means.T).fill_diagonal_(-2)
    nearest, partner = similarity.max(dim=1)
    first = int(nearest.argsort()[len(names) // 2])
    pair = (first, int(partner[first]))

    is_sample = [labels == c for c in pair]
    clouds = [*(embeddings[s] for s in is_sample), *(proxies[c] for c in pair)]
    points = torch.cat(clouds)
    owners = torch.tensor([0, 1, 0, 1]).repeat_interleave(torch.tensor([len(c) for c in clouds]))
    is_proxy = torch.arange(len(points)) >= len(clouds[0]) + len(clouds[1])

    centre = functional.normalize(means[pair[0]] + means[pair[1]], dim=0)
    across = functional.normalize(means[pair[1]] - means[pair[0]], dim=0)
    samples = points[~is_proxy]
    axes_known = torch.stack([centre, across])
    rest = samples - samples @ axes_known.T @ axes_known
    plane = torch.stack([across, torch.linalg.svd(rest, full_matrices=False).Vh[0]])

    reach = float((samples @ plane.T).abs().max())
    half = min(max(1.2 * reach, 2 * potential.delta), 0.7)  # 0.7: the corners are on the sphere
    x, y, flat = _grid((half, half))
    height = (1 - flat.square().sum(dim=1, keepdim=True)).sqrt()
    grid = height * centre + flat @ plane

    visible = points @ centre > 0  # the others are behind the hemisphere
    drawn = points[visible] @ plane.T
    figure, axes = _two_panels(10.0, 5.0)
    fields = [_field_above_background(grid, points, owners, j, potential) for j in range(2)]
    limit = float(max(field.abs().max() for field in fields))
    norm = AsinhNorm(linear_width=limit / 50, vmin=-limit, vmax=limit)
    for j, (panel, field) in enumerate(zip(axes, fields, strict=True)):
        _draw_field(panel, x, y, field, norm)
        _draw_points(panel, drawn, owners[visible], is_proxy[visible])
        _draw_radius(panel, potential.delta, (half, half))
        panel.set(xlim=(-half, half), ylim=(-half, half))
        panel.set_title(rf"$\Psi_{j + 1}$")
    # A dollar sign would start a formula.
    characters = [f"class {j + 1}: {names[c]}".replace("$", r"\$") for j, c in enumerate(pair)]
    _finish(figure, axes, norm, characters, proxies=bool(is_proxy.any()), arrows=False)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.05)


def net_forces(points: Tensor, labels: Tensor, potential: Potential) -> Tensor:
    """The force -dU/dx [N, D] on each of the points [N, D] with labels [N]."""
    moved = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(potential_energy(moved, labels, potential), moved)
    return -gradient


def _field_above_background(
    grid: Tensor, points: Tensor, labels: Tensor, class_index: int, potential: Potential
) -> Tensor:
    """Psi_j [Q] on the grid [Q, D], less its value where no point is near."""
    others = int((labels != class_index).sum())
    background = others * potential.repulsion_constant
    return class_potential(grid, points, labels, class_index, potential) - background


def _grid(extent: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates x [W] and y [H] of a grid over [-extent, extent], and its points [H W, 2]."""
    width, height = extent
    x = torch.linspace(-width, width, RESOLUTION)
    y = torch.linspace(-height, height, round(RESOLUTION * height / width))
    return x, y, torch.cartesian_prod(y, x).flip(1)


def _two_panels(width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    return figure, axes


def _draw_field(panel: Axes, x: Tensor, y: Tensor, field: Tensor, norm: AsinhNorm) -> None:
    levels = norm.inverse(np.linspace(0, 1, LEVELS))
    values = field.reshape(len(y), len(x)).numpy()
    panel.contourf(x, y, values, levels=levels, norm=norm, cmap=COLORMAP, extend="both")
    panel.contour(x, y, values, levels=levels[::2], colors="k", linewidths=0.35, alpha=0.35,
                  negative_linestyles="solid")  # fmt: skip
    panel.set_aspect("equal")
    panel.set_xticks([])
    panel.set_yticks([])


def _draw_points(panel: Axes, points: Tensor, owners: Tensor, is_proxy: Tensor) -> None:
    for j in range(2):
        for proxy, marker, size in ((False, "o", 46), (True, "*", 170)):
            chosen = (owners == j) & (is_proxy == proxy)
            panel.scatter(
                points[chosen, 0], points[chosen, 1], s=size, marker=marker, linewidths=1.0,
                color=CLASS_COLOURS[j], edgecolors=EDGE_COLOURS[j], zorder=3,
            )  # fmt: skip


def _draw_radius(panel: Axes, delta: float, extent: tuple[float, float]) -> None:
    """A scale bar of length delta in the lower left corner."""
    margin = 0.06 * extent[0]
    left, bottom = margin - extent[0], margin - extent[1]
    panel.plot([left, left + delta], [bottom, bottom], color=ARROW_COLOUR, linewidth=2.0)
    panel.text(left + delta / 2, bottom + margin / 3, r"$\delta$", ha="center", va="bottom")


def _finish(
    figure: Figure,
    axes: np.ndarray,
    norm: AsinhNorm,
    names: Sequence[str],
    *,
    proxies: bool,
    arrows: bool,
) -> None:
    """Add the colour bar and the legend."""
    bar = figure.colorbar(
        ScalarMappable(norm, COLORMAP), ax=axes, extend="both", fraction=0.03, pad=0.015
    )
    decades = 10.0 ** np.arange(
        np.ceil(np.log10(norm.linear_width)), np.log10(float(norm.vmax or 1))
    )
    bar.set_ticks([*-decades[::-1], 0.0, *decades])
    bar.minorticks_off()
    bar.set_label(r"$\Psi_j$ above its value far away")
    handles = []
    for j, name in enumerate(names):
        kinds = (("o", 7.0, "samples"), ("*", 13.0, "proxies"))
        for marker, size, kind in kinds if proxies else kinds[:1]:
            handles.append(
                Line2D([], [], linestyle="", marker=marker, markersize=size,
                       color=CLASS_COLOURS[j], markeredgecolor="#1a1a1a", label=f"{name}, {kind}")
            )  # fmt: skip
    if arrows:
        handles.append(
            Line2D([], [], linestyle="", marker=r"$\rightarrow$", markersize=16,
                   color=ARROW_COLOUR, label="net force")
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
