from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.recipes import preset
from bench.retrieval import checkpoints
from bench.retrieval.checkpoints import load_checkpoint, save_checkpoint, write_whole
from bench.retrieval.images import DataSet, arrays

IMAGES, LABELS = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.array([0, 0, 1, 1])
DATA = arrays(IMAGES, LABELS, IMAGES, LABELS)
RECIPE = preset("glyphs", "triplet").vary(margin=0.5)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"weight": torch.randn(3, 4), "epoch": 7, "history": [{"r1": 0.5}], "random": None}
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", RECIPE, DATA, state)
    loaded = load_checkpoint(tmp_path / "new" / "checkpoint.pt", RECIPE, DATA)
    assert torch.equal(loaded.pop("weight"), state.pop("weight"))
    assert loaded == state
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epochs": 7}, "epochs is 10 there and 7 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"options": {"margin": 2.0}}, "options is {'margin': 0.5} there and {'margin': 2.0} here"),
        ({"lr": 1.0, "clip": 2.0}, "lr is .* there and 1.0 here; clip is None there and 2.0 here"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", RECIPE, DATA, {})
    with pytest.raises(ValueError, match=f"of another configuration: {says}.*--restart"):
        load_checkpoint(tmp_path / "checkpoint.pt", replace(RECIPE, **changed), DATA)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (arrays(IMAGES + 1, LABELS, IMAGES, LABELS), "training data is '4 images of 2 classes"),
        (arrays(IMAGES, LABELS, IMAGES, 1 - LABELS), "test data is '4 images of 2 classes"),
        (arrays(IMAGES[:3], LABELS[:3], IMAGES, LABELS), "training data is .* there and '3 images"),
    ],
)
def test_other_data_of_the_same_name_are_refused(tmp_path: Path, data: DataSet, says: str) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", RECIPE, DATA, {})
    with pytest.raises(ValueError, match=f"of another configuration: {says}"):
        load_checkpoint(tmp_path / "checkpoint.pt", RECIPE, data)


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, RECIPE, DATA, {"weight": torch.zeros(1000)})
    if damage == "foreign":
        torch.save([1, 2], path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 2000])
    with pytest.raises(ValueError, match="checkpoint.pt is not a checkpoint"):
        load_checkpoint(path, RECIPE, DATA)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"recipe": {}, "state": _Payload()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt", RECIPE, DATA)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("when", ["write", "flush", "rename"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, RECIPE, DATA, {"epoch": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if when == "write":
        open_path = Path.open
        monkeypatch.setattr(Path, "open", lambda self, mode: open_path(Path("/dev/full"), mode))
    else:
        owner, name = (checkpoints.os, "fsync") if when == "flush" else (Path, "replace")
        monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, RECIPE, DATA, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path, RECIPE, DATA) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_interrupt_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
