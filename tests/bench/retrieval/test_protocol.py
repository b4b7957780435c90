import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.recipes import LOSSES
from bench.retrieval import protocol
from bench.retrieval.images import DataSet, arrays
from bench.retrieval.metrics import Diverged, retrieval
from bench.retrieval.protocol import compare
from bench.retrieval.training import Training
from bench.settings import RetrievalSettings
from tests.bench.retrieval import synthetic

QUICK: dict[str, Any] = {
    "changes": {"epochs": 2, "batch_size": 8, "embedding_size": 8, "evaluate_every": 1},
    "console": Console(quiet=True),
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data() -> DataSet:
    """Stripes: a class is a direction and a width, in 16 x 16 pixels with noise."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    angles, widths = np.repeat(np.linspace(0, np.pi, 6, endpoint=False), 2), np.tile([3, 6], 6)

    def draw(c: int) -> np.ndarray:
        phase = generator.uniform(0, 2 * np.pi)
        position = (x * np.cos(angles[c]) + y * np.sin(angles[c])) * 2 * np.pi / widths[c]
        wave = 127 + 100 * np.sin(position + phase) + generator.normal(0, 20, (16, 16))
        return wave.clip(0, 255).astype(np.uint8)

    labels = np.repeat(np.arange(12), 6)
    images = np.stack([draw(c) for c in labels])
    return arrays(images[:36], labels[:36], images[36:], labels[36:], "stripes")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_loss_is_trained_and_evaluated_alike(data: DataSet, tmp_path: Path) -> None:
    found = compare(data, LOSSES, tmp_path, **QUICK)
    assert [row["loss"] for row in found] == list(LOSSES)
    saved = rows(tmp_path / "results.jsonl")
    assert [row["run"] for row in saved] == [f"stripes-cnn-{loss}-seed0" for loss in LOSSES]
    for row in saved:
        assert (row["train_images"], row["test_images"], row["test_classes"]) == (36, 36, 6)
        assert 0 < row["final_map_at_r"] <= row["final_r1"] + 1e-9 <= row["final_r8"] + 1e-9
        assert row["best_r1"] >= row["final_r1"]
        with np.load(tmp_path / row["run"] / "embeddings.npz") as stored:
            test, labels = torch.from_numpy(stored["test"]), torch.from_numpy(stored["test_labels"])
            assert retrieval(test, labels, (1,)).recall[1] == row["final_r1"]
            assert stored["train"].shape == (36, 8)
            assert len(stored["proxies"]) == 6
    assert len({row["untrained_r1"] for row in saved}) == 1  # the same network to begin with


def test_the_log_tells_every_epoch_and_evaluation(data: DataSet, tmp_path: Path) -> None:
    (row,) = compare(data, ["triplet"], tmp_path, **QUICK)
    log = rows(tmp_path / "log.jsonl")
    events = [(entry["event"], entry["epoch"]) for entry in log]
    assert events == [
        ("start", 0), ("evaluation", 0), ("epoch", 1), ("evaluation", 1), ("epoch", 2),
        ("evaluation", 2),
    ]  # fmt: skip
    assert {entry["run"] for entry in log} == {row["run"]}
    assert log[-1]["r1"] == row["final_r1"]
    best = max(log[3]["r1"], log[5]["r1"])
    assert (row["best_r1"], row["untrained_r1"]) == (best, log[1]["r1"])


def test_runs_that_are_done_are_not_run_again(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(data, ["pfml"], tmp_path, seeds=[0, 1], **QUICK)
    steps: list[int] = []
    original = Training.run_epoch
    monkeypatch.setattr(Training, "run_epoch", lambda *a: [steps.append(1), original(*a)][1])
    again = compare(data, ["pfml"], tmp_path, seeds=[0, 1, 2], **QUICK)
    assert [row["final_r1"] for row in again[:2]] == [row["final_r1"] for row in first]
    assert protocol.tables_of(again)[0].lines[0].texts[1] == "3"  # old and new make one cell
    assert (len(steps), len(rows(tmp_path / "results.jsonl"))) == (2, 3)
    compare(data, ["pfml"], tmp_path, restart=True, **QUICK)
    assert (len(steps), len(rows(tmp_path / "results.jsonl"))) == (4, 4)


def test_ctrl_c_saves_and_the_next_call_goes_on_to_the_bit(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = compare(data, ["pfml"], tmp_path / "whole", label_noise=[0.2], **QUICK)
    original = Training._take_step

    def interrupted(self: Training, *batch: torch.Tensor) -> None:
        if self.steps_done == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *batch)

    monkeypatch.setattr(Training, "_take_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        compare(data, ["pfml"], tmp_path / "parts", label_noise=[0.2], **QUICK)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert rows(tmp_path / "parts/log.jsonl")[-1]["event"] == "interrupted"
    assert rows(tmp_path / "parts/log.jsonl")[-1]["step"] == 2  # step 5 was finished
    (resumed,) = compare(data, ["pfml"], tmp_path / "parts", label_noise=[0.2], **QUICK)
    assert resumed["final_map_at_r"] == whole["final_map_at_r"]
    name = whole["run"]
    for part in ("network", "loss"):
        states = [
            torch.load(tmp_path / where / name / "checkpoint.pt", weights_only=True)["state"][part]
            for where in ("whole", "parts")
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_variations_are_runs_of_their_own(data: DataSet, tmp_path: Path) -> None:
    found = compare(
        data, ["pfml"], tmp_path,
        variations={"alpha": [1.0, 2.0], "lr": [0.01]}, label_noise=[0.0, 0.25], **QUICK,
    )  # fmt: skip
    assert [(row["variant"], row["label_noise"]) for row in found] == [
        ("alpha=1.0,lr=0.01", 0.0), ("alpha=2.0,lr=0.01", 0.0),
        ("alpha=1.0,lr=0.01", 0.25), ("alpha=2.0,lr=0.01", 0.25),
    ]  # fmt: skip
    assert [row["options"]["alpha"] for row in found] == [1.0, 2.0, 1.0, 2.0]
    assert {row["lr"] for row in found} == {0.01}


def test_validation_leaves_the_test_classes_alone(data: DataSet, tmp_path: Path) -> None:
    changes = QUICK["changes"] | {"split": "validation", "recall_at": (1, 4)}
    (row,) = compare(data, ["contrastive"], tmp_path, **QUICK | {"changes": changes})
    assert (row["train_classes"], row["test_classes"]) == (4, 2)
    assert (row["train_images"], row["test_images"]) == (24, 12)
    assert row["run"] == "stripes-cnn-contrastive-validation-seed0"


def test_label_noise_is_in_training_alone(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    original = Training.run_epoch
    monkeypatch.setattr(
        Training, "run_epoch",
        lambda self, *a: [seen.append(self.images.labels), original(self, *a)][1],
    )  # fmt: skip
    (row,) = compare(data, ["triplet"], tmp_path, label_noise=[0.5], **QUICK)
    assert [(labels != data.train.labels).sum() for labels in seen] == [18, 18]
    with np.load(tmp_path / row["run"] / "embeddings.npz") as stored:
        assert np.array_equal(stored["train_labels"], data.train.labels)
        assert np.array_equal(stored["test_labels"], data.test.labels)


def test_proxies_at_samples_see_the_labels_of_training(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(
        protocol, "place_proxies", lambda loss, network, images, seed: seen.append(images.labels)
    )
    changes = QUICK["changes"] | {"proxy_init": "samples"}
    compare(data, ["pfml"], tmp_path, label_noise=[0.5], **QUICK | {"changes": changes})
    assert len(seen) == 1
    assert (seen[0] != data.train.labels).sum() == 18


def test_other_data_of_the_same_name_are_not_mistaken(data: DataSet, tmp_path: Path) -> None:
    compare(data, ["triplet"], tmp_path, **QUICK)
    with pytest.raises(ValueError, match="of another configuration: training data"):
        compare(data._replace(train=data.test), ["triplet"], tmp_path, **QUICK)


def test_a_row_of_before_a_restart_does_not_count(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = compare(data, ["pfml"], tmp_path, **QUICK)
    changes = QUICK["changes"] | {"epochs": 3}
    three = QUICK | {"changes": changes}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(protocol, "save_arrays", full)
    with pytest.raises(OSError, match="No space"):
        compare(data, ["pfml"], tmp_path, restart=True, **three)
    monkeypatch.undo()
    (second,) = compare(data, ["pfml"], tmp_path, **three)
    assert (first["final_epoch"], second["final_epoch"]) == (2, 3)


def test_a_run_that_diverges_does_not_stop_the_others(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="1 of 2 runs diverged: stripes-cnn-triplet-lr=1e"):
        compare(data, ["triplet"], tmp_path, variations={"lr": [1e30, 1e-3]}, **QUICK)
    assert [row["lr"] for row in rows(tmp_path / "results.jsonl")] == [1e-3]


def test_numbers_of_numpy_are_numbers(data: DataSet, tmp_path: Path) -> None:
    for _ in range(2):  # the second reads the checkpoint of the first
        (row,) = compare(
            data, ["triplet"], str(tmp_path), seeds=np.arange(1), label_noise=np.array([0.25]),
            variations={"margin": np.array([0.1])}, **QUICK,
        )  # fmt: skip
    assert row["run"] == "stripes-cnn-triplet-noise0.25-margin=0.1-seed0"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"changes": {"alpha": 2.0}}, "changes must be of fields of Recipe, got alpha"),
        ({"losses": []}, "must not be empty"),
        ({"losses": ["softmax"]}, "one of pfml.*got 'softmax'"),
        ({"variations": {"margin": [1.0]}}, "options of pfml.*margin"),
        ({"device": "tpu"}, "one of auto, cpu, cuda, got 'tpu'"),
        ({"changes": {"batch_size": 64, "epochs": 1}}, "batch_size must be at most 24"),
        ({"changes": {"recall_at": (1, 36), "batch_size": 8}}, r"every K must be in \[1, 35\]"),
        ({"label_noise": [2.0]}, "label_noise must be in"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    data: DataSet, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = QUICK | {"losses": ["pfml"]} | changed
    with pytest.raises(ValueError, match=message):
        compare(data, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used_are_refused(data: DataSet, tmp_path: Path) -> None:
    images, labels = data.train.images, data.train.labels
    one_class = arrays(images, np.zeros_like(labels), images, labels)
    with pytest.raises(ValueError, match="training needs at least 2 classes, got 1"):
        compare(one_class, ["pfml"], tmp_path, **QUICK)
    alone = arrays(images, labels, images[:13], labels[:13])
    with pytest.raises(ValueError, match="every class needs at least 2 images.*class 2 has 1"):
        compare(alone, ["pfml"], tmp_path, **QUICK)


def test_results_of_other_settings_are_not_overwritten(data: DataSet, tmp_path: Path) -> None:
    compare(data, ["npair"], tmp_path, **QUICK)
    changes = QUICK["changes"] | {"epochs": 3}
    with pytest.raises(ValueError, match="epochs is 2 there and 3 here"):
        compare(data, ["npair"], tmp_path, **QUICK | {"changes": changes})


def test_tables_are_of_what_was_run() -> None:
    rows = [synthetic.row(loss, noise, seed) for loss in ("pfml", "triplet") for noise in (0.0, 0.2)
            for seed in (0, 1)]  # fmt: skip
    rows += [synthetic.row(variant="alpha=1.0")]
    titles = [table.title for table in protocol.tables_of(rows)]
    assert len(titles) == 4
    assert len(protocol.tables_of(rows[:2])) == 1
    lines = protocol.tables_of(rows)[0].lines
    assert [line.texts[:2] for line in lines] == [("PFML", "2"), ("Triplet", "2")]


def test_run_takes_the_settings_of_the_command_line(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(protocol, "load", lambda name, folder, **_: data)
    row = synthetic.row("triplet")

    def note(*arguments: Any, **options: Any) -> list[Any]:
        seen.update(options, data=arguments[0], losses=arguments[1], out=arguments[2])
        return [row]

    monkeypatch.setattr(protocol, "compare", note)
    settings = RetrievalSettings(
        losses=("triplet",), seeds=(3,), label_noise=(0.2,), variations={"lr": (0.1,)},
        split="validation", epochs=4, restart=True, device="cpu",
    )  # fmt: skip
    protocol.run(settings, tmp_path, Console(quiet=True))
    assert seen["changes"] == {"split": "validation", "weights": None, "epochs": 4}
    assert (seen["losses"], seen["seeds"], seen["label_noise"]) == (("triplet",), (3,), (0.2,))
    assert (seen["variations"], seen["restart"], seen["device"]) == ({"lr": (0.1,)}, True, "cpu")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        protocol.run(RetrievalSettings(threads=0), tmp_path, Console(quiet=True))
