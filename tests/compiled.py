"""Work for processes without the interpreter: compile launches, read them, execute them.

Nothing here may import triton at the top: the processes first leave the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

Shape = tuple[str, str, int]  # architecture, dtype, depth


def leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


# Of what is compiled: how many points, whether they are gathered and scaled, whether with gradient.
VARIANTS = ((5000, True, True), (5000, False, True), (5000, False, False), (1600, False, True))
_read: dict[str, Any] = {}  # machine code that this process has looked at, by hash


def machine_code(shape: Shape, alpha: float = 3.0) -> dict[str, Any]:
    """Every kernel that a loss of this shape launches: name -> bench.aot.MachineCode."""
    from bench import aot

    codes = {}
    for name, compiled in kernels(shape, alpha):
        if compiled.hash not in _read:
            _read[compiled.hash] = aot.inspect(compiled)
        codes[name] = _read[compiled.hash]
    return codes


def ptx_of(shape: Shape) -> dict[str, str]:
    """The PTX of the same kernels."""
    return {name: compiled.asm["ptx"] for name, compiled in kernels(shape)}


def barriers_in_turns(shape: Shape) -> dict[str, int]:
    """The barriers that every turn of the forces waits at, by kernel with a gradient."""
    from bench import aot

    found = {}
    for name, compiled in kernels(shape):
        if name.startswith("_force_kernel") and "grad=True" in name:
            code = aot.code(compiled)
            inverse = [loop for loop in code.root.walk() if "MUFU" in _names(code.own(loop))]
            (turns,) = (loop for loop in inverse if loop is not code.root)
            found[name] = _names(code.own(turns)).count("BAR")
    return found


def _names(instructions: list[Any]) -> list[str]:
    return [instruction.name for instruction in instructions]


def kernels(shape: Shape, alpha: float = 3.0) -> Iterator[tuple[str, Any]]:
    """Compile what a loss of this shape launches, each kernel once, under a name that says how."""
    import torch

    from bench import aot
    from pfml_triton import Potential
    from pfml_triton.kernels import launch
    from pfml_triton.kernels.config import tiles_for
    from pfml_triton.potential import Given, Split
    from pfml_triton.sketch import random_basis

    arch, dtype, depth = shape
    # Of other dtypes, points only load in another way: with a gradient there is more of everything.
    variants = [v for v in VARIANTS if dtype == "float32" or v[2]]
    basis = random_basis(depth, torch.device("cpu")).to("meta")
    potential, hashes = Potential(alpha), set()
    for n, is_placed, needs_grad in variants:
        points = torch.empty(n, depth, dtype=getattr(torch, dtype), device="meta")
        rest = None
        if is_placed:
            points, rest = points[:100], points[100:].float()
        # As a loss has them, and as a call of potential_energy.
        kind = torch.int32 if is_placed else torch.int64
        labels = torch.empty(n, dtype=kind, device="meta")
        tiles = tiles_for(depth, n, arch)
        with aot.record() as launches:
            cloud = launch.gather(
                points, labels, potential, rest=rest, unit=is_placed, basis=basis, tiles=tiles
            )
            terms = launch.field_terms(cloud, cloud, potential, needs_grad=needs_grad)
            given = Given(labels.long(), 100, 10) if is_placed else None
            value, totals = launch.total(terms, cloud, cloud, potential, among=True, given=given)
            if is_placed and terms.grad is not None:
                split = Split(100, (points.dtype, torch.float32))
                launch.pull_back(
                    terms.grad, cloud.points, cloud.inverse,
                    grad_output=value, totals=totals, split=split,
                )  # fmt: skip
        for made in launches:
            compiled = made.compile(arch)
            if compiled.hash not in hashes:
                hashes.add(compiled.hash)
                how = f"(N={n}, placed={is_placed}, grad={needs_grad}, alpha={alpha:g})"
                yield made.kernel.__name__ + how, compiled


def synchronisations(call: str) -> int:
    """Make a call on meta tensors with the kernels recorded; looking at a value raises.

    Returns the number of launches.
    """
    import torch

    from bench import aot
    from pfml_triton import PFMLLoss, class_potential, potential_energy
    from pfml_triton.kernels import launch

    x = torch.randn(70, 20, device="meta", requires_grad=True)
    labels = torch.zeros(70, dtype=torch.int32, device="meta")
    many, classes = x.new_empty(5000, 20).requires_grad_(), labels.new_empty(5000)
    loss = PFMLLoss(5, 64, backend="triton").to("meta")
    calls = {
        "potential_energy": lambda: potential_energy(x, labels, backend="triton"),
        "long lists": lambda: potential_energy(many, classes, backend="triton"),
        "sources": lambda: potential_energy(
            x, labels, sources=x + 1, source_labels=labels, backend="triton"
        ),
        "class_potential": lambda: class_potential(x, x.detach(), labels, 0, backend="triton"),
        "PFMLLoss": lambda: loss(x.new_empty(70, 64).requires_grad_(), labels),
    }
    with (
        mock.patch.object(launch, "obstacle", return_value=None),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),  # not for meta
        aot.record() as launches,
    ):
        calls[call]().sum().backward()
    return len(launches)


def compilations(calls: str) -> list[dict[str, int]]:
    """The kernels that Triton compiles anew in each of a series of calls, by name.

    Its launcher decides, as on an H100; what would be compiled is not.
    """
    from collections import Counter

    import torch
    from triton.runtime.jit import JITFunction

    from bench.host import launches_stubbed
    from pfml_triton import PFMLLoss, potential_energy
    from pfml_triton.kernels import launch

    kernels = {f.__name__: f for f in vars(launch).values() if isinstance(f, JITFunction)}
    loss = PFMLLoss(100, 64, 15, reduction="mean", backend="triton")
    wide = torch.randn(600, 80)

    def embeddings(rows: int, first: int = 0) -> Any:
        return wide[:rows, first : first + 64].detach().requires_grad_()

    def labels(rows: int) -> Any:
        return torch.arange(rows) % 100

    def bank(rows: int) -> None:
        loss(embeddings(60), labels(60), None, wide.repeat(16, 1)[:rows, :64], labels(rows))

    series = {
        # 1,501 to 2,100 points: padded to 2,048 and to other numbers of rows
        "batches": [lambda b=b: loss(embeddings(b), labels(b)).backward() for b in range(1, 601)],
        # rows of 80 entries that begin at another one
        "views": [lambda o=o: loss(embeddings(60, o), labels(60)).backward() for o in range(1, 16)],
        # a longer list, shared out, beyond 4,096 of them
        "banks": [lambda r=r: bank(r) for r in (*range(37, 4096, 37), *range(4200, 9600, 211))],
        # 2^31 pairs and more are counted in 64 bits
        "points": [
            lambda n=n: potential_energy(
                torch.randn(n, 4), labels(n), reduction="mean", backend="triton"
            )
            for n in (40_000, 46_341, 70_000)
        ],
    }
    found = []
    with launches_stubbed():
        for call in series[calls]:
            before = {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}
            call()
            after = {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}
            new = Counter(after)
            new.subtract(before)
            found.append({name: count for name, count in new.items() if count})
    return found


def filter_bytes(n: int, depth: int) -> int:
    """What the filter of `n` points writes."""
    import torch

    from bench import aot
    from pfml_triton import Potential
    from pfml_triton.kernels import launch
    from pfml_triton.sketch import random_basis

    points = torch.empty(n, depth, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(n, dtype=torch.int64, device="meta")
    basis = random_basis(depth, torch.device("cpu")).to("meta")
    with aot.record() as launches:
        cloud = launch.gather(points, labels, Potential(), basis=basis)
        launch.field_terms(cloud, cloud, Potential(), needs_grad=True)
    (near,) = (
        made.args["near_ptr"] for made in launches if made.kernel.__name__ == "_filter_kernel"
    )
    return int(near.nbytes)


@cache
def emulator() -> Any:
    """The PTX emulator module named by PFML_PTX_EMULATOR."""
    spec = importlib.util.spec_from_file_location("emulator", os.environ["PFML_PTX_EMULATOR"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulate(
    arch: str,
    function: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    memory: Any = None,
) -> Any:
    """Call a function with the code compiled for `arch` executed on the CPU.

    Races, out-of-bounds accesses and reads of shared memory that was never written are errors; so
    is an operand of wgmma that changes before the wait that covers it.

    Args:
        arch: "sm_80" or "sm_90", with the tile shapes that ship for it.
        function: "gather", that of pfml_triton.kernels.launch, "terms_of" (tests.clouds) or
            "loss_and_gradients".
        memory: contiguous, of which an argument that is not is a view from its beginning.
    """
    from bench import aot
    from pfml_triton.kernels import launch, tuning
    from pfml_triton.kernels.config import tiles_for
    from tests.clouds import terms_of

    functions = {
        "gather": launch.gather,
        "terms_of": partial(terms_of, launch),
        "loss_and_gradients": loss_and_gradients,
    }

    def execute(made: Any) -> None:
        given = [
            memory if hasattr(arg, "is_contiguous") and not arg.is_contiguous() else arg
            for arg in made.runtime_args()
        ]
        try:
            result = emulator().run(
                made.compile(arch), made.grid, given, detect_races=True, check_proxy_fences=True
            )
        except emulator().PTXError as error:  # of a module that only this process knows
            kind = type(error).__name__
            raise AssertionError(f"{made.kernel.__name__}: {kind}: {error}") from None
        assert not result.uninit_reads, result.uninit_reads

    def tiles_of(depth: int, points: int, _: str) -> Any:
        return tiles_for(depth, points, arch)

    with (
        mock.patch.object(launch, "obstacle", return_value=None),
        mock.patch.object(tuning, "tiles_for", tiles_of),
        aot.record(execute),
    ):
        tuning.forget()  # the choices for another chip
        return functions[function](*arguments, **options)


def emulate_far_apart(
    arch: str, path: str, points: Any, labels: Any, stride: int, options: dict[str, Any]
) -> Any:
    """`emulate` of terms_of, for points whose rows lie `stride` entries apart in a file with holes.

    The file is mapped here: a tensor that is handed to a process would be copied.
    """
    import torch

    from pfml_triton import Potential

    n, depth = points.shape
    size = (n - 1) * stride + depth
    with open(path, "wb") as file:
        file.truncate(points.itemsize * size)
    whole = torch.from_file(path, shared=True, size=size, dtype=points.dtype)
    far = whole.as_strided((n, depth), (stride, 1))
    far.copy_(points)
    return emulate(arch, "terms_of", (far, labels, far, labels, Potential()), options, whole)


def loss_and_gradients(settings: dict[str, Any], *inputs: Any) -> list[Any]:
    """Value, stats and gradients of a loss with seeded proxies, of embeddings, labels and a memory
    bank with its labels, which nobody looks at, as on a GPU."""
    import torch

    from pfml_triton import PFMLLoss, operators

    torch.manual_seed(0)
    loss = PFMLLoss(**settings)
    embeddings, labels, *bank = (x.clone() if x.is_floating_point() else x for x in inputs)
    embeddings.requires_grad_()
    if bank:
        bank[0].requires_grad_()
    with mock.patch.object(operators, "check_range"):
        value = loss(embeddings, labels, None, *bank)
    (3 * value).backward()
    assert loss.last_stats is not None
    leaves = [embeddings, loss.proxies, *bank[:1]]
    return [value.detach(), *loss.last_stats.values(), *(leaf.grad for leaf in leaves)]


def host_part(repeats: int, out: Path) -> None:
    """Time the host's part of a step."""
    from rich.console import Console

    from bench.host import run
    from bench.settings import HostSettings

    run(HostSettings(repeats=repeats), out, Console(quiet=True))


