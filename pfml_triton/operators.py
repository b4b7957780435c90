"""The registered operators: each is one opaque node of a graph, whatever serves it.

    pfml_triton::potential_energy   the energy of a field, and the gradients of its points with it
    pfml_triton::pull_back          the gradients of what the points were gathered from
    pfml_triton::class_potential    the field of a class at free positions
    pfml_triton::turn_basis         a step of the sketch's basis, in place

The first three are autograd Functions, which eager mode applies as they are: that takes the host
some 45 us a step less than torch's dispatcher does, and torch.func knows them. Where a graph is
made (torch.compile, torch.export, make_fx) or tensors are fake, the operator of the same name is
called, of the same function, context and backward.

The energy is a sum, so its gradient is computed along with it in forward, and backward only scales
it. That is differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .potential import (
    TOTALS,
    FieldTerms,
    Given,
    Potential,
    Split,
    active_energy,
    nan_unless_finite,
    rest_energy,
    widest,
)
from .serving import served
from .sketch import is_traced, random_basis, turned_basis

_TURN_EVERY = 100  # training calls between two steps of the sketch's basis, after the first ones

_library = torch.library.Library("pfml_triton", "FRAGMENT")
_potential = lru_cache(64)(Potential)  # a sweep of alpha makes many


def gets_gradient(x: Tensor | None) -> bool:
    """Will a gradient be asked of `x`? Under torch.func, a tensor does not know."""
    if x is None or not torch.is_grad_enabled():
        return False
    return x.requires_grad or is_transformed()


def is_transformed() -> bool:
    """Is a transformation of torch.func at work?"""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_dry_run() -> bool:
    """Are tensors fake, or a graph recorded by make_fx? Nothing of such a call may be kept."""
    return is_traced() and not torch.compiler.is_compiling()


def has_no_values(x: Tensor) -> bool:
    """Is it on the meta device, where an operator has shapes only?"""
    return x.is_meta


class PotentialEnergy(torch.autograd.Function):
    """The value of the loss and its `TOTALS`; then what backward needs, None if it does not.

    The first two are of autograd. What else comes back, `pull_back` takes: the gradient in the
    points, the points and their inverse lengths if they were scaled, and the same of the sources.
    """

    schema = (
        "potential_energy(Tensor points, Tensor labels, Tensor? proxies, Tensor? sources, "
        "Tensor? source_labels, Tensor? everyone, Tensor? everyone_labels, Tensor? basis, "
        "float alpha, float delta, float delta_rep, float min_distance, bool unit, bool mean, "
        "bool prune, str backend, int? classes, bool validate, bool needs_points, "
        "bool needs_proxies, bool needs_sources) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def forward(
        points: Tensor,  # [B, D]
        labels: Tensor,  # [N] int64, of the points, then of the proxies
        proxies: Tensor | None,  # [C, M, D]
        sources: Tensor | None,  # [S, D]
        source_labels: Tensor | None,  # [S] int64
        everyone: Tensor | None,  # [A, D], all points of the field, where those above are a part
        everyone_labels: Tensor | None,  # [A] int64
        basis: Tensor | None,  # [D, at most 60] bfloat16, sound; None takes a random one
        alpha: float,
        delta: float,
        delta_rep: float,
        min_distance: float,
        unit: bool,  # scale all points to unit length?
        mean: bool,
        prune: bool,
        backend: str,
        classes: int | None,  # C, for labels in [0, C); others are an error on the CPU, else NaN
        validate: bool,
        needs_points: bool,  # a gradient
        needs_proxies: bool,
        needs_sources: bool,
    ) -> tuple[Tensor | None, ...]:
        name = "points" if classes is None else "embeddings"
        if classes is not None and (validate or labels.device.type == "cpu"):
            check_range(labels[: len(points)], classes)
        if validate:
            check_finite(points, name)
            check_finite(None if proxies is None else proxies.flatten(0, 1), "proxies")
            check_finite(sources, "sources" if classes is None else "ref_emb")
        given = None if classes is None else Given(labels, points.shape[0], classes)
        if classes is not None and points.is_cuda:  # half the bits, half the passes of a sort
            labels = labels.to(torch.int32)
            if source_labels is not None:  # any integers, of which none may become a class
                source_labels = source_labels.clamp(-1, classes).to(torch.int32)
            if everyone_labels is not None:
                everyone_labels = everyone_labels.to(torch.int32)
        potential = _potential(alpha, delta, delta_rep, min_distance)
        if basis is None and prune:
            basis = random_basis(points.shape[1], points.device)
        place: dict[str, Any] = {"unit": unit, "basis": basis if prune else None}
        rest = None if proxies is None else proxies.flatten(0, 1)
        needs_grad = needs_points or needs_proxies
        pairs = max(_pairs(labels, sources, everyone), 1) if mean else 1

        def energy(using: Backend) -> tuple[Tensor | None, ...]:
            whole = cloud = using.gather(points, labels, potential, rest=rest, **place)
            if everyone is not None and everyone_labels is not None:
                whole = using.gather(everyone, everyone_labels, potential, **place)
            terms = using.field_terms(cloud, whole, potential, needs_grad=needs_grad)
            value, totals = using.total(
                terms, cloud, whole, potential, among=True, pairs=pairs, given=given
            )
            placed = (cloud.points, cloud.inverse) if unit and needs_grad else (None, None)
            if sources is None or source_labels is None:
                return value, totals, terms.grad, *placed, None, None, None
            acting = using.gather(sources.to(cloud.points.dtype), source_labels, potential, **place)
            grad, of_sources = terms.grad, (None, None, None)
            terms = using.field_terms(cloud, acting, potential, needs_grad=needs_grad)
            value, totals = using.total(
                terms, cloud, acting, potential, among=False, pairs=pairs, before=totals
            )
            if grad is not None and terms.grad is not None:
                grad = grad.mul_(2).add_(terms.grad)
            if needs_sources:
                back = using.field_terms(acting, whole, potential, needs_grad=True).grad
                of_sources = back, *((acting.points, acting.inverse) if unit else (None, None))
            return value, totals, grad, *placed, *of_sources

        return served(backend, points, energy)

    @staticmethod
    def fake(
        points: Tensor, labels: Tensor, proxies: Tensor | None, sources: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        unit, (needs_points, needs_proxies, needs_sources) = args[8], args[-3:]
        real = torch.promote_types(points.dtype, torch.float32)
        if proxies is not None:
            real = torch.promote_types(real, proxies.dtype)

        def of_cloud(n: int, needs_grad: bool) -> tuple[Tensor | None, ...]:
            matrix = partial(points.new_empty, n, points.shape[1], dtype=real)
            return (
                matrix() if needs_grad else None,
                matrix() if needs_grad and unit else None,
                points.new_empty(n, dtype=real) if needs_grad and unit else None,
            )

        return (
            points.new_empty((), dtype=real),
            points.new_empty(len(TOTALS), dtype=widest(points.device)),
            *of_cloud(labels.shape[0], needs_points or needs_proxies),
            *of_cloud(0 if sources is None else sources.shape[0], needs_sources),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        points, labels, proxies, sources, _, everyone = inputs[:6]
        ctx.unit, mean, _, ctx.backend = inputs[12:16]
        ctx.needs = inputs[-3:]
        ctx.pairs = _pairs(labels, sources, everyone) if mean else 1
        # The inputs are saved as well, so that a change of them in place is an error.
        ctx.save_for_backward(points, proxies, sources, *output[1:])
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        points, proxies, sources, totals, *found = ctx.saved_tensors
        if grad_output is None:
            return (None,) * 21
        # The field is mutual: x_i stands in row i and in column i of U. Its gradient is doubled
        # here, which saves a pass over it, unless it was when that of the sources joined it.
        twice = sources is None
        needs_points, needs_proxies, needs_sources = ctx.needs
        first = second = third = None
        of_cloud = partial(_pull_back, points, proxies, sources, grad_output, totals)
        of_points, of_sources = (
            part if ctx.unit else (part[0], None, None) for part in (found[:3], found[3:])
        )
        if needs_points or needs_proxies:
            first, second = of_cloud(
                *of_points, points.shape[0], points.dtype if needs_points else None,
                proxies.dtype if needs_proxies else None, ctx.pairs, twice, ctx.backend,
            )  # fmt: skip
        if needs_sources:
            third, _ = of_cloud(
                *of_sources, sources.shape[0], sources.dtype, None, ctx.pairs, False, ctx.backend
            )
        # Where there is none, the operator has an empty tensor.
        first = first if needs_points else None
        second = second.view(proxies.shape) if second is not None and needs_proxies else None
        return first, None, second, third, *(None,) * 17


class _PullBack(torch.autograd.Function):
    """The gradients of the two tensors that a cloud was gathered from, None where not wanted."""

    schema = (
        "pull_back(Tensor points, Tensor? proxies, Tensor? sources, Tensor grad_output, "
        "Tensor totals, Tensor grad, Tensor? placed, Tensor? inverse, SymInt b, "
        "ScalarType? first, ScalarType? second, SymInt pairs, bool twice, str backend) -> "
        "(Tensor, Tensor)"
    )

    @staticmethod
    def forward(
        points: Tensor,  # this and the next two only to be known as what the gradient depends on
        proxies: Tensor | None,
        sources: Tensor | None,
        grad_output: Tensor,
        totals: Tensor,
        grad: Tensor,  # [N, D], see `Backend.pull_back`
        placed: Tensor | None,  # [N, D], if the points were scaled
        inverse: Tensor | None,  # [N]
        b: int,
        first: torch.dtype | None,
        second: torch.dtype | None,
        pairs: int,
        twice: bool,
        backend: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        def pull_back(using: Backend) -> tuple[Tensor | None, Tensor | None]:
            return using.pull_back(
                grad, placed, inverse, grad_output=grad_output, totals=totals,
                split=Split(b, (first, second)), pairs=max(pairs, 1), twice=twice,
            )  # fmt: skip

        return served(backend, points, pull_back)

    @staticmethod
    def fake(*args: Any) -> tuple[Tensor | None, Tensor | None]:
        grad, (b, first, second) = args[5], args[8:11]
        return Split(b, (first, second)).empty(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:
        raise RuntimeError(_ONCE)


class _ClassPotential(torch.autograd.Function):
    """Psi_j [Q]; then its gradient [Q, D] or None, and what makes it NaN, [Q]."""

    schema = (
        "class_potential(Tensor queries, Tensor points, Tensor labels, int class_index, "
        "float alpha, float delta, float delta_rep, float min_distance, bool prune, str backend, "
        "bool validate, bool needs_grad) -> (Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def forward(
        queries: Tensor,  # [Q, D]
        points: Tensor,  # [N, D]
        labels: Tensor,  # [N] int64
        class_index: int,
        alpha: float,
        delta: float,
        delta_rep: float,
        min_distance: float,
        prune: bool,
        backend: str,
        validate: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if validate:
            check_finite(queries, "queries")
            check_finite(points, "points")
        potential = _potential(alpha, delta, delta_rep, min_distance)
        basis = random_basis(points.shape[1], points.device) if prune else None
        of_class = labels.new_full((len(queries),), class_index)

        def field(using: Backend) -> FieldTerms:
            acted_on = using.gather(queries, of_class, potential, basis=basis)
            acting = using.gather(points, labels, potential, basis=basis)
            return using.field_terms(acted_on, acting, potential, needs_grad=needs_grad)

        terms = served(backend, queries, field)
        psi = active_energy(terms, potential)
        psi = psi + rest_energy(terms.own_class, len(points), potential)
        nothing = nan_unless_finite(queries) + nan_unless_finite(points).sum()
        return (psi + nothing).to(nothing.dtype), terms.grad, nothing

    @staticmethod
    def fake(queries: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        real = torch.promote_types(queries.dtype, torch.float32)
        psi, nothing = (queries.new_empty(queries.shape[0], dtype=real) for _ in range(2))
        return psi, queries.new_empty(queries.shape, dtype=real) if args[-1] else None, nothing

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.needs_grad = inputs[-1]
        ctx.save_for_backward(inputs[0], *output[1:])
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        queries, grad, nothing = ctx.saved_tensors
        first = None
        if grad_output is not None and ctx.needs_grad:
            first = (grad * (grad_output + nothing)[:, None]).to(queries.dtype)
            if torch.is_grad_enabled():
                first = OnceDifferentiable.apply(first, queries)
        return first, *(None,) * 11


_ONCE = (
    "the potential energy is differentiable once: its gradient is computed in forward and has no "
    "derivative of its own (reference.potential_field has, for small N)"
)


class OnceDifferentiable(torch.autograd.Function):
    """The identity on a gradient that has no graph: it depends on the points (which require a
    gradient), so a second derivative would be wrong without a word."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, queries: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:
        raise RuntimeError(_ONCE)


