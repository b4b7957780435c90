"""Command line of the benchmarks: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.chips import CHIPS
from bench.recipes import LOSSES, PRESETS, SPLITS
from bench.settings import (
    DEVICES,
    DTYPES,
    GPU_PHASES,
    MODELLED,
    MODES,
    PROVIDERS,
    SIZES,
    SPEED_DTYPES,
    GpuSettings,
    HostSettings,
    RanksSettings,
    RetrievalSettings,
    RooflineSettings,
    SpeedSettings,
    TuneSettings,
)

INTERRUPTED = 130  # what a shell reports after Ctrl-C
PLOTS = {"speed": "speed.jsonl", "growth": "speed.jsonl", "roofline": "roofline.jsonl"}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; the arguments it returns hold `command`, a function."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks and studies of the PFML loss."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_retrieval(commands)
    _add_report(commands)
    _add_speed(commands)
    _add_plot(commands)
    _add_gpu(commands)
    _add_host(commands)
    _add_ranks(commands)
    _add_roofline(commands)
    _add_tune(commands)
    _add_figure(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status.

    0, 1 for a result that is wrong, 2 for a wrong value, 130 after Ctrl-C.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.command(parsed) or 0
    except KeyboardInterrupt:
        print("\nInterrupted. What had been written is kept.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"python -m bench: error: {error}; the benchmarks need the dev extra: "
            "pip install -e '.[dev]'",
            file=sys.stderr,
        )
        return 2


def _add_retrieval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "retrieval",
        help="train networks with this loss and others, and measure zero-shot retrieval",
        description="Train a network with each loss, retrieve the images of classes never seen in "
        "training, and print R@K and MAP@R. Without options: PFMLLoss and a small network, on "
        "drawings of half of the characters that matplotlib's fonts share, a minute or two. Runs "
        "that are done are not run again, and one that was stopped goes on.",
        formatter_class=_Help,
    )
    default = RetrievalSettings()
    add = parser.add_argument
    add("--preset", choices=PRESETS, metavar="PRESET", default=default.preset,
        help=f"data, network and settings: {', '.join(PRESETS)}")  # fmt: skip
    add("--losses", nargs="+", choices=("all", *LOSSES), metavar="LOSS",
        default=list(default.losses), help=f"all, or some of {', '.join(LOSSES)}")  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="N", default=list(default.seeds),
        help="a run with each")  # fmt: skip
    add("--label-noise", nargs="+", type=float, metavar="SHARE", default=list(default.label_noise),
        help="of the training labels, replaced at random; a run with each")  # fmt: skip
    add("--set", nargs="+", action="extend", type=_variation, dest="variations", default=[],
        metavar="NAME=VALUE[,VALUE...]", help="change a setting of bench.recipes.Recipe or an "
        "option of the losses, a run with each value")  # fmt: skip
    add("--split", choices=SPLITS, default=default.split,
        help="validation: hold out training classes and leave the test classes alone")  # fmt: skip
    add("--epochs", type=int, metavar="N", help="passes over the images; the preset's if not given")
    add("--data", type=Path, metavar="FOLDER", help="the data set, as its authors ship it")
    add("--weights", metavar="FILE",
        help="of a pre-trained network, or 'random'; timm's own if not given")  # fmt: skip
    add("--strict", action="store_true", help="refuse images that cannot be read")
    add("--workers", type=int, metavar="N",
        help="processes that read photographs; one a core, up to 8, if not given")  # fmt: skip
    add("--restart", action="store_true", help="run again what is done, or half done")
    add("--device", choices=DEVICES, default=default.device, help="auto: a GPU if there is one")
    add("--threads", type=int, metavar="N", help="CPU threads; PyTorch's own choice if not given")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs/retrieval"),
        help="gets results.jsonl, log.jsonl, and a checkpoint of each run")  # fmt: skip
    parser.set_defaults(command=_retrieval)


def _variation(text: str) -> tuple[str, tuple[Any, ...]]:
    """A setting and its values, from NAME=VALUE,VALUE: numbers, True, False, None, else a word."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE[,VALUE...], got {text!r}")
    return name, tuple(_literal(value) for value in values.split(","))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _retrieval(parsed: argparse.Namespace) -> None:
    # Threads that spin while they wait take the core from the one they wait for, where another
    # program is busy too: several times slower. Read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from bench.retrieval.protocol import run

    values = _values(parsed)
    values |= {name: tuple(values[name]) for name in ("losses", "seeds", "label_noise")}
    if "all" in values["losses"]:
        values["losses"] = LOSSES
    variations = dict(parsed.variations)
    if len(variations) < len(parsed.variations):
        raise ValueError(
            f"--set takes a name once, got {', '.join(name for name, _ in parsed.variations)}"
        )
    run(RetrievalSettings(**values | {"variations": variations}), parsed.out)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="tables and pictures of what bench retrieval has found, on one page",
        description="Draw what the runs of bench retrieval have left: tables of R@K and MAP@R over "
        "seeds, with label noise, ablations beside the published points, distances of proxies to "
        "samples, class fields, a map of test classes and a retrieval sheet. Gathered in "
        "report.html.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("--runs", type=Path, metavar="FOLDER", default=Path("runs/retrieval"), help="to read")
    add("--data", type=Path, metavar="FOLDER",
        help="the data set of the runs, for its images; glyphs need none")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", default=Path("runs/report"),
        help="gets report.html and its pictures")  # fmt: skip
    parser.set_defaults(command=_report)


