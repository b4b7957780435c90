"""The configuration table hangs together."""

from __future__ import annotations

import pytest

from pfml_triton.kernels.config import FILTER_M, TILE_M, TILE_N, padded_depth, tiles_for


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("depth", [1, 20, 64, 100, 128, 129, 384, 512, 513, 768, 1024, 2048])
def test_tiles_fit_together(depth: int, arch: str) -> None:
    tiles = tiles_for(depth, arch=arch)
    assert FILTER_M == 128  # a mirrored answer is one byte
    assert tiles.filter_n in (128, 256)
    assert TILE_N == 4 * TILE_M  # four bits of the filter
    assert padded_depth(depth) % tiles.block_k == 0
    padded = -(-depth // tiles.depth_multiple) * tiles.depth_multiple
    assert padded - depth < max(tiles.depth_multiple, 16)
    assert tiles.depth_multiple <= 512  # whose gradients fit the registers


def test_384_is_three_slices() -> None:
    assert tiles_for(384).depth_multiple == 384