def _turn_basis(basis: Tensor, calls: Tensor, points: Tensor, unit: bool) -> None:
    """Count a training call, and turn the basis towards the points when its time has come.

    Args:
        basis: [D, at most 60] bfloat16, sound; written in place, for a captured CUDA graph goes on
            reading it.
        calls: int64 scalar on the CPU, training calls so far.
        points: [B, D] on the device of the basis.
        unit: whether the points have yet to be scaled to unit length.
    """
    # A captured graph would replay the turn every time.
    if basis.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    so_far = int(calls)
    calls += 1
    if so_far % _TURN_EVERY == 0 or (so_far < _TURN_EVERY and so_far & (so_far - 1) == 0):
        turn_now(basis, points, unit)


def turn_now(basis: Tensor, points: Tensor, unit: bool) -> None:
    """Turn the basis towards the points, in place; see `_turn_basis`."""
    # Whatever the ambient autocast dtype is.
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        points = points.detach().float()
        if unit:
            points = torch.nn.functional.normalize(points, dim=1)
        basis.copy_(turned_basis(basis, points))


def turn_basis(basis: Tensor, calls: Tensor, points: Tensor, unit: bool) -> None:
    """`_turn_basis`, or its operator where there is a graph to be made."""
    if is_traced():
        torch.ops.pfml_triton.turn_basis(basis, calls, points.detach(), unit)
    elif is_transformed():
        _TurnBasis.apply(points.detach(), partial(_turn_basis, basis, calls), unit)
    else:
        _turn_basis(basis, calls, points, unit)


