import json
from pathlib import Path

import torch

from bench.results import append_row, provenance


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
    assert {"time", "commit", "python", "triton"} <= row.keys()
    json.dumps(row)
