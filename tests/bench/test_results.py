import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pfml_triton
from bench import results
from bench.results import append_row, provenance, read_rows


def test_rows_are_appended_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_row(path, {"a": 1})
    append_row(path, {"a": 2, "b": "é\n"})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1}, {"a": 2, "b": "é\n"}]


def test_provenance_says_what_ran_where() -> None:
    row = provenance(torch.device("cpu"))
    assert row["device"] == "cpu"
    assert row["torch"] == torch.__version__
    assert row["threads"] == torch.get_num_threads()
    assert {
        "time",
        "commit",
        "python",
        "triton",
        "pykeops",
        "pytorch_metric_learning",
    } <= row.keys()
    assert row["pfml_triton"] == pfml_triton.__version__
    assert row["cpu"]
    assert row["driver"] is None
    json.dumps(row)


def test_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"a": 1}, {"a": None, "b": "é\n"}]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2 is not JSON"), ("[1]", "line 2 must be an object")]
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line)
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        read_rows(path)


def test_the_driver_is_what_nvidia_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results._driver() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    tool.chmod(0o755)
    assert results._driver() == "580.65.06"


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    """The kernel writes as much of a row as fits: half a line would spoil the file for good."""
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from bench.results import append_row\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "try: append_row(Path(sys.argv[1]), {'b': 'x' * 100})\n"
        "except OSError: sys.exit(7)\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=root).returncode == 7
    append_row(path, {"c": 2})
    assert read_rows(path) == [{"a": 1}, {"c": 2}]
