"""Puts the folder of the speed benchmarks on the path: studies share their shapes and their record of the machine."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
