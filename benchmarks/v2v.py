"""V2V: the vision tower with recording and selection over the plain tower, with a CLS row (LLaVA) and without (Qwen2.5-VL).

LLaVA's projector is taken out of the comparison (an identity on both sides), because it gets cheaper when only the surviving rows are
projected; a second row tells the whole encoder call. Qwen's merger runs on every row on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, QWEN, TINY, TINY_QWEN, Shape, build, picture, twin
from torch import nn

import duet_vlm
from duet_vlm.measure.speed import paired

TARGETS = {"llava": 1.03, "qwen2_5_vl": 1.08}


def run(options: Options) -> list[dict[str, Any]]:
    llava, qwen = (TINY, TINY_QWEN) if options.quick else (replace(LLAVA, layers=2), replace(QWEN, layers=2))  # the decoder is not run
    rows = [_compare(options, llava, "tower with CLS", 21, bare=True), _compare(options, llava, "tower and projector", 9, bare=False)]
    return [*rows, _compare(options, qwen, "tower without CLS", 7, bare=True)]


def _compare(options: Options, shape: Shape, name: str, pairs: int, bare: bool) -> dict[str, Any]:
    plain = build(shape)
    if bare and shape.family == "llava":
        if shape.hidden != shape.vision_hidden:
            shape = replace(shape, hidden=shape.vision_hidden, heads=max(1, shape.vision_hidden // 16), kv_heads=max(1, shape.vision_hidden // 16))
            plain = build(shape)
        plain.model.multi_modal_projector = nn.Identity()
    attached, image = twin(plain), picture(shape)
    with torch.inference_mode(), duet_vlm.attach(attached, "duet", budget=0.22):
        sides = {"duet": lambda: attached.get_image_features(**image), "plain": lambda: plain.get_image_features(**image)}
        times = paired(sides, options.repeats(pairs), warmup=2)
    target = TARGETS[shape.family] if bare else None
    return side_by_side(name, shape, times["duet"], times["plain"], target)
