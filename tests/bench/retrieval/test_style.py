from bench.retrieval.cells import LOSSES
from bench.retrieval.style import CLASS_COLOURS, loss_style, noise_title, plain


def lightness(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_losses_differ_in_colour_marker_and_dash() -> None:
    for kind in zip(*(loss_style(loss) for loss in LOSSES), strict=True):
        assert len(set(map(str, kind))) == len(LOSSES)
    assert loss_style("new") == loss_style("newer")


def test_colours_are_dark_enough_for_white_paper() -> None:
    for colour in (*CLASS_COLOURS, *(loss_style(loss)[0] for loss in LOSSES)):
        assert lightness(colour) < 0.7


def test_words() -> None:
    assert plain("a$b") == r"a\$b"
    assert noise_title(0.2) == "20 % of the training labels wrong"
    assert noise_title(0.0) == "right labels"
