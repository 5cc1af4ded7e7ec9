"""The step that is about to run, shared by a decoder, its attention layers and the runner of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duet_vlm.serve.decoder_stages import DecoderStages
from duet_vlm.serve.staged_prompt import StagedPrompt
from duet_vlm.serve.staged_step import StagedStep

COUNTS = {
    "image": "duet_counts",
    "video": "duet_counts_video",
}  # rows of an image or clip in each stage, on their way to scheduler and worker


@dataclass
class RunningStep:
    """``step`` is set by the runner before tables are built; None where nothing is served (profiling)."""

    stages: DecoderStages
    step: StagedStep | None = None


def prompt_of(length: int, features: Sequence[Any] | None) -> StagedPrompt:
    """A prompt of ``length`` tokens with its images and clips, as vLLM keeps them with a request."""
    spans, counts = [], []
    for feature in features or ():
        if feature.modality in COUNTS:
            spans += [(first, last + 1) for first, last in feature.mm_position.extract_embeds_range()]
            counts.append(feature.data[COUNTS[feature.modality]].data.tolist())
    return StagedPrompt.of(length, spans, counts)