def _report(parsed: argparse.Namespace) -> None:
    from bench.retrieval.datasets import load
    from bench.retrieval.report import data_sets, write_report

    names = data_sets(parsed.runs)
    if parsed.data is not None:  # of the one data set that has a folder
        names = [name for name in names if name != "glyphs"]
        if len(names) != 1:
            raise ValueError(
                f"--data is the folder of one data set, but {parsed.runs} has runs of "
                f"{', '.join(names) or 'glyphs alone, which need none'}"
            )
    drawn = parsed.data is not None or "glyphs" in names
    name = names[0] if parsed.data is not None else "glyphs"
    data = load(name, parsed.data) if drawn else None
    print(f"Wrote {write_report(parsed.runs, parsed.out, data)}")


def _add_speed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "speed",
        help="this loss beside the others: time, memory, operations (ten minutes)",
        description="Call losses as their users do, at sizes of data sets, and measure time, peak "
        "memory and operations: this loss with pruning and without, the same energy in plain "
        "PyTorch, under torch.compile and in KeOps, and losses of pytorch-metric-learning. "
        "Whatever computes this loss is checked against the reference before a time is taken. "
        "This loss is timed as it is in the midst of a training, where one call in a hundred turns "
        "the basis of its sketch. On a GPU, calls are also timed back to back, on the host alone "
        "and in CUDA graphs. What cannot run is a row that says why. Exit status 1 if a result was "
        "wrong.",
        formatter_class=_Help,
    )
    default = SpeedSettings()
    add = parser.add_argument
    sizes = ", ".join(f"{name} {size.n:,}" for name, size in SIZES.items())
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE",
        help=f"which clouds, here with their N: {sizes}. In the last two every pair acts. All of "
        "them if neither --sizes nor --n is given")  # fmt: skip
    add("--n", nargs="+", type=int, metavar="N",
        help="clouds of as many points, well apart: 100 samples, the rest proxies")  # fmt: skip
    add("--d", type=int, metavar="D", default=default.d, help="length of the points of --n")
    add("--classes", type=int, metavar="C",
        help="classes of --n; as many as make 4 proxies of each if not given")  # fmt: skip
    add("--providers", nargs="+", choices=PROVIDERS, metavar="PROVIDER",
        help=f"some of {', '.join(PROVIDERS)}; all if not given")  # fmt: skip
    add("--mode", dest="modes", nargs="+", choices=MODES, metavar="MODE",
        help=f"{' or '.join(MODES)}; both if not given")  # fmt: skip
    add("--dtype", choices=SPEED_DTYPES, default=default.dtype,
        help="of the embeddings; proxies are float32")  # fmt: skip
    add("--repeats", type=int, metavar="N", default=default.repeats,
        help="timed calls of each, in turn; quick ones get up to 100")  # fmt: skip
    add("--seed", type=int, metavar="N", default=default.seed, help="of the points")
    add("--device", choices=DEVICES, default=default.device, help="auto: a GPU if there is one")
    add("--slow", action="store_true", help="also what takes more than 10 seconds a call")
    add("--threads", type=int, metavar="N", help="CPU threads; PyTorch's own choice if not given")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets a row in speed.jsonl for each size, provider and mode")  # fmt: skip
    parser.set_defaults(command=_speed)


