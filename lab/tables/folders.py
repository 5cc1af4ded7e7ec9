"""Folders of this repository that hold result files and pages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPARISON = ROOT / "lab" / "comparison"
STUDIES = ROOT / "lab" / "studies" / "results"
SPEED = ROOT / "benchmarks" / "results"
