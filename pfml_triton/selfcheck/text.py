"""The report in words, for someone who has never seen the project."""

from __future__ import annotations

from itertools import groupby
from textwrap import fill
from typing import Any

from ..serving import NEEDS
from .result import HOW, Check, Report

_WIDTH = 100
_INTRODUCTION = (
    "pfml_triton is a loss for training embeddings: the energy of a potential field in which "
    "points of one class attract each other and points of different classes repel. It has two "
    "implementations, called backends: Triton kernels, which are compiled for the GPU, and plain "
    "PyTorch (\"torch backend\"). This report says which of them serves on this machine, and "
    "whether it computes the right energy and the right gradient. An error is that of the worst "
    "entry, as a share of the largest entry of what it is compared with. N is the number of "
    "points, D the length of one."
)  # fmt: skip
_SECTIONS = {
    "torch": "torch backend, on {}",
    "compiler": "Triton's compiler: can it compile the kernels? (Nothing is run.)",
    "interpreter": "Triton kernels, in Triton's interpreter on the CPU (their code runs in NumPy)",
    "gpu": "Triton kernels, running on {}",
}


def text(report: Report) -> str:
    """The whole report."""
    blocks = [_paragraph(f"Self-check of pfml_triton. {_INTRODUCTION}"), _machine(report)]
    for (device, how), checks in _grouped(report.checks, "device", "how"):
        lines = [_SECTIONS[how].format(_named(report, device))]
        for (name, *_), alike in _grouped(checks, "name", "what", "against"):
            lines += _lines(name, alike)
        blocks.append("\n".join(lines))
    blocks += [_timings(report), _warnings(report), _gaps(report)]
    steps = [fill(step, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
             for step in next_steps(report)]  # fmt: skip
    blocks.append("\n".join(["What to do next", *steps]))
    blocks.append(f"{verdict(report)} ({report.seconds:.0f} s)")
    return "\n\n".join(block for block in blocks if block)


def verdict(report: Report) -> str:
    """One line: what the checks say together."""
    count, failed = len(report.checks), report.failed
    if failed:
        first = failed[0]
        return (
            f"FAILED: {len(failed)} of {count} checks, the first being \"{first.name}\""
            f"{_case(first)} of the {HOW[first.how]}, {first.device}."
        )  # fmt: skip
    served = [d for d in report.devices if d["backend"] == "triton"]
    if served:
        names = ", ".join(sorted({d["name"] for d in served}))
        return (
            f"PASSED: all {count} checks. The Triton kernels compute what they should on {names}."
        )
    if any(check.how == "interpreter" for check in report.checks):
        return (
            f"PASSED, as far as a machine without a GPU can tell: all {count} checks. "
            "No kernel ran on one."
        )
    return (
        f"PASSED, for the torch backend: all {count} checks. The Triton kernels were not checked."
    )


def next_steps(report: Report) -> list[str]:
    """What someone should do who has read the report."""
    needs = {check.detail: None for check in report.failed if check.detail.startswith(NEEDS)}
    steps = [f"{need}. Then run `python -m pfml_triton` again." for need in needs]
    if report.failed and not needs:
        steps.append(
            "Do not train with a backend that failed. If only Triton kernels did, "
            'PFMLLoss(..., backend="torch") serves without them, slower.'
        )
        steps.append(
            "Report what failed to the authors of pfml_triton, with the output of "
            "`python -m pfml_triton --json`."
        )
    if report.warnings:
        steps.append("Read the warnings above: each says what serves in place of what.")
    if not any(d["backend"] == "triton" for d in report.devices):
        steps.append(
            "Run `python -m pfml_triton` again on the machine with the GPU on which you will "
            "train: only there is the compiled code checked."
        )
    if not report.failed and any(d["backend"] == "triton" for d in report.devices):
        steps.append(
            "Nothing has to be done. For more speed, `python -m bench tune`, in the repository, "
            "measures which tile shapes are fastest on this GPU."
        )
    return steps


def _grouped(checks: list[Check], *names: str) -> list[tuple[tuple[Any, ...], list[Check]]]:
    """Checks that agree in these attributes, in the order in which the first of each came."""

    def key(check: Check) -> tuple[Any, ...]:
        return tuple(getattr(check, name) for name in names)

    first = {k: i for i, k in reversed(list(enumerate(map(key, checks))))}
    ordered = sorted(checks, key=lambda check: first[key(check)])
    return [(k, list(group)) for k, group in groupby(ordered, key)]


def _lines(name: str, checks: list[Check]) -> list[str]:
    """What is said of checks of one name: in short, and each that failed."""
    failed = [check for check in checks if not check.passed]
    mark = "FAILED" if failed else "ok"
    what, against = checks[0].what, checks[0].against
    said = f"{name}: {what}" + ("" if against == "no error" else f"; against {against}")
    lines = [fill(f"  {mark:6} {said}", _WIDTH, subsequent_indent=" " * 9)]
    dtypes = _listed(check.dtype for check in checks)
    depths = _listed(check.depth for check in checks)
    cases = [
        f"{len(checks)} checks" if len(checks) > 1 else "",
        dtypes,
        f"D = {depths}" if depths else "",
    ]
    if not failed:
        measured = [c for c in checks if c.error is not None and c.allowed is not None]
        if measured:
            worst = max(measured, key=lambda c: (c.error or 0.0) / (c.allowed or 1.0))
            cases.append(f"worst error {worst.error:.1e}, allowed {worst.allowed:.1e}")
    described = ", ".join(case for case in cases if case)
    if described:
        lines.append(_paragraph(described, 9))
    for check in failed:
        lines.append(_paragraph(f"failed{_case(check)}: {check.detail}", 11))
    return lines


def _case(check: Check) -> str:
    size = [check.dtype, f"D = {check.depth}" if check.depth else None,
            f"N = {check.points}" if check.points else None]  # fmt: skip
    found = ", ".join(part for part in size if part)
    return f" ({found})" if found else ""


def _listed(values: Any) -> str:
    return " ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _machine(report: Report) -> str:
    has = report.versions
    gpu = f"CUDA {has['cuda']}" if has["cuda"] else f"HIP {has['hip']}" if has["hip"] else None
    lines = [
        "This machine",
        f"  pfml_triton {has['pfml_triton']}, Python {has['python']}, PyTorch {has['torch']}, "
        f"Triton {has['triton'] or 'not installed'}",
        f"  {has['platform']}",
        f"  PyTorch is built for {gpu or 'the CPU only'}; "
        f"GPU driver: {has['driver'] or 'none that PyTorch can see'}",
    ]
    for device in report.devices:
        size = ""
        if device["memory_bytes"] is not None:
            size = (
                f", {device['memory_bytes'] / 2**30:.0f} GiB, "
                f"{device['multiprocessors']} multiprocessors"
            )
        lines.append(f"  {device['device']}: {device['name']} ({device['capability']}){size}")
        serves = {"triton": "Triton kernels serve", "torch": "the torch backend serves"}
        reason = f"{serves[device['backend']]} there, because {_because(device['reason'])}"
        lines.append(_paragraph(reason, 4))
    return "\n".join([*lines, *_tuning(report)])


def _because(reason: str) -> str:
    return reason if reason.startswith(("Triton", "TRITON")) else reason[0].lower() + reason[1:]


def _tuning(report: Report) -> list[str]:
    found = report.tuning
    if found["file"] is None:
        return ["  Tuning file: none is looked for; the tile shapes that ship serve"]
    if not found["found"]:
        return [
            f"  Tuning file: none (it would be {found['file']}); the tile shapes that ship serve"
        ]
    lines = [f"  Tuning file: {found['file']}, {found['usable_entries']} entries that can be used"]
    return [*lines, *(_paragraph(f"not used: {fault}", 4) for fault in found["faults"])]


def _named(report: Report, device: str) -> str:
    names = {d["device"]: d["name"] for d in report.devices}
    return f"{device} ({names[device]})" if device in names else device


def _timings(report: Report) -> str:
    if not report.timings:
        return ""
    lines = ["Time of one step, forward and backward, in float32 (medians, measured here)"]
    for t in report.timings:
        ours = (
            f"{'Triton kernels' if t.backend == 'triton' else 'torch backend'} {t.loss_ms:.3g} ms"
        )
        plain = "do not fit in memory" if t.eager_ms is None else f"{t.eager_ms:.3g} ms"
        lines.append(
            f"  {t.device}: N = {t.points:,}, D = {t.depth}: {ours}; N x N matrices in plain "
            f"PyTorch {plain}"
        )
    return "\n".join(lines)


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    return "\n".join(["Warnings that were raised", *(_item(w) for w in report.warnings)])


def _gaps(report: Report) -> str:
    if not report.not_checked:
        return ""
    items = (_item(f"{gap.what}. Why: {gap.why}.") for gap in report.not_checked)
    return "\n".join(["What could not be checked here", *items])


def _item(line: str) -> str:
    return fill(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _paragraph(line: str, indent: int = 0) -> str:
    return fill(line, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