class _TurnBasis(torch.autograd.Function):
    """`_turn_basis` under torch.func: here the points are what is in its wrapped tensors."""

    @staticmethod
    def forward(points: Tensor, turn: Callable[[Tensor, bool], None], unit: bool) -> Tensor:
        turn(points, unit)
        return points.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], points: Tensor, turn: Any, unit: bool
    ) -> tuple[Tensor, None]:
        """All members turn it together, once."""
        return _TurnBasis.apply(points.movedim(in_dims[0], 0).flatten(0, 1), turn, unit), None


def _pairs(labels: Tensor, sources: Tensor | None, everyone: Tensor | None) -> int:
    """The ordered pairs of distinct points, and those of a point and a source."""
    n = labels.shape[0] if everyone is None else everyone.shape[0]
    return n * (n - 1) + (0 if sources is None else n * sources.shape[0])


def check_range(labels: Tensor, classes: int) -> None:
    """Are labels [B] int64 in [0, C)? Waits for the device."""
    if len(labels) == 0:
        return
    low, high = (int(end) for end in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be in [0, {classes}), got values in [{low}, {high}]")


def check_finite(points: Tensor | None, name: str) -> None:
    """Are all values of [N, D] finite? Waits for the device."""
    if points is None:
        return
    finite = torch.isfinite(points).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"{name} must be finite, got NaN or Inf in {len(bad)} of {len(points)} rows, the first "
            f"being row {int(bad[0])}"
        )


