"""These tests compare with the same oracles as those of the CPU kernels."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "third_party"))
