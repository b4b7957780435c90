"""Which tile shapes serve a call: those of a tuning file, or else those of the table in config.py.

`python -m bench tune` measures tile shapes and keeps the best in a JSON file, by device, dtype,
depth and number of points. PFML_TRITON_TUNING names the file; else it is pfml_triton/tuning.json
in the user's cache directory. A PFML_TRITON_TUNING that is empty stands for no file. The file is
read once a process, when the kernels first serve a GPU, and only tuning writes it.

Where those do not run on a GPU, smaller ones of config.py serve (`next_tiles`, and serving.py).

Nothing is guessed: a depth or a number of points that was not tuned has the shapes of the table,
and so has what cannot be used of a file, which is told once. With PFML_TRITON_AUTOTUNE=1, the first
call that the file has nothing for tunes itself (search.py), and saves what it finds.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .config import Tiles, padded_depth, smaller_tiles, tiles_for

FILE_VARIABLE, AUTOTUNE_VARIABLE = "PFML_TRITON_TUNING", "PFML_TRITON_AUTOTUNE"
AUTOTUNE_CHOICES = ("0", "1")
FORMAT = 1  # of the file
FEWEST = 256  # points of a first call that speak for their bucket

_POWERS = tuple(1 << i for i in range(12))
# The fields of Tiles that are tuned, and the values that a file may have.
ALLOWED: dict[str, Sequence[int | None]] = {
    "block_k": _POWERS[4:9],
    "block_d": _POWERS[4:10],
    "slices": range(1, 17),
    "num_warps": _POWERS[:5],
    "num_stages": range(1, 6),
    "max_registers": (None, *range(24, 256)),
    "chunk": _POWERS[4:],
    "filter_n": (128, 256),
    "filter_warps": _POWERS[:5],
    "filter_stages": range(1, 6),
    "filter_strip": _POWERS[:7],
    "pack_warps": _POWERS[:5],
}
_THREAD_REGISTERS = 64 << 10  # of a multiprocessor of NVIDIA
_ENTRY_FIELDS = {  # and their types
    "device": str, "dtype": str, "depth": int, "whole": bool, "points": int, "package": str,
    "triton": str, "tiles": dict, "ms": float, "shipped_ms": float, "measured": str,
}  # fmt: skip
_IDENTITY = ("device", "dtype", "depth", "whole", "points", "package", "triton")

Fields = dict[str, Any]  # those of `ALLOWED`: int, or None


class TuningWarning(UserWarning):
    """A tuning file, or a part of it, is not used."""


class TuningFileError(ValueError):
    """A tuning file that cannot be read, so that nothing may be written to it."""


class Key(NamedTuple):
    """What an entry of a tuning file is for."""

    device: str  # as torch.cuda.get_device_name has it
    dtype: str  # of the points, "float32"
    depth: int  # D, as `padded_depth` pads it
    whole: bool  # is D that, or less, so that the kernels mask?
    points: int  # N, see `points_bucket`


def points_bucket(n: int) -> int:
    """The smallest power of four that holds `n` points, from 1,024 on.

    The best shapes depend on how often the programs fill the chip: not once, a few times, many
    times. Programs of the forces grow with N, those of the filter with its square: by 16 from one
    bucket to the next, and a finer step would only be measured more often.
    """
    return 1 << max(10, (max(n, 1) - 1).bit_length() + 1 & ~1)


def tiles_here(
    x: Tensor, n: int | None = None, dtype: torch.dtype | None = None, *others: Any
) -> Tiles:
    """The tile shapes for points that are acted on: they decide, for programs own rows.

    Args:
        x: [B, D], some of the points.
        n: how many they are in all, B if None.
        dtype: as which the kernels read them, that of `x` if None.
        others: what else `launch.gather` makes a cloud of; without it nothing is tuned.

    Raises:
        ValueError: PFML_TRITON_AUTOTUNE is neither "0" nor "1".
    """
    size, dtype = points_bucket(len(x) if n is None else n), dtype or x.dtype
    place = x.get_device(), x.shape[1]
    call = place, _steps.get(place, 0), dtype, size
    return _resolved.get(call) or _resolve(call, x, others)


Place = tuple[int, int]  # a device and a depth D, for which all dtypes and N step together
_Call = tuple[Place, int, torch.dtype, int]
_resolved: dict[_Call, Tiles] = {}
_contents: dict[Path, dict[Key, Fields]] = {}  # of files that were read
_steps: dict[Place, int] = {}  # how many tile shapes did not run there
_choices: dict[Place, int] = {}  # how many there are
_stepping = threading.Lock()


def forget() -> None:
    """Forget what was read and what did not run, so that the next call reads the file again."""
    _resolved.clear()
    _contents.clear()
    _steps.clear()


def step_at(place: Place) -> int:
    """How many tile shapes did not run there."""
    return _steps.get(place, 0)


def next_tiles(place: Place, step: int) -> bool:
    """Let the next tile shapes serve after those of a step; False if they were the last.

    Of threads that ask for it after the same step, the first decides.
    """
    with _stepping:
        if step == _steps.get(place, 0):
            if step + 1 >= _choices.get(place, 0):
                return False
            _steps[place] = step + 1
        return True


def _resolve(call: _Call, x: Tensor, others: tuple[Any, ...]) -> Tiles:
    place, step, dtype, points = call
    depth = place[1]
    tiles = shipped_tiles(x, points)
    fallbacks = tiles, *smaller_tiles(tiles)
    _choices.setdefault(place, len(fallbacks))
    autotunes = os.environ.get(AUTOTUNE_VARIABLE, "0")
    if autotunes not in AUTOTUNE_CHOICES:
        raise ValueError(
            f"{AUTOTUNE_VARIABLE} must be one of {AUTOTUNE_CHOICES}, got {autotunes!r}"
        )
    device, path = device_name(x), tuning_file()
    if device is not None:
        key = key_of(device, dtype, depth, points)
        found = {} if path is None else _entries(path, device, autotunes == "1")
        if key in found:
            limit = {} if tiles.max_registers else {"max_registers": None}  # AMD has none
            tiles = replace(tiles, **found[key] | limit)
        elif autotunes == "1" and step == 0:
            if not others or len(others[0]) < FEWEST or not may_tune(x):
                return tiles  # a later call may tune
            from . import search

            tiles = search.autotune(key, path, tiles, x, *others)
    choices = tuple(dict.fromkeys((tiles, *fallbacks)))
    _choices[place] = max(_choices[place], len(choices))
    tiles = _resolved[call] = choices[min(step, len(choices) - 1)]
    return tiles


def key_of(device: str, dtype: torch.dtype, depth: int, n: int) -> Key:
    """What a tuning file has for `n` points of `depth` dimensions."""
    padded, name = padded_depth(depth), str(dtype).removeprefix("torch.")
    return Key(device, name, padded, depth == padded, points_bucket(n))


def shipped_tiles(x: Tensor, points: int) -> Tiles:
    """What the table has for `points` points like `x` [B, D], on their device."""
    arch = "sm_80"
    if torch.version.hip is not None:
        arch = "gfx"
    elif x.is_cuda:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(x.device))
    return tiles_for(x.shape[1], points_bucket(points), arch)


def device_name(x: Tensor) -> str | None:
    """The device of `x` as a tuning file names it; None for other devices than GPUs."""
    return torch.cuda.get_device_name(x.device) if x.is_cuda else None


def may_tune(x: Tensor) -> bool:
    """Can launches be timed now? Not on fake tensors, nor while a CUDA graph is captured."""
    is_fake = isinstance(x, torch._subclasses.FakeTensor)
    return x.is_cuda and not is_fake and not torch.cuda.is_current_stream_capturing()


def tuning_file() -> Path | None:
    """Where the tuning file is or would be; None for no file."""
    named = os.environ.get(FILE_VARIABLE)
    if named is not None:
        return Path(os.path.expanduser(named)) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache, "pfml_triton", "tuning.json")


def _entries(path: Path, device: str, is_made: bool) -> dict[Key, Fields]:
    """What can be used of the file; tells what cannot, once. `is_made`: by tuning, if missing."""
    if path in _contents:
        return _contents[path]
    found: dict[Key, Fields] = {}
    faults: list[str] = []
    try:
        found, faults = usable(parse(path))
    except FileNotFoundError:
        if FILE_VARIABLE in os.environ and not is_made:
            faults = [f"there is none, but {FILE_VARIABLE} names it"]
    except (TuningFileError, OSError) as error:
        faults = [str(error)]
    devices = sorted({key.device for key in found})
    if devices and device not in devices:
        faults.append(f"it is for {', '.join(devices)}, expected {device}")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        warnings.warn(
            f"tuning file {path}: {'; '.join(faults[:3])}{more}. The shipped tile shapes serve in "
            "its place. `python -m bench tune` measures those of this machine.",
            TuningWarning,
            stacklevel=2,
        )
    _contents[path] = found
    return found


def parse(path: Path) -> dict[str, Any]:
    """A tuning file as it is: {"format": 1, "entries": [...]}, its entries unchecked.

    Raises:
        OSError: it cannot be opened; FileNotFoundError if there is none.
        TuningFileError: it is no tuning file, or one of another format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, and of UTF-8
        raise TuningFileError(f"it is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise TuningFileError(f"it has format {got!r}, expected {FORMAT}")
    if not isinstance(data.get("entries"), list):
        got = type(data.get("entries")).__name__
        raise TuningFileError(f"its entries are a {got}, expected a list")
    return data


def usable(data: dict[str, Any]) -> tuple[dict[Key, Fields], list[str]]:
    """The entries of a parsed file that can be used here, and why the others cannot."""
    found, faults = {}, []
    for number, entry in enumerate(data["entries"]):
        fault = entry_fault(entry)
        if fault is None:
            found[Key(*(entry[name] for name in Key._fields))] = entry["tiles"]
        else:
            faults.append(f"entry {number}: {fault}")
    return found, faults


def entry_fault(entry: Any) -> str | None:
    """Why an entry cannot be used here, or None."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_FIELDS.keys():
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        return f"got {got}, expected {sorted(_ENTRY_FIELDS)}"
    for name, kind in _ENTRY_FIELDS.items():
        if type(entry[name]) is not kind:
            return f"{name} is {entry[name]!r}, expected a {kind.__name__}"
    for name, here in versions().items():
        if entry[name] != here:
            return f"{name} is {entry[name]}, expected {here}"
    return fields_fault(entry["tiles"], entry["depth"])


def fields_fault(tiles: dict[str, Any], depth: int) -> str | None:
    """Why these are no tile shapes for points of padded depth `depth`, or None."""
    if tiles.keys() != ALLOWED.keys():
        return f"tiles have {sorted(tiles)}, expected {sorted(ALLOWED)}"
    for name, allowed in ALLOWED.items():
        value = tiles[name]
        if type(value) not in (int, type(None)) or value not in allowed:
            known = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 12 else tuple(allowed)
            return f"{name} is {value!r}, expected one of {known}"
    together = tiles["block_d"] * tiles["slices"]
    table = tiles_for(depth).depth_multiple
    if -(-depth // together) * together > -(-depth // table) * table:
        return f"block_d x slices is {together}, which pads a depth of {depth} more than the table"
    if depth % tiles["block_k"]:
        return f"block_k is {tiles['block_k']}, expected a divisor of the depth, {depth}"
    registers = 32 * tiles["num_warps"] * (tiles["max_registers"] or 0)
    if registers > _THREAD_REGISTERS:
        return (
            f"num_warps x 32 x max_registers is {registers}, expected {_THREAD_REGISTERS} at most"
        )
    return None


def versions() -> dict[str, str]:
    """What an entry is only good for: the kernels of this package, and their compiler."""
    from pfml_triton import __version__

    return {"package": __version__, "triton": triton.__version__}


def tuned_fields(tiles: Tiles) -> Fields:
    """The part of tile shapes that a tuning file has."""
    return {name: value for name, value in asdict(tiles).items() if name in ALLOWED}


def save(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the file, in place of one for the same key and versions.

    Everything else in the file is kept, also what cannot be used here. The file is replaced as a
    whole, and processes that save at once wait for each other.

    Raises:
        TuningFileError: the file that is there cannot be read; it is left as it is.
        OSError: it cannot be written, as in a read-only directory.
    """
    assert entry_fault(entry) is None, entry_fault(entry)
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        try:
            data = parse(path)
        except FileNotFoundError:
            data = {"format": FORMAT, "entries": []}
        data["entries"] = [*(e for e in data["entries"] if not _same(e, entry)), entry]
        new = path.with_name(path.name + ".new")
        try:
            new.write_text(json.dumps(data, indent=1), encoding="utf-8")
            if path.exists():
                new.chmod(path.stat().st_mode)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    forget()


def _same(a: Any, b: dict[str, Any]) -> bool:
    return isinstance(a, dict) and all(a.get(name) == b[name] for name in _IDENTITY)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with the file, among processes that ask for it. A lock ends with its process."""
    import fcntl  # not on Windows, where there is no Triton either

    with open(path.with_name(path.name + ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
