"""What a rank of many GPUs needs, by formulas: memory, bytes on the wire, work of the filter.

Nothing here is measured. The buffers are those of pfml_triton.distributed and the Triton backend,
and bench/SCALE.md says what the figures mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.chips import CHIPS

DEPTH = 512
BATCH = 512  # of a rank
RANKS = (8, 64, 256, 1024)
CLASSES = (1_000_000, 100_000_000)  # of one proxy each
SKETCH = 64  # columns
LINK = 50e9  # bytes/s a GPU, 400 Gb/s of network
MEMORY = 80e9  # bytes of a GPU
SHARE_OF_PEAK = 0.5  # assumed, of the filter


@dataclass(frozen=True)
class Need:
    """What one rank needs for a step, in bytes, operations and seconds.

    Args:
        classes: C, of one proxy each.
        ranks: W.
    """

    classes: int
    ranks: int

    @property
    def points(self) -> int:
        """N, of the whole field."""
        return self.classes + self.ranks * BATCH

    @property
    def rows(self) -> int:
        """Points of a rank."""
        return -(-self.classes // self.ranks) + BATCH

    @property
    def state(self) -> int:
        """Proxies, their gradient and the two moments of Adam, float32, all on every rank."""
        return 4 * 4 * DEPTH * self.classes

    @property
    def sharded_state(self) -> int:
        """The same under fully_shard, which has all proxies in forward and all of their gradient in
        backward."""
        return self.state // self.ranks + 4 * DEPTH * self.classes

    @property
    def gathered(self) -> int:
        """All points on every rank: as received and scaled, float32; rounded, bfloat16; two
        factors of the sketch, bfloat16; order, label, norm, radius and length."""
        return self.points * (2 * 4 * DEPTH + 2 * DEPTH + 2 * 2 * SKETCH + 2 * 8 + 3 * 4)

    @property
    def bitmap(self) -> int:
        """A bit for every 16 x 16 pairs of this rank's rows."""
        return self.rows * self.points // (16 * 16 * 8)

    @property
    def wire(self) -> int:
        """Received by a rank, float32: the batches of all others, and the gradient of proxies."""
        return 4 * DEPTH * (self.points - self.rows)

    @property
    def wire_of_sketches(self) -> int:
        """The same, if only sketches were sent."""
        return 2 * SKETCH * (self.points - self.rows)

    @property
    def filter_seconds(self) -> float:
        """The product of sketches, at a share of an H100's peak."""
        return 2 * SKETCH * self.rows * self.points / (SHARE_OF_PEAK * CHIPS["sm_90"].peak)

    @property
    def memory(self) -> int:
        return min(self.state, self.sharded_state) + self.gathered + self.bitmap


def as_markdown() -> str:
    """The table of bench/SCALE.md."""
    lines = [
        "| classes | GPUs | rows of a rank | proxies and Adam, GB | under fully_shard, GB | "
        "all points, GB | bitmap, GB | "
        f"fits {MEMORY / 1e9:.0f} GB | wire, GB | s at 400 Gb/s | of sketches, s | filter, s |",
        "|" + " --- |" * 12,
    ]
    for classes in CLASSES:
        for ranks in RANKS:
            need = Need(classes, ranks)
            cells = [
                f"{classes:,}", f"{ranks:,}", f"{need.rows:,}",
                *(f"{b / 1e9:,.3g}" for b in (
                    need.state, need.sharded_state, need.gathered, need.bitmap
                )),
                "yes" if need.memory < MEMORY else "no", f"{need.wire / 1e9:,.3g}",
                *(f"{s:,.2g}" for s in (
                    need.wire / LINK, need.wire_of_sketches / LINK, need.filter_seconds
                )),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