def _speed(parsed: argparse.Namespace) -> int:
    from bench.speed import is_broken, run

    given = {name: value for name, value in _values(parsed).items() if value is not None}
    chosen = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if "n" in chosen:
        chosen.setdefault("sizes", ())
    return int(is_broken(run(SpeedSettings(**given | chosen), parsed.out)))


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw the rows that bench speed or bench roofline has left",
        description="Draw the latest rows: 'speed', bars of every provider at every size; "
        "'growth', time against N, of bench speed at several --n; 'roofline', the parts of "
        "modelled steps.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("kind", choices=PLOTS, metavar="KIND", help=f"one of {', '.join(PLOTS)}")
    add("--rows", type=Path, metavar="FILE", help="to read; if not given, where they are left")
    add("--out", type=Path, metavar="FILE", required=True, help="picture to write")
    parser.set_defaults(command=_plot)


def _plot(parsed: argparse.Namespace) -> None:
    from bench.plots import growth_figure, speed_figure
    from bench.roofline_plot import roofline_figure

    rows = parsed.rows or Path("runs", PLOTS[parsed.kind])
    figures = {"speed": speed_figure, "growth": growth_figure, "roofline": roofline_figure}
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    figures[parsed.kind](rows, parsed.out)
    print(f"Wrote {parsed.out}")


def _add_gpu(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    default = GpuSettings()
    parser = commands.add_parser(
        "gpu",
        help="does it run on this GPU, is it right, and how fast? One page (eight minutes)",
        description="The first minutes on a GPU, in phases that end within the minutes given: the "
        "machine, the first step from an empty cache, the tests, a stress for races, times of "
        "steps and kernels beside the model, plain PyTorch and torch.compile, the error of "
        "products, tuning, and compute-sanitizer. Needs torch, triton and numpy. A phase that "
        "fails or hangs is a row that says so. Leaves a page and its rows, named after the device. "
        "Exit status 1 if a check or a phase failed.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("--minutes", type=float, metavar="N", default=default.minutes,
        help="for all phases together; what finds no time left is skipped")  # fmt: skip
    add("--phases", nargs="+", choices=GPU_PHASES, metavar="PHASE",
        help=f"some of {', '.join(GPU_PHASES)}, in that order, the machine in any case; all if not "
        "given. A second call into the same folder adds to the page")  # fmt: skip
    add("--rehearse", action="store_true",
        help="run the phases without a GPU, on tiny clouds; the numbers mean nothing")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", default=Path("runs/gpu"),
        help="gets rows.jsonl, log.txt, and DEVICE.md and DEVICE.jsonl")  # fmt: skip
    parser.set_defaults(command=_gpu)


def _gpu(parsed: argparse.Namespace) -> int:
    from bench.gpu import is_broken, run

    phases = GPU_PHASES if parsed.phases is None else tuple(parsed.phases)
    settings = GpuSettings(parsed.minutes, phases, parsed.rehearse)
    return int(is_broken(run(settings, parsed.out)))


def _add_host(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "host",
        help="what a step costs the host, launches stubbed out; needs no GPU (seconds)",
        description="Time the Python, dispatcher and autograd of one call of PFMLLoss and its "
        "backward, in parts, with launches that stop short of the driver; count the launches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = HostSettings()
    add = parser.add_argument
    add("--size", choices=SIZES, default=default.size, help="of the batch and the proxies")
    add("--repeats", type=int, metavar="N", default=default.repeats, help="timed steps")
    add("--seed", type=int, metavar="N", default=default.seed, help="of the points")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets a row in host.jsonl")  # fmt: skip
    parser.set_defaults(command=_host)


def _host(parsed: argparse.Namespace) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # it is the launcher that counts
    from bench.host import run

    run(HostSettings(**_values(parsed)), parsed.out)


def _add_ranks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "ranks",
        help="the loss over 1 to 4 processes: bytes on the wire, work and memory of each (minutes)",
        description="Call ShardedPFMLLoss, forward and backward, with its proxies on every rank "
        "and with those that fully_shard shares out, over as many "
        "processes of this machine as are asked for, with gloo. Gradients are held against those "
        "of one process first. Times are not taken: the processes share the cores. --plan prints "
        "what a rank of many GPUs would need, by the formulas of bench/plan.py, and measures "
        "nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = RanksSettings()
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE", default=list(default.sizes),
        help=f"some of {', '.join(SIZES)}")  # fmt: skip
    add("--ranks", nargs="+", type=int, metavar="N", default=list(default.ranks),
        help="numbers of processes")  # fmt: skip
    add("--seed", type=int, metavar="N", default=default.seed, help="of the points")
    add("--plan", action="store_true", help="print the plan instead")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets rows in ranks.jsonl, one a rank")  # fmt: skip
    parser.set_defaults(command=_ranks)


