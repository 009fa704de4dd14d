"""What the device can do at best: bytes copied from it to itself (read and written) and an 8192^3 product in bfloat16,
both of random data."""

from __future__ import annotations

from benchmarks.contest import Spread
from benchmarks.device import ceilings
from benchmarks.measure import Row, Session

ORDER = 1


def measure(session: Session) -> list[Row]:
    """Two figures."""
    found = ceilings(session)
    copy, matmul = found["copy_bytes_per_s"] / 1e12, found["matmul_flop_per_s"] / 1e12
    note = found["device"]
    return [
        Row("copy on the device", "TB/s", Spread(copy, copy, copy), note=note, figures=found),
        Row("8192^3 in bf16", "TFLOP/s", Spread(matmul, matmul, matmul), note=note),
    ]
