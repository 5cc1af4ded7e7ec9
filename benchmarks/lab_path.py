"""Puts the studies of the lab on the path: pages hold tables of both."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab" / "studies"))
