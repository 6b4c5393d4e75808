"""The scripts of benchmarks/ that tests run too."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

# Here, because only from here on are they found; the tests take them from this module.
import claims  # noqa: E402
import collectives  # noqa: E402
import counts  # noqa: E402
import devices  # noqa: E402
import hlo  # noqa: E402
import monitor  # noqa: E402
import programs  # noqa: E402
import results  # noqa: E402
import ways  # noqa: E402

__all__ = [
    "FOLDER",
    "claims",
    "collectives",
    "counts",
    "devices",
    "hlo",
    "monitor",
    "programs",
    "results",
    "ways",
]
