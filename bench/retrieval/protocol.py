"""The protocol: every loss trained and evaluated in the same way, logged, and resumed if stopped.

`compare` takes any data set, of arrays too; `run` is ``python -m bench retrieval``.
"""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.devices import resolve_device
from bench.recipes import Recipe, preset
from bench.results import append_row, provenance, read_rows
from bench.retrieval.cells import PLAIN, gather
from bench.retrieval.checkpoints import load_checkpoint, save_checkpoint, write_whole
from bench.retrieval.datasets import load
from bench.retrieval.images import DataSet, Images, Labels, split_by_class, with_label_noise
from bench.retrieval.losses import build_loss, options_of, proxy_array
from bench.retrieval.metrics import Diverged, check_gallery, retrieval
from bench.retrieval.networks import build
from bench.retrieval.pruning import active_shares
from bench.retrieval.tables import TextTable, main_table, noise_table, study_table
from bench.retrieval.training import Training, check_training, embed, place_proxies
from bench.settings import RetrievalSettings
from pfml_triton import PFMLLoss

Row = dict[str, Any]
VALIDATION_SHARE = 1 / 3  # of the training classes


def compare(
    data: DataSet,
    losses: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    label_noise: Sequence[float] = (0.0,),
    variations: Mapping[str, Sequence[Any]] | None = None,
    base: str = "glyphs",
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    restart: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Train and evaluate losses on a data set, each with every seed, label noise and variation.

    A run whose row is in `out` already is not run again; one that was stopped goes on.

    Args:
        data: what to train on and to retrieve, see `arrays`.
        losses: some of `bench.recipes.LOSSES`.
        out: folder of results, see the README.
        seeds: at least one.
        label_noise: shares of the training labels that are replaced at random.
        variations: values of fields of `Recipe`, or of options of the losses, by name; every
            combination is a run of its own.
        base: preset that gives everything else.
        changes: fields of `Recipe` for all runs in place of the preset's, "split" for example.
        device: "auto", "cpu" or "cuda".
        restart: begin anew, whatever is in `out`.
        console: where progress is shown; standard output if None.

    Returns:
        The row of each run, in the order of losses, label noise, seeds and variations.

    Raises:
        ValueError: settings or data that cannot be used, or that contradict what is in `out`.
        OSError: a file that cannot be written; what was there before is kept.
        KeyboardInterrupt: Ctrl-C, once the state of the run is saved.
    """
    console = console or Console()
    fixed = {"dataset": data.name} | dict(changes or {})
    recipes = plan(losses, seeds, label_noise, variations or {}, base, fixed)
    chosen, out = resolve_device(device), Path(out)
    for recipe in recipes:  # all of them, before the first begins
        split = data_of(data, recipe)
        check_training(labels_of(split.train, recipe), recipe)
        check_gallery(torch.from_numpy(split.test.labels), recipe.recall_at)
        build_loss(recipe.loss, len(split.train.names), recipe.embedding_size, recipe.options)
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written stops it here
    rows, diverged = [], []
    for recipe in recipes:
        split = data_of(data, recipe)
        try:
            row = train_and_evaluate(split, recipe, out, chosen, restart=restart, console=console)
            rows.append(row)
        except Diverged as error:  # others of the search may not
            console.print(f"{recipe.run_id}: {error}", highlight=False, markup=False)
            diverged.append(recipe.run_id)
    if diverged:
        raise Diverged(
            f"{len(diverged)} of {len(recipes)} runs diverged: {', '.join(diverged)}. "
            f"The others are in {out}"
        )
    return rows


def run(settings: RetrievalSettings, out: Path, console: Console | None = None) -> list[Row]:
    """`compare` with settings of the command line; prints a table of what was found.

    Raises:
        ValueError, OSError, KeyboardInterrupt: see `compare` and `bench.retrieval.datasets.load`.
    """
    console = console or Console()
    if settings.threads is not None:
        if settings.threads < 1:
            raise ValueError(f"threads must be at least 1, got {settings.threads}")
        torch.set_num_threads(settings.threads)
    base = preset(settings.preset)
    data = load(
        base.dataset, settings.data,
        strict=settings.strict, workers=settings.workers, console=console,
    )  # fmt: skip
    console.print(
        f"{data.name}: {len(data.train.labels):,} images of {len(data.train.names):,} classes to "
        f"train, {len(data.test.labels):,} of {len(data.test.names):,} others to retrieve.",
        highlight=False,
        markup=False,
    )
    changes: dict[str, Any] = {"split": settings.split, "weights": settings.weights}
    if settings.epochs is not None:
        changes["epochs"] = settings.epochs
    rows = compare(
        data, settings.losses, out,
        seeds=settings.seeds, label_noise=settings.label_noise, variations=settings.variations,
        base=settings.preset, changes=changes, device=settings.device,
        restart=settings.restart, console=console,
    )  # fmt: skip
    for table in tables_of(rows):
        console.print(table.rich())
    untrained = sum(row["untrained_r1"] for row in rows) / len(rows)
    console.print(f"Before training R@1 is {100 * untrained:.1f} %.", highlight=False)
    return rows


def tables_of(rows: Sequence[Row]) -> list[TextTable]:
    """What the rows of one data set, network and split show."""
    cells = gather(rows)
    plain = [cell for cell in cells if cell.variant == PLAIN]
    noises = sorted({cell.label_noise for cell in plain})
    tables = [main_table([c for c in plain if c.label_noise == noise]) for noise in noises]
    if any(noises):
        tables.append(noise_table(plain))
    varied = dict.fromkeys(cell.loss for cell in cells if cell.variant != PLAIN)
    return tables + [study_table([c for c in cells if c.loss == loss]) for loss in varied]


def plan(
    losses: Sequence[str],
    seeds: Sequence[int],
    label_noise: Sequence[float],
    variations: Mapping[str, Sequence[Any]],
    base: str,
    changes: Mapping[str, Any],
) -> list[Recipe]:
    """The recipes of all runs of `compare`, in their order. ValueError for a bad one."""
    if not (len(losses) and len(seeds) and len(label_noise)):
        raise ValueError(
            f"losses, seeds and label noise must not be empty, got {losses}, {seeds}, {label_noise}"
        )
    unknown = changes.keys() - {field.name for field in fields(Recipe)}
    if unknown:
        raise ValueError(
            f"changes must be of fields of Recipe, got {', '.join(sorted(unknown))}: options of "
            "losses are variations"
        )
    combinations = [
        dict(zip(variations, map(_plain, values), strict=True))
        for values in product(*variations.values())
    ]
    recipes = [
        replace(preset(base, loss), **changes, seed=_plain(seed), label_noise=_plain(noise))
        for loss in losses
        for noise in label_noise
        for seed in seeds
    ]
    return [recipe.vary(**varied) for recipe in recipes for varied in combinations]


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's, which JSON and checkpoints can hold."""
    return value.item() if isinstance(value, np.generic) else value


def data_of(data: DataSet, recipe: Recipe) -> DataSet:
    """The split of `data` that a recipe is for."""
    if recipe.split == "test":
        return data
    train, validation = split_by_class(data.train, seed=0, train_share=1 - VALIDATION_SHARE)
    return data._replace(train=train, test=validation)


def labels_of(images: Images, recipe: Recipe) -> Labels:
    """The labels [n] that a recipe trains on."""
    classes = len(images.names)
    return with_label_noise(images.labels, classes, recipe.label_noise, recipe.seed)


def train_and_evaluate(
    data: DataSet,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    *,
    restart: bool = False,
    console: Console,
) -> Row:
    """One run: train, evaluate now and then, log, save. Arguments and errors as `compare`."""
    folder = out / recipe.run_id
    checkpoint, results = folder / "checkpoint.pt", out / "results.jsonl"
    saved = None
    if checkpoint.exists() and not restart:
        saved = load_checkpoint(checkpoint, recipe, data)
        done = [row for row in _rows(results) if _is_of(row, recipe, saved)]
        if done:
            console.print(f"{recipe.run_id} is done already.", highlight=False, markup=False)
            return done[-1]

    torch.manual_seed(recipe.seed)
    classes, depth = len(data.train.names), recipe.embedding_size
    network = build(
        recipe.network, depth, data.train.channels,
        weights=recipe.weights, freeze_batch_norm=recipe.freeze_batch_norm,
    ).to(device)  # fmt: skip
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
    loss = build_loss(recipe.loss, classes, depth, recipe.options).to(device)
    seen = data.train.relabelled(labels_of(data.train, recipe))
    if recipe.proxy_init == "samples" and saved is None:
        place_proxies(loss, network, seen, recipe.seed)
    training = Training(recipe, network, loss, seen)
    if saved is not None:
        training.resume(saved)

    total = recipe.epochs * training.steps_per_epoch
    log = Log(out / "log.jsonl", recipe.run_id)
    log.add("resume" if saved else "start", training, device=str(device))
    with _interruptible() as stopped:
        with _progress(recipe, total, console) as (progress, task):

            def on_step(now: Training) -> None:
                progress.update(task, completed=now.steps_done)
                if stopped.is_set():
                    save_checkpoint(checkpoint, recipe, data, now.state())
                    log.add("interrupted", now)
                    raise KeyboardInterrupt

            if not training.history:
                _evaluate(training, data, log)
            while training.epoch < recipe.epochs:
                progress.update(task, epoch=training.epoch + 1)
                mean = training.run_epoch(on_step)
                log.add("epoch", training, loss=mean, train_seconds=round(training.seconds, 2))
                progress.update(task, loss=mean)
                if training.epoch % recipe.evaluate_every == 0 or training.epoch == recipe.epochs:
                    found = _evaluate(training, data, log)
                    progress.update(task, r1=100 * found[f"r{recipe.recall_at[0]}"])
                save_checkpoint(checkpoint, recipe, data, training.state())

        kept = save_arrays(folder / "embeddings.npz", training, data)
        row = _result(training, data)
        if isinstance(loss, PFMLLoss) and loss.proxies_per_class:
            embeddings, labels = (
                torch.from_numpy(kept[name]) for name in ("train", "train_labels")
            )
            shares = active_shares(loss, embeddings, labels, recipe.batch_size)
            row |= {f"active_share_{name}": share for name, share in shares.items()}
        append_row(results, row | provenance(device))
        if stopped.is_set():  # after the last step
            raise KeyboardInterrupt
    return row


class Log:
    """Events of one run, appended to a file of JSON lines as they happen."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run

    def add(self, event: str, training: Training, **values: Any) -> None:
        now = {"event": event, "run": self.run, "epoch": training.epoch, "step": training.step}
        append_row(self.path, now | values)


def _evaluate(training: Training, data: DataSet, log: Log) -> dict[str, float]:
    """R@K and MAP@R of the network as it is, into the history and the log."""
    started = time.perf_counter()
    embeddings = embed(training.network, data.test)
    labels = torch.from_numpy(data.test.labels)
    found = retrieval(embeddings, labels, training.recipe.recall_at).as_row()
    training.history.append({"epoch": training.epoch} | found)
    log.add("evaluation", training, **found, seconds=round(time.perf_counter() - started, 2))
    return found


def _result(training: Training, data: DataSet) -> Row:
    """The row of a run that is finished: settings, counts, final and best figures."""
    recipe = training.recipe
    untrained, *trained = training.history
    best = max(trained, key=lambda found: found[f"r{recipe.recall_at[0]}"])
    row: Row = {"bench": "retrieval", "run": recipe.run_id}
    row |= asdict(recipe) | {"options": options_of(recipe.loss, recipe.options)}
    row["recall_at"] = list(recipe.recall_at)  # as a row that was read has it
    for prefix, found in (("untrained", untrained), ("final", trained[-1]), ("best", best)):
        row |= {f"{prefix}_{name}": value for name, value in found.items()}
    for name, images in (("train", data.train), ("test", data.test)):
        row |= {f"{name}_classes": len(images.names), f"{name}_images": len(images.labels)}
    row |= {"skipped_images": data.skipped, "train_seconds": round(training.seconds, 2)}
    return row


def save_arrays(path: Path, training: Training, data: DataSet) -> dict[str, NDArray[Any]]:
    """Write, and return, what pictures are drawn from: embeddings, labels and proxies."""
    classes, depth = len(data.train.names), training.recipe.embedding_size
    found = {
        "test": embed(training.network, data.test).cpu().numpy(),
        "test_labels": data.test.labels,
        "train": embed(training.network, data.train).cpu().numpy(),
        "train_labels": data.train.labels,
        "proxies": proxy_array(training.loss, classes, depth).numpy(),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **found)
    write_whole(path, buffer.getvalue())
    return found


def _is_of(row: Row, recipe: Recipe, saved: dict[str, Any]) -> bool:
    """Whether a row is of the finished run whose state was saved, not of one before a restart."""
    if row["run"] != recipe.run_id or saved["epoch"] != recipe.epochs:
        return False
    return all(row.get(f"final_{name}") == value for name, value in saved["history"][-1].items())


def _rows(path: Path) -> list[Row]:
    return read_rows(path) if path.exists() else []


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no step is left half done; a second one interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread may ask for signals
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _progress(recipe: Recipe, total: int, console: Console) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        TextColumn("R@1 {task.fields[r1]:.1f} %, loss {task.fields[loss]:.6g}"),
        TimeRemainingColumn(),
    )
    console.print(recipe.run_id, highlight=False, markup=False)
    with Progress(*columns, console=console) as progress:
        yield progress, progress.add_task(
            "", total=total, epoch=1, epochs=recipe.epochs,
            r1=float("nan"), loss=float("nan"),
        )  # fmt: skip
