from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from bench.__main__ import build_parser
from bench.retrieval.cells import gather
from bench.retrieval.parts import Part, Work, parts_of
from bench.retrieval.runs import read_curves, read_results
from tests.bench.retrieval.synthetic import arrays, dots, row, rows, write

Made = dict[str, Part]


def parts(runs: Path, *, images: bool = True) -> Made:
    cells = gather(read_results(runs))
    folder = runs.parent / "pictures"
    folder.mkdir(exist_ok=True)
    data = dots() if images else None
    with Progress(disable=True) as progress:
        work = Work(runs, folder, "dots", cells, read_curves(runs), data, progress)
        return {part.title: part for part in parts_of(work)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return parts(write(tmp_path_factory.mktemp("parts") / "runs", rows()))


def test_parts_say_which_rows_they_show(made: Made) -> None:
    sources = {title: part.source for title, part in made.items()}
    assert sources == {
        "All losses": "9 runs of 4 epochs, in results.jsonl.",
        "Wrong labels": "18 runs of 4 epochs, in results.jsonl.",
        "How R@1 rises": "18 runs of 4 epochs, in log.jsonl.",
        "Ablations of PFML": "14 runs of 4 epochs, in results.jsonl.",
        "Study of the recipe": "16 runs of 4 epochs, in results.jsonl.",
        "Proxies and their samples": "12 runs of 4 epochs, in embeddings.npz.",
        "Class fields": "embeddings.npz of run dots-cnn-pfml-noise0-seed0.",
        "A map of test classes": "embeddings.npz of run dots-cnn-pfml-noise0-seed0.",
        "Retrieval sheet": "embeddings.npz of run dots-cnn-pfml-noise0-seed0.",
    }
    assert not any(part.missing for part in made.values())
    assert (
        "90.0 % have a nearest image that is right" in made["Retrieval sheet"].pictures[0].caption
    )


@pytest.mark.parametrize(
    ("dataset", "network", "command"),
    [
        ("glyphs", "cnn", "--preset glyphs --losses pfml --epochs 4"),
        ("cub", "resnet50", "--preset cub-resnet50 --data FOLDER --losses pfml --epochs 4"),
        ("cub", "cnn", None),
        ("dots", "cnn", None),
    ],
)
def test_commands_are_of_presets(dataset: str, network: str, command: str | None) -> None:
    cells = gather([row(dataset=dataset, network=network)])
    with Progress(disable=True) as progress:
        for runs, end in ((Path("runs/retrieval"), ""), (Path("x"), " --out x")):
            made = Work(runs, Path(), "x", cells, {}, None, progress).command("--losses pfml")
            assert made == (f"python -m bench retrieval {command}{end}" if command else "")
            if made:
                build_parser().parse_args(made.split()[3:])


def test_every_command_is_one_that_the_benchmark_takes(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs", [row("triplet", dataset="glyphs", split="validation")])
    commands = {part.command for part in parts(runs, images=False).values()}
    assert len(commands) > 4
    for command in commands - {""}:
        build_parser().parse_args(command.split()[3:])


def test_runs_without_arrays_are_told_and_not_measured(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs", [row(seed=seed) for seed in range(3)])
    (runs / row(seed=0)["run"] / "embeddings.npz").unlink()
    made = parts(runs)
    (table,) = made["Proxies and their samples"].tables
    assert table.lines[0].texts[:4] == ("PFML", "3", "0 %", "2 of 3, no 0")
    assert made["Class fields"].source.endswith("seed1.")


def test_without_images_classes_have_numbers(tmp_path: Path) -> None:
    made = parts(write(tmp_path / "runs", [row()]), images=False)
    assert made["A map of test classes"].pictures
    assert made["Class fields"].pictures
    assert "The images were not given" in made["Retrieval sheet"].missing


def test_the_data_set_has_the_classes_that_were_trained(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs", [row()])
    contents = arrays("pfml", 0)
    contents["proxies"] = np.concatenate([contents["proxies"], contents["proxies"][:1]])
    contents["train"] = np.concatenate([contents["train"], contents["train"][:1]])
    contents["train_labels"] = np.append(contents["train_labels"], 6)
    np.savez(runs / row()["run"] / "embeddings.npz", **contents)
    with pytest.raises(ValueError, match="of 7 classes, but the data set given trains on 6"):
        parts(runs)
