import unicodedata
from pathlib import Path

import numpy as np
import pytest

from bench.retrieval import glyphs
from bench.retrieval.images import ArrayImages


@pytest.fixture(scope="module")
def data() -> ArrayImages:
    return glyphs.load_glyphs()


def class_of(data: ArrayImages, character: str) -> int:
    (label,) = [i for i, name in enumerate(data.names) if character in name]
    return label


def test_arrays_have_the_promised_form(data: ArrayImages) -> None:
    n = len(data.labels)
    assert data.images.shape == (n, glyphs.IMAGE_SIZE, glyphs.IMAGE_SIZE)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int64
    assert np.array_equal(np.unique(data.labels), np.arange(len(data.names)))


def test_there_are_hundreds_of_classes_of_15_fonts_or_more(data: ArrayImages) -> None:
    assert len(data.names) > 600
    assert np.bincount(data.labels).min() >= 15


def test_no_image_is_blank_or_touches_its_border(data: ArrayImages) -> None:
    assert (data.images.max(axis=(1, 2)) > 127).all()
    inner = data.images[:, 1:-1, 1:-1]
    assert np.array_equal(data.images.sum(axis=(1, 2)), inner.sum(axis=(1, 2)))


@pytest.mark.parametrize(
    "names",
    [
        ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"),
        ("LATIN SMALL LETTER O", "GREEK SMALL LETTER OMICRON", "CYRILLIC SMALL LETTER O"),
        ("LATIN CAPITAL LETTER H", "GREEK CAPITAL LETTER ETA", "CYRILLIC CAPITAL LETTER EN"),
        ("GREEK CAPITAL LETTER PI", "CYRILLIC CAPITAL LETTER PE"),
    ],
)
def test_lookalikes_are_one_class(data: ArrayImages, names: tuple[str, ...]) -> None:
    assert len({class_of(data, unicodedata.lookup(name)) for name in names}) == 1


@pytest.mark.parametrize(
    "pair", ["OQ", "lm", "Oo", "Ss", "CG", "EF", "il", "eé", "ÈÉ", "ÃÄ", "a\u03b1", "uv", "{["]
)
def test_different_characters_are_different_classes(data: ArrayImages, pair: str) -> None:
    assert class_of(data, pair[0]) != class_of(data, pair[1])


def test_every_character_is_in_one_class(data: ArrayImages) -> None:
    characters = "".join(data.names)
    assert len(characters) == len(set(characters))


def test_two_calls_give_the_same_arrays(data: ArrayImages) -> None:
    again = glyphs.load_glyphs()
    assert np.array_equal(again.images, data.images)
    assert np.array_equal(again.labels, data.labels)
    assert again.names == data.names


def test_fewer_fonts_give_more_classes(data: ArrayImages) -> None:
    assert len(glyphs.load_glyphs(min_fonts=20).names) < len(data.names)


def test_size_sets_the_shape() -> None:
    assert glyphs.load_glyphs(min_fonts=20, size=24).images.shape[1:] == (24, 24)


def font(name: str) -> Path:
    (path,) = [p for p in glyphs.font_paths() if p.name == name]
    return path


def test_the_last_resort_font_is_left_out() -> None:
    names = [path.name for path in glyphs.font_paths()]
    assert len(names) > 30
    assert not [name for name in names if "LastResort" in name]


def test_symbol_fonts_give_only_what_their_glyph_names_confirm() -> None:
    # In cmsy10 "a" is a turnstile and "1" is infinity; in cmmi10 "1" is an old-style figure.
    assert glyphs.usable_characters(font("cmsy10.ttf")) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert not glyphs.usable_characters(font("cmmi10.ttf")) & set("0123456789")
    assert glyphs.usable_characters(font("cmr10.ttf")) >= set("0123456789AZaz")
    assert glyphs.usable_characters(font("cmex10.ttf")) == set()
    assert glyphs.usable_characters(font("STIXSizOneSymReg.ttf")) == set()


def test_a_large_character_is_shrunk_to_fit() -> None:
    drawing = glyphs.draw_character(font("DejaVuSans.ttf"), "‰", 32)
    inked = np.argwhere(drawing)
    extent = np.ptp(inked, axis=0).max() + 1
    assert 24 <= extent <= 30


def test_lookalikes_need_most_of_the_fonts_that_have_both() -> None:
    rng = np.random.default_rng(0)
    drawings = rng.integers(1, 255, (5, 3, 16, 16)).astype(np.uint8)
    drawings[:3, 1] = drawings[:3, 0]  # alike in 3 of 5
    drawings[:2, 2] = drawings[:2, 0]  # alike in 2 of 5
    assert glyphs.merge_lookalikes(drawings) == [[0, 1], [2]]
    drawings[3:, 2] = 0  # now alike in 2 of the 2 fonts that have both
    assert glyphs.merge_lookalikes(drawings) == [[0, 1, 2]]


def test_characters_without_a_common_font_stay_apart() -> None:
    drawings = np.full((2, 2, 16, 16), 200, dtype=np.uint8)
    drawings[0, 0] = drawings[1, 1] = 0
    assert glyphs.merge_lookalikes(drawings) == [[0], [1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_fonts": 1}, "min_fonts must be at least 2, got 1"),
        ({"min_fonts": 1000}, "no character exists in min_fonts = 1000"),
        ({"size": 4}, "size must be at least 16 pixels, got 4"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs.load_glyphs(**arguments)


def test_the_split_is_of_halves_and_evaluation_moves_images(data: ArrayImages) -> None:
    name, train, test, skipped = glyphs.glyphs()
    assert (name, skipped) == ("glyphs", 0)
    assert not set(train.names) & set(test.names)
    assert (len(train.names), len(test.names)) == (334, 335)
    assert len(train.labels) + len(test.labels) == len(data.labels)
    assert test.picture(0).tobytes() not in {picture.tobytes() for picture in data.images}
