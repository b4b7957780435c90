"""The table of tile shapes."""

import pytest

from pfml_triton.kernels.config import PACK_ROWS, tiles_for


@pytest.mark.parametrize("hip", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 15, 16, 17, 64, 65, 128, 129, 384, 512, 513, 640, 2048])
def test_tiles_fit_together(depth: int, hip: bool) -> None:
    tiles = tiles_for(depth, hip=hip)
    assert tiles.block_n % tiles.block_m == 0
    assert tiles.block_n % PACK_ROWS == 0
    assert tiles.block_d % tiles.block_k == 0
    padded = -(-depth // tiles.depth_multiple) * tiles.depth_multiple
    assert padded < 2 * max(depth, 16)
    assert tiles.slices <= 4


def test_384_is_not_padded_to_512() -> None:
    assert tiles_for(384, hip=False).depth_multiple == 384
