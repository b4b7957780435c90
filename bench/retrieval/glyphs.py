"""Characters drawn from the fonts inside matplotlib: a retrieval data set without a download.

A class is a character, a sample is a font. Characters that look the same (Latin A, Greek Alpha,
Cyrillic A) are one class, found by comparing their drawings, so that no query has its right answers
filed under another label.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from bench.retrieval.images import ArrayImages, DataSet, split_by_class

IMAGE_SIZE = 32
EM_SIZE = 22  # pixels; leaves a margin for accents, descenders and the random shift
MIN_FONTS = 15
LOOKALIKE_COSINE = 0.99  # of the pixels; accents differ by more, the same outline by less

# A font with fewer characters than this is a symbol font or an old 128-character one. There a code
# point often holds another glyph than Unicode says (cmsy10 has a right arrow at "!"), so a drawing
# counts only if the glyph's own name confirms it.
FULL_COVERAGE = 1000
# The last-resort font maps every code point to a picture of its Unicode block.
LAST_RESORT_COVERAGE = 0x100000


def glyphs() -> DataSet:
    """Half of the characters to train on, the others to retrieve, each moved once for that."""
    return DataSet("glyphs", *split_by_class(replace(load_glyphs(), moved=0)))


def load_glyphs(min_fonts: int = MIN_FONTS, size: int = IMAGE_SIZE) -> ArrayImages:
    """Draw every character that ``min_fonts`` of matplotlib's fonts have, one image a font.

    Args:
        min_fonts: images that a class needs at least, 2 or more.
        size: height and width of the images in pixels, 16 or more.

    Returns:
        The images, ordered by class and then by font. The same call gives the same arrays.

    Raises:
        ValueError: an argument is out of range, or no character exists in ``min_fonts`` fonts.
    """
    if min_fonts < 2:
        raise ValueError(f"min_fonts must be at least 2, got {min_fonts}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    fonts = {path: usable_characters(path) for path in font_paths()}
    counts: dict[str, int] = {}
    for characters in fonts.values():
        for character in characters:
            counts[character] = counts.get(character, 0) + 1
    common = sorted(character for character, count in counts.items() if count >= min_fonts)
    if not common:
        raise ValueError(f"no character exists in min_fonts = {min_fonts} of {len(fonts)} fonts")

    drawings = np.zeros((len(fonts), len(common), size, size), dtype=np.uint8)
    for row, (path, characters) in enumerate(fonts.items()):
        for column, character in enumerate(common):
            if character in characters:
                drawings[row, column] = draw_character(path, character, size)

    images, labels = [], []
    names: list[str] = []
    for members in merge_lookalikes(drawings):
        # A font with several of the lookalikes drew one picture several times; the first is kept.
        per_font = drawings[:, members]
        inked = np.any(per_font, axis=(2, 3))
        rows = np.flatnonzero(inked.any(axis=1))
        if len(rows) < min_fonts:  # blank characters
            continue
        images.append(per_font[rows, inked[rows].argmax(axis=1)])
        labels.append(np.full(len(rows), len(names), dtype=np.int64))
        names.append("".join(common[i] for i in members))
    return ArrayImages(np.concatenate(labels), names, np.concatenate(images))


def font_paths() -> list[Path]:
    """The TrueType fonts inside matplotlib, by name, without the last-resort font."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(folder.glob("*.ttf"))
    return [p for p in paths if len(FT2Font(str(p)).get_charmap()) < LAST_RESORT_COVERAGE]


def usable_characters(path: Path) -> set[str]:
    """The visible characters for which a font holds the glyph that Unicode means."""
    font = FT2Font(str(path))
    charmap = {chr(code): glyph for code, glyph in font.get_charmap().items()}
    visible = {c: g for c, g in charmap.items() if unicodedata.category(c)[0] in "LNPS"}
    if len(charmap) >= FULL_COVERAGE:
        return set(visible)
    return {c for c, glyph in visible.items() if _named_after(c, font.get_glyph_name(glyph))}


def _named_after(character: str, glyph_name: str) -> bool:
    """Whether a PostScript glyph name is the one of an ASCII letter ("A") or digit ("zero")."""
    if not (character.isascii() and character.isalnum()):
        return False
    if character.isdigit():
        return glyph_name == unicodedata.name(character).removeprefix("DIGIT ").lower()
    return glyph_name == character


@lru_cache(maxsize=256)
def _font(path: Path, em: float) -> ImageFont.FreeTypeFont:
    # Basic layout: the same drawing whether or not Pillow found the raqm library.
    return ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)


def draw_character(path: Path, character: str, size: int) -> NDArray[np.uint8]:
    """Draw one character in the middle of a square image, shrunk only if it would not fit.

    Args:
        path: a TrueType file that has the character.
        character: one character.
        size: height and width in pixels.

    Returns:
        [size, size] uint8, ink 255; all zero if the glyph is blank.
    """
    em = EM_SIZE * size / IMAGE_SIZE
    room = size - 4
    left, top, right, bottom = _font(path, em).getbbox(character, anchor="ls")
    extent = max(right - left, bottom - top)
    if extent > room:
        em *= room / extent
        left, top, right, bottom = _font(path, em).getbbox(character, anchor="ls")
    picture = Image.new("L", (size, size), 0)
    corner = ((size - (left + right)) // 2, (size - (top + bottom)) // 2)
    ImageDraw.Draw(picture).text(corner, character, fill=255, font=_font(path, em), anchor="ls")
    return np.asarray(picture, dtype=np.uint8)


def merge_lookalikes(drawings: NDArray[np.uint8]) -> list[list[int]]:
    """Group characters whose drawings coincide in most of the fonts that have both.

    Args:
        drawings: [fonts, characters, H, W] uint8, all zero where a font lacks the character.

    Returns:
        The groups, each ascending, ordered by their first character.
    """
    characters = drawings.shape[1]
    alike = np.zeros((characters, characters), dtype=np.int32)
    both = np.zeros_like(alike)
    for row in drawings:
        flat = row.reshape(characters, -1).astype(np.float32)
        norm = np.linalg.norm(flat, axis=1, keepdims=True)
        present = norm[:, 0] > 0
        unit = flat / np.maximum(norm, 1)
        alike += unit @ unit.T >= LOOKALIKE_COSINE
        both += np.outer(present, present)
    same = (2 * alike > both) & (both > 0)

    parent = list(range(characters))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in np.argwhere(np.triu(same, 1)):
        first, second = sorted((root(int(a)), root(int(b))))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for i in range(characters):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
