"""Shared by all tests: one thread (the suite runs in parallel processes), the helper modules of this folder, no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir", type=Path, default=Path(__file__).parent / "golden", help="folder of recorded cases for test_golden.py"
    )
