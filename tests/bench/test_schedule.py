from dataclasses import replace

import pytest

from bench.chips import CHIPS
from bench.machine import Instruction, decode
from bench.schedule import Setting, busy, clocks

A100, H100 = CHIPS["sm_80"], CHIPS["sm_90"]
ALONE = Setting(warps=1, group=1, latency=400.0)
PRODUCT = "HMMA.16816.F32 R{0}, R40, R44, R{0}"


def code(*lines: str) -> list[Instruction]:
    found = [decode(f"/*0000*/ {line} ;") for line in lines]
    assert None not in found
    return [i for i in found if i]


def per_round(*lines: str, chip: object = A100, setting: Setting = ALONE) -> float:
    return clocks(code(*lines), chip, setting, repeats=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "chip", "expected"),
    [
        (PRODUCT.format(4), A100, 8),  # 4,096 operations, 512 a clock
        (PRODUCT.format(4), H100, 4 / 0.63),
        ("HGMMA.64x256x16.F32 R24, gdesc[UR4], R24", H100, 128),  # of the whole warp group
        ("HGMMA.64x8x16.F32 R24, gdesc[UR4], R24", H100, 18),  # its factors take longer: 72 rows
        ("QGMMA.64x256x32.F32 R24, gdesc[UR4], R24", H100, 128),
        ("HMMA.1688.F32.TF32 R4, R40, R44, R4", A100, 8),
        ("FFMA R4, R5, R6, R7", A100, 2),
        ("FFMA R4, R5, R6, R7", H100, 1),
        ("FMNMX R4, R5, R6, PT", H100, 2),
        ("MUFU.EX2 R4, R5", A100, 8),
        ("LDS.128 R4, [R5]", A100, 16),
        ("LDG.E.128 R4, [R5.64]", A100, 4 * 512 / (5120 / 108)),
    ],
)
def test_how_long_a_unit_is_busy(line: str, chip: object, expected: float) -> None:
    assert busy(code(line)[0], chip) == pytest.approx(expected)  # type: ignore[arg-type]


def test_products_that_depend_wait_and_others_follow_at_once() -> None:
    independent = [PRODUCT.format(r) for r in range(4, 36, 4)]
    assert per_round(*independent) == pytest.approx(8 * 8)
    dependent = per_round(*[PRODUCT.format(4)] * 8)
    assert dependent == pytest.approx(8 * (8 + 18))
    assert per_round(*[PRODUCT.format(4)] * 8, setting=replace(ALONE, warps=4)) == pytest.approx(
        4 * 8 * 8  # four warps hide it
    )


def test_a_load_is_waited_for_where_it_is_used() -> None:
    load, other, use = "LDG.E R4, [R2.64]", "MUFU.EX2 R8, R9", "FADD R5, R4, R4"
    at_once = per_round(load, use, other)
    later = per_round(load, other, use)
    assert at_once > 400
    assert abs(at_once - later) < 20  # MUFU runs in the shadow of the load either way
    assert per_round(other, other) == pytest.approx(16)
    both = per_round(load, use, setting=replace(ALONE, warps=8))
    assert both < 420  # for eight warps


def test_copies_ahead_hide_their_latency() -> None:
    """The same round, with its copies waited for at once, or one round later."""
    copies = ["LDGSTS.E.BYPASS.128 [R3], [R4.64]", "LDGDEPBAR"]
    work = [PRODUCT.format(4)] * 20  # 520 clocks
    near = per_round(*copies, "DEPBAR.LE SB0, 0x0", *work)
    far = per_round(*copies, "DEPBAR.LE SB0, 0x1", *work)
    assert near > 520 + 400
    assert far < 520 + 20
    ahead = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R2", *work, "UTMALDG.2D [UR8], [UR34]"]
    assert per_round(*ahead, setting=replace(ALONE, ahead=2)) < 520 + 20
    assert per_round(*ahead, setting=replace(ALONE, ahead=1)) > 480 + 400


def test_asynchronous_products_overlap_with_arithmetic_until_they_are_waited_for() -> None:
    product = "HGMMA.64x256x16.F32 R24, gdesc[UR4], R24, gsb0"
    wait, arithmetic = "WARPGROUP.DEPBAR.LE gsb0, 0x0", ["FMNMX R4, R5, R6, PT"] * 60
    together = per_round(product, *arithmetic, wait, chip=H100)
    in_turn = per_round(product, wait, *arithmetic, chip=H100)
    assert together == pytest.approx(128 + 30, abs=5)
    assert in_turn == pytest.approx(128 + 30 + 120, abs=10)
    two = replace(ALONE, warps=2)
    assert per_round(product, wait, *arithmetic, chip=H100, setting=two) < 2 * in_turn - 100


def test_a_barrier_keeps_the_warps_of_a_program_together() -> None:
    lines = ["LDG.E R4, [R2.64]", "FADD R5, R4, R4", "BAR.SYNC 0x0", *["FADD R6, R6, R6"] * 50]
    apart = per_round(*lines, setting=replace(ALONE, warps=2, group=1))
    together = per_round(*lines, setting=replace(ALONE, warps=2, group=2))
    assert together >= apart
    assert per_round("BAR.SYNC 0x0", setting=replace(ALONE, warps=2, group=2)) >= 20


def test_code_that_does_not_repeat_runs_once() -> None:
    lines = code("LDG.E R4, [R2.64]", "FADD R5, R4, R4")
    once = clocks(lines, A100, ALONE, repeats=False)
    assert 400 < once < 430
    assert clocks([], A100, ALONE, repeats=True) == 0
