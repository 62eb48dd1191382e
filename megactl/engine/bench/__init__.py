"""Times the operators beside torch's. `run_operators` gives the rows that `megactl bench ops` prints."""

from megactl.engine.bench.measure import Contestant, Timing, clock_for, interleave, use_threads
from megactl.engine.bench.operators import OPERATORS
from megactl.engine.bench.rows import Plan, Row, bench_environment, run_operators
from megactl.engine.bench.sizes import Size, size_named, size_names

__all__ = [
    "OPERATORS",
    "Contestant",
    "Plan",
    "Row",
    "Size",
    "Timing",
    "bench_environment",
    "clock_for",
    "interleave",
    "run_operators",
    "size_named",
    "size_names",
    "use_threads",
]
