"""V2V: the vision tower with recording and selection over the plain tower, with a CLS row (LLaVA) and without
(Qwen2.5-VL).

What selecting costs must not hide behind what it saves: LLaVA's projector, which gets cheaper when only survivors are
projected, is an identity on both sides, and features come from the last layer, so that no layer goes unread. Two more
rows tell the tower as LLaVA reads it (the layer before the last; an attached model does not run the last one) and the
whole encoder call. Qwen's merger runs on every row on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, QWEN, TINY, TINY_QWEN, Shape, build, picture, twin
from torch import nn

import duet_vlm
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.profiling.timing import time_paired
from duet_vlm.reducers.options import TokenOptions

TARGETS = {"llava": 1.01, "qwen2_5_vl": 1.05, "page": 1.02}


def run(options: Options) -> list[dict[str, Any]]:
    # the decoder is not run
    llava, qwen = (TINY, TINY_QWEN) if options.quick else (replace(LLAVA, layers=2), replace(QWEN, layers=2))
    page = qwen if options.quick else replace(qwen, side=36)
    return [
        _compare(options, llava, "tower with CLS", 21, bare=True, features=-1, target=TARGETS["llava"]),
        _compare(options, llava, "tower with CLS, last layer unread", 21, bare=True),
        _compare(options, llava, "tower and projector", 9, bare=False),
        _compare(options, qwen, "tower without CLS", 9, bare=True, target=TARGETS["qwen2_5_vl"]),
        *(
            _compare(
                options,
                page,
                f"page of {4 * page.side**2:,} patches, {who}",
                5,
                bare=True,
                target=target,
                options=TokenOptions(signal_queries=queries),
            )
            for who, queries, target in (("256 rows ask", 256, TARGETS["page"]), ("all rows ask", None, None))
        ),
    ]


def _compare(
    options: Options,
    shape: Shape,
    name: str,
    pairs: int,
    bare: bool,
    features: int | None = None,
    target: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """``features``: the tower layer whose output is read, where it is not the usual one."""
    plain = build(shape)
    if bare and shape.family == "llava":
        if shape.hidden != shape.vision_hidden:
            shape = replace(
                shape,
                hidden=shape.vision_hidden,
                heads=max(1, shape.vision_hidden // 16),
                kv_heads=max(1, shape.vision_hidden // 16),
            )
            plain = build(shape)
        plain.model.multi_modal_projector = nn.Identity()
    if features is not None:
        plain.config.vision_feature_layer = features
    attached, image = twin(plain), picture(shape)
    with torch.inference_mode(), duet_vlm.attach(attached, "duet", budget=0.22, **settings):
        sides = {"duet": lambda: encode(attached, image), "plain": lambda: encode(plain, image)}
        times = time_paired(sides, options.repeats(pairs), warmup=2)
    return side_by_side(name, shape, times["duet"], times["plain"], target)