def launched_on_a_chip(shared_memory: int) -> tuple[list[str], str]:
    """The kernels that a call launches on a chip with this much shared memory, and what it warns.

    They are compiled for sm_90, and do everything that Triton does before the driver runs them.
    """
    import warnings
    from types import SimpleNamespace

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from pfml_triton import potential_energy, serving
    from pfml_triton.kernels import launch, tuning

    ran: list[str] = []

    def launcher(source: Any, metadata: Any) -> Any:
        return lambda *_: ran.append(metadata.name)

    chip = SimpleNamespace(
        get_current_device=lambda: shared_memory,  # Triton keeps the memory of a device
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": shared_memory},
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda _: None,
        ),
    )
    points, labels = torch.randn(5000, 64), torch.zeros(5000, dtype=torch.int64)
    with (
        mock.patch.object(driver, "_active", chip),
        mock.patch.object(launch, "obstacle", return_value=None),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        try:
            potential_energy(points, labels, backend="triton")
        finally:
            for kernel in vars(launch).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
            for known in (serving._refused, serving._told):
                known.clear()
            tuning.forget()
    (message,) = told
    return ran, str(message.message)


def modelled_step(out: Path) -> None:
    """Model the kernels of a step of a rehearsal."""
    from bench.gpu.rig import Rig
    from bench.gpu.steps import model

    model(Rig(out, "first", rehearses=True), "cub")