def _ranks(parsed: argparse.Namespace) -> None:
    if parsed.plan:
        from bench.plan import as_markdown

        print(as_markdown())
        return
    from bench.ranks import run

    run(RanksSettings(tuple(parsed.sizes), tuple(parsed.ranks), parsed.seed), parsed.out)


def _add_roofline(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    default = RooflineSettings()
    parser = commands.add_parser(
        "roofline",
        help="modelled time of a step on a GPU that is not here, from its machine code",
        description="Model the time of one step, forward and backward, on GPUs that are not here: "
        "compile what PFMLLoss launches, read the machine code, count the work of a real cloud "
        "of points, and simulate the issue of the instructions. Says which unit limits each "
        "kernel and how far the step is from the limits of the chip, and ends with the same model "
        "of Triton's own tutorials beside their published speeds. Nothing is measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    chips = ", ".join(f"{arch} ({chip.name})" for arch, chip in CHIPS.items())
    add("--arch", nargs="+", metavar="ARCH", default=list(default.archs), help=f"of {chips}")
    add("--sizes", nargs="+", metavar="SIZE", default=list(default.sizes),
        help=f"of {', '.join(MODELLED)}; the last takes a minute to count")  # fmt: skip
    add("--dtype", choices=DTYPES, default=default.dtype, help="of the points")
    add("--seed", type=int, metavar="N", default=default.seed, help="of the points")
    add("--explain", action="store_true", help="print how each time comes about")
    add("--validate", action="store_true", help="print the validation and nothing else")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets rows in roofline.jsonl and the picture roofline.png")  # fmt: skip
    parser.set_defaults(command=_roofline)


def _roofline(parsed: argparse.Namespace) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # it is the machine code that counts
    from bench.roofline import run

    values = _values(parsed) | {"archs": tuple(parsed.arch), "sizes": tuple(parsed.sizes)}
    del values["arch"]
    run(RooflineSettings(**values), parsed.out)


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the fastest tile shapes on this GPU, or rank them without one",
        description="Time the configurations of every kernel on this GPU with triton.autotune, "
        "print the best beside those shipped, and save them to the tuning file that pfml_triton "
        "reads. With --static and --arch, rank the same configurations on a machine without a GPU "
        "by their modelled time, from the machine code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = TuneSettings()
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE", default=list(default.sizes),
        help=f"clouds of points: {', '.join(SIZES)}")  # fmt: skip
    add("--depths", nargs="+", type=int, metavar="D", default=list(default.depths),
        help="lengths of the points")  # fmt: skip
    add("--dtypes", nargs="+", choices=SPEED_DTYPES, default=list(default.dtypes),
        help="of the points")  # fmt: skip
    add("--static", action="store_true", help="rank by modelled time; needs no GPU, but --arch")
    add("--arch", choices=CHIPS, help="of the chip, for --static")
    add("--file", type=Path, metavar="FILE",
        help="tuning file; if not given, that of PFML_TRITON_TUNING, or "
        "pfml_triton/tuning.json in the user's cache directory")  # fmt: skip
    add("--seed", type=int, metavar="N", default=default.seed, help="of the points")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets a row in tune.jsonl for each configuration")  # fmt: skip
    parser.set_defaults(command=_tune)


def _tune(parsed: argparse.Namespace) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # it is compiled code that is timed or read
    from bench.tune import run

    chosen = {name: tuple(getattr(parsed, name)) for name in ("sizes", "depths", "dtypes")}
    run(TuneSettings(**_values(parsed) | chosen), parsed.out)


def _add_figure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "figure",
        help="draw the class fields of a toy set in the plane",
        description="Draw the fields Psi_1 and Psi_2 of a two-class toy set in the plane, its "
        "samples and proxies, and the net force on them.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="picture to write")
    parser.set_defaults(command=_figure)


def _figure(parsed: argparse.Namespace) -> None:
    from bench.figures import class_field_figure

    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    class_field_figure(parsed.out)
    print(f"Wrote {parsed.out}")


def _values(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given of the settings of a study."""
    return {name: value for name, value in vars(parsed).items() if name not in ("command", "out")}


if __name__ == "__main__":
    sys.exit(main())
