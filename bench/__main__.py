"""Command line of the benchmarks: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.settings import (
    DEVICES,
    PROVIDERS,
    SIZES,
    PruningSettings,
    RetrievalSettings,
)

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; the arguments it returns hold `command`, a function."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks and studies of the PFML loss."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_retrieval(commands)
    _add_pruning(commands)
    _add_figure(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, 2 for a wrong value, 130 after Ctrl-C."""
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.command(parsed)
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
    return 0


def _add_retrieval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "retrieval",
        help="train a small network and measure zero-shot retrieval (a minute or two)",
        description="Train a small network from scratch with PFMLLoss on drawings of half of the "
        "characters that matplotlib's fonts share, then retrieve the other half, never seen in "
        "training. Prints R@K for raw pixels, the untrained and the trained network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = RetrievalSettings()
    add = parser.add_argument
    add("--epochs", type=int, metavar="N", default=default.epochs, help="passes over the images")
    add("--seed", type=int, metavar="N", default=default.seed, help="of network and batches")
    add("--device", choices=DEVICES, default=default.device, help="auto: a GPU if there is one")
    add("--batch-size", type=int, metavar="B", default=default.batch_size, help="images a step")
    add("--images-per-class", type=int, metavar="N", default=default.images_per_class,
        help="images of each class in a batch; divides the batch size")  # fmt: skip
    add("--embedding-size", type=int, metavar="D", default=default.embedding_size,
        help="length of the embeddings")  # fmt: skip
    add("--proxies-per-class", type=int, metavar="M", default=default.proxies_per_class,
        help="learned proxies of each class; the paper has 15 on CUB and Cars")  # fmt: skip
    add("--alpha", type=float, default=default.alpha, help="decay exponent of the potential")
    add("--delta", type=float, default=default.delta, help="radius of the potential")
    add("--lr", type=float, default=default.lr, help="learning rate of the network")
    add("--proxy-lr-mult", type=float, metavar="X", default=default.proxy_lr_mult,
        help="learning rate of the proxies, in units of --lr")  # fmt: skip
    add("--threads", type=int, metavar="N", help="CPU threads; PyTorch's own choice if not given")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets a row in retrieval.jsonl and pictures of class fields")  # fmt: skip
    parser.set_defaults(command=_retrieval)


def _retrieval(parsed: argparse.Namespace) -> None:
    # Threads that spin while they wait take the core from the one they wait for, where another
    # program is busy too: several times slower. Read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from bench.retrieval import run

    run(RetrievalSettings(**_values(parsed)), parsed.out)


def _add_pruning(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "pruning",
        help="time and memory with pruning and without (nine minutes of an idle machine)",
        description="Measure forward and backward of the energy with pruning, without it, and as "
        "plain PyTorch writes it (eager and torch.compile): time, peak memory and operations, on "
        "clouds of well-separated classes and on those where nothing can be pruned. Checks that "
        "all gradients agree before it takes a time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = PruningSettings()
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=list(default.sizes),
        help="clouds: N = 8,000; 22,736, a batch and proxies as on SOP; 100,000; and 8,000 where "
        "every pair acts")  # fmt: skip
    add("--providers", nargs="+", choices=PROVIDERS, default=list(default.providers),
        help="what is measured")  # fmt: skip
    add("--repeats", type=int, metavar="N", default=default.repeats, help="timed calls of each")
    add("--depth", type=int, metavar="D", default=default.depth, help="length of the points")
    add("--seed", type=int, metavar="N", default=default.seed, help="of the points")
    add("--device", choices=DEVICES, default=default.device, help="auto: a GPU if there is one")
    add("--slow", action="store_true", help="also what takes minutes: large without pruning")
    add("--threads", type=int, metavar="N", help="CPU threads; PyTorch's own choice if not given")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs"),
        help="gets a row in pruning.jsonl for each cloud and provider")  # fmt: skip
    parser.set_defaults(command=_pruning)


def _pruning(parsed: argparse.Namespace) -> None:
    from bench.pruning import run

    chosen = {"sizes": tuple(parsed.sizes), "providers": tuple(parsed.providers)}
    run(PruningSettings(**_values(parsed) | chosen), parsed.out)


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
