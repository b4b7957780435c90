import pytest
from rich.console import Console

from bench.settings import SIZES
from bench.speed import custom_size
from bench.tables import MEASURED, Row, findings, growth, speed_table


def row(size: str, provider: str, mode: str = "forward+backward", **changed: object) -> Row:
    shape = SIZES.get(size) or custom_size(int(size), 512, None)
    found = {"size": size, "kind": shape.kind, "n": shape.n, "d": shape.depth, "status": MEASURED}
    found |= {"classes": shape.classes, "proxies": shape.proxies, "provider": provider}
    found |= {"mode": mode, "p50_ms": 10.0, "extra_bytes": 3 << 20, "executed_operations": None}
    found |= dict.fromkeys(("back_to_back_ms", "host_ms", "graph_ms"))
    return found | {"dense_operations": 4 * shape.n**2 * shape.depth} | changed


def printed(rows: list[Row]) -> str:
    console = Console(width=80, record=True, quiet=False)
    with console.capture() as capture:
        console.print(speed_table(rows))
    return capture.get()


def test_a_line_of_the_table_holds_both_modes() -> None:
    text = printed(
        [
            row("cub", "pfml", "forward", p50_ms=1.234),
            row("cub", "pfml", p50_ms=2.0, executed_operations=5_242_880_000 // 4),
            row("cub", "eager", p50_ms=150.0),
            row("cub", "keops", status="does not fit"),
        ]
    )
    lines = [line.split() for line in text.splitlines()]
    assert "cub: N = 1,600, D = 512, 100 classes" in text
    assert ["pfml", "1.23", "2.00", "1.00", "3", "1.31", "25.0%"] in lines
    assert ["eager", "150", "75.0", "3"] in lines
    assert "keops" not in text


def test_only_forward_has_a_table_too() -> None:
    text = printed([row("cub", "eager", "forward", p50_ms=5.0)])
    assert ["eager", "5.00", "3"] in [line.split() for line in text.splitlines()]


def test_a_gpu_has_times_in_place_of_operations() -> None:
    busy = {"back_to_back_ms": 1.5, "host_ms": 0.25, "graph_ms": 0.125}
    lines = [line.split() for line in printed([row("cub", "eager", **busy)]).splitlines()]
    assert ["forward", "+", "backward", "x", "pfml", "MiB", "b2b", "host", "graph"] in lines
    assert ["eager", "10.0", "3", "1.50", "0.25", "0.12"] in lines


def test_growth_is_that_of_the_times() -> None:
    small, large = row("1000", "pfml", p50_ms=3.0), row("100000", "pfml", p50_ms=3000.0)
    assert list(growth([small, large])) == [("1000", "100000", pytest.approx(1.5))]
    assert list(growth([small])) == []
    # More than the number of classes differs, or too little.
    assert list(growth([small, row("sop", "pfml"), row("2000", "pfml"), row("cub", "pfml")])) == []


def test_findings_are_gathered() -> None:
    rows = [
        row("cub", "eager", status="does not fit: needs 1 GiB"),
        row("cub", "eager", "forward", status="does not fit: needs 1 GiB"),
        row("cub", "keops", status="pip install -e '.[dev]'"),
        *(row(size, f"pfml-{kind}", status="needs a GPU") for size in ("cub", "collapsed")
          for kind in ("triton", "triton-dense")),
        row("collapsed", "pfml", p50_ms=11.0), row("collapsed", "pfml-dense"),
    ]  # fmt: skip
    assert list(findings(rows)) == [
        "eager (cub): does not fit: needs 1 GiB.",
        "keops (cub): pip install -e '.\\[dev]'.",
        "pfml-triton, pfml-triton-dense (everywhere): needs a GPU.",
        "Nothing to prune (collapsed): pfml takes 1.10 of the time of pfml-dense, below 1.15.",
    ]
    rows[-2]["p50_ms"] = 11.6
    assert list(findings(rows))[-1].endswith("1.16 of the time of pfml-dense, [red]not below[/red] "
                                             "1.15.")  # fmt: skip
    assert not any("Nothing" in line for line in findings([row("cub", "pfml")]))
