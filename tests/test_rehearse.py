"""A rehearsal for accelerators (``make rehearse``): families and methods on tensors that claim to be on one (``accelerator.py``).

No operation mixes devices, the host reads from the device once in a prefill and never in a decode step. What reads more is in ``MORE``, exactly: a
method that is not there may not read more, one that is there may not read less. What the untouched model reads is not counted. In no case does the
host wait for the device to take something that it sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerator import Accelerator, OnDevice, Wait, move, on
from cases import REDUCING
from families import FAMILIES, MIXED, TEXT, Inputs, build, clips_for, generate
from torch import nn

import duet_vlm
from duet_vlm.models.find import adapter_for

SETTINGS: dict[str, dict[str, Any]] = {
    **REDUCING,
    **{name: {"keep": 0.45} for name in ("checkerboard", "contrast", "evit", "key_norm", "motion", "random_patches", "tome_tower")},
    **{name: {} for name in ("none", "pixelprune", "rlt")},
}
CONTENT = [(name, "images") for name in FAMILIES] + [(name, "clips") for name in FAMILIES if FAMILIES[name].video]
EVERY_RUN = [("llava", "images"), ("qwen2_5_vl", "clips")]  # families and contents of the default tier
EVERY_RUN_METHODS = ("none", "duet", "fastv", "contrast", "key_norm", "divprune", "rlt", "tokencarve")


@dataclass(frozen=True)
class Known:
    """The functions that read in a prefill of a batch, and how often; ``calls`` of the encoder bring pictures of free size."""

    family: str
    content: str
    method: str
    inputs: Inputs

    @property
    def calls(self) -> int:
        return sum(name in self.inputs for name in ("pixel_values", "pixel_values_videos"))

    def reads(self) -> Counter[str]:
        free = [s for s in adapter_for(built(self.family)).streams if s.sizes and s.pixels in self.inputs]
        usual = Counter({"read_layout": 1, "encoding": len(free), "spans_of": int(self.calls > 1)})
        return +(usual + Counter())


@pytest.mark.parametrize(("family", "content"), CONTENT)
@pytest.mark.parametrize("method", SETTINGS)
def test_cell(family: str, content: str, method: str) -> None:
    ...