def _one_by_one(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """The rule of torch.vmap: the members of the batch in turn, for one fills a device."""
    members: list[Sequence[Any]] = [
        [arg] * info.batch_size if dim is None else arg.unbind(dim)
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    outputs = zip(*(function.apply(*member) for member in zip(*members, strict=True)), strict=True)
    stacked = tuple(None if out[0] is None else torch.stack(out) for out in outputs)
    return stacked, tuple(None if out is None else 0 for out in stacked)


def _registered(function: Any) -> Callable[..., Any]:
    """Make an operator of a function, in which an empty tensor stands for None.

    Returns:
        What calls it: the function itself, or the operator where there is a graph to be made.
    """

    def filled(compute: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> tuple[Tensor, ...]:
        outputs = compute(*args)
        return tuple(args[0].new_empty(0) if out is None else out for out in outputs)

    name = _library.define(function.schema)
    _library.impl(name, partial(filled, function.forward), "CompositeExplicitAutograd")
    qualified = f"pfml_triton::{name}"
    torch.library.register_fake(qualified, partial(filled, function.fake), lib=_library)
    torch.library.register_autograd(
        qualified, function.backward, setup_context=function.setup_context, lib=_library
    )
    function.vmap = staticmethod(partial(_one_by_one, function))
    operator = getattr(torch.ops.pfml_triton, name).default

    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        return outputs

    # Where there is a setup_context, torch binds the arguments by name, every time: 50 us of the
    # host that only torch.func is worth.
    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    plain: Any = type(function.__name__, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if is_traced() or has_no_values(args[0]):
            return operator(*args)
        if is_transformed():
            return function.apply(*args)
        return plain.apply(*args) if torch.is_grad_enabled() else function.forward(*args)

    return call


potential_energy = _registered(PotentialEnergy)
class_potential = _registered(_ClassPotential)
_pull_back = _registered(_PullBack)

# Its parts take turns with CUDA graphs: what it does depends on a count that the host keeps.
_library.define(
    "turn_basis(Tensor(a!) basis, Tensor(b!) calls, Tensor points, bool unit) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else (),
)
_library.impl("turn_basis", _turn_basis, "CompositeExplicitAutograd")
torch.library.register_fake("pfml_triton::turn_basis", lambda *_: None, lib=_library)
