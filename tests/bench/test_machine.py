import pytest

from bench.machine import Code, decode


@pytest.mark.parametrize(
    ("line", "unit", "moved", "operations"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R2, R4 ;", "tensor", 0, 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R2, R4 ;", "tensor", 0, 2 * 16 * 8 * 8),
        ("HGMMA.64x256x16.F32 R24, gdesc[UR4], R24 ;", "tensor", 32 * 320 // 4, 128 * 256 * 4),
        ("HGMMA.64x128x16.F32 R88, R152, gdesc[UR24].tnspB, R88 ;", "tensor", 1024, 128 * 128 * 4),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR18], idesc[UR19] ;", "tensor", 0, 0),
        ("@P0 LDG.E.128 R4, desc[UR4][R2.64] ;", "L2", 512, 0),
        ("LDGSTS.E.BYPASS.128 [R37+0x800], desc[UR32][R26.64], !P3 ;", "L2", 512, 0),
        ("LDG.E.U8 R4, desc[UR4][R2.64] ;", "L2", 32, 0),
        ("LDSM.16.M88.4 R8, [R3] ;", "shared", 512, 0),
        ("LDL.64 R8, [R1] ;", "L2", 256, 0),
        ("MUFU.EX2 R8, R9 ;", "SFU", 0, 0),
        ("FFMA R8, R9, R10, R11 ;", "FP32", 0, 0),
        ("IMAD.MOV.U32 R8, RZ, RZ, R9 ;", "FP32", 0, 0),
        ("FMNMX R8, R9, R10, !PT ;", "integer", 0, 0),
        ("UIADD3 UR4, UR5, 0x1, URZ ;", "", 0, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0 ;", "", 0, 0),
    ],
)  # fmt: skip
def test_an_instruction_says_what_it_needs(
    line: str, unit: str, moved: int, operations: int
) -> None:
    found = decode(f"        /*0010*/                   {line}")
    assert found is not None
    assert (found.unit, found.bytes, found.operations) == (unit, moved, operations)


@pytest.mark.parametrize(
    ("line", "reads", "writes"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", (2,), (4, 5, 6, 7)),
        ("@!P1 STS.64 [R20+0x10], R6", (20, 6), ()),
        ("ISETP.GE.AND P0, PT, R8, R9, PT", (8, 9), ()),
        ("SHFL.BFLY PT, R7, R6, 0x2, 0x1f", (6,), (7,)),
        ("IMAD.WIDE R6, R2, 0x4, R8", (2, 8), (6, 7)),
        ("HMMA.16816.F32 R4, R8, R2, R4", (8, 9, 10, 11, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7)),
        ("HGMMA.64x128x16.F32 R24, gdesc[UR28], R24, gsb0", (24,), ()),
    ],
)
def test_an_instruction_says_what_it_reads_and_writes(
    line: str, reads: tuple[int, ...], writes: tuple[int, ...]
) -> None:
    found = decode(f"/*0010*/ {line} ;")
    assert found is not None
    assert (found.reads, found.writes) == (reads, writes)
    assert decode(".L_x_1:") is None


def listing(text: str) -> Code:
    lines = [line.strip() for line in text.strip().splitlines()]
    return Code([x if x.endswith(":") else f"/*0000*/ {x} ;" for x in lines])


def test_loops_are_a_tree_without_code_out_of_line() -> None:
    code = listing("""
        FADD R1, R1, R1
        .L_x_1:
        IADD3 R1, R1, R2
        .L_x_2:
        HMMA.16816.F32 R4, R8, R2, R4
        @P0 BRA `(.L_x_2)
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R2
        @!P0 BRA `(.L_x_4)
        .L_x_3:
        MUFU.EX2 R3, R3
        BRA.U UP1, `(.L_x_1)
        EXIT
        .L_x_4:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R2
        @!P0 BRA `(.L_x_4)
        BRA `(.L_x_3)
        .L_x_5:
        BRA `(.L_x_5)
    """)
    (outer,) = code.root.inner
    inner, waiting = outer.inner
    assert [i.name for i in code.own(inner)] == ["HMMA", "BRA"]
    assert [i.name for i in code.own(waiting)] == ["SYNCS", "BRA"]
    assert [i.name for i in code.own(outer)] == ["IADD3", "SYNCS", "BRA", "MUFU", "BRA", "BRA"]
    assert code.count(outer)["HMMA"] == 1
    assert "FADD" in [i.name for i in code.own(code.root)]
    assert [loop is code.root for loop in code.root.walk()] == [True, False, False, False]


def test_a_jump_forward_is_no_loop() -> None:
    code = listing("""
        @P0 BRA `(.L_x_1)
        FADD R1, R1, R1
        .L_x_1:
        EXIT
    """)
    assert code.root.inner == []
    assert code.root.own == (0, 1, 2, 3)
