"""Qwen3-VL, images and clips: reduced behind the mergers; rows of all depths (deepstack) stand side by side and go
together.

Its prompts show the steps of a clip apart, a timestamp in front of each. Which rows of which step stay depends on the
pixels, so the front end cannot know where the timestamps will stand: it lays out as many places as there will be rows
and text, and the worker brings the text, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from duet_vlm_vllm.grids import VISUAL, GridProcessor, KeptPositions, with_columns
from duet_vlm_vllm.placeholders import ImagesOnly, ShortenedPrompt
from duet_vlm_vllm.settings import served


class Qwen3VLInfo(ImagesOnly, Qwen3VLProcessingInfo):
    """With drops inside the decoder images only: where text stands between the rows of a clip follows from its pixels,
    and rows that rank are counted before."""

    why = "where its timestamps stand depends on its pixels, and drops inside the decoder are planned without them"
    instead = "serve the first stage (stages='first')"

    @property
    def takes_clips(self) -> bool:
        return served(self.get_hf_config(), "keep").decoder_reducer is None


class Processor(GridProcessor, Qwen3VLMultiModalProcessor):
    def visual(self, kind: str, ids: list[int], details: PromptUpdateDetails) -> Tensor:
        if kind == "image":
            return super().visual(kind, ids, details)
        return torch.tensor(ids) == self.info.get_hf_config().video_token_id

    def shown(self, kind: str, content: ShortenedPrompt) -> ShortenedPrompt:
        if kind == "image":
            return content
        return ShortenedPrompt(
            [self.info.get_hf_config().video_token_id] * len(content.full), None, content.before, content.after
        )


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Qwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class DuetQwen3VL(KeptPositions, Qwen3VLForConditionalGeneration):
    clock = "timestamps"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        self.prepare(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
        self.begin_stages(vllm_config)

    @property
    def width(self) -> int:
        return self.visual_dim

    def written(self, kind: str, grid: Sequence[int], clock: Any) -> tuple[Tensor, Tensor]:
        if kind == "image":
            return super().written(kind, grid, clock)
        own, _ = super().written(kind, [1, *grid[1:]], None)
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        places, text, following = [], [], 0
        for seconds in clock:
            stamp = [*self._tokenizer.encode(f"<{seconds:.1f} seconds>", add_special_tokens=False), start]
            line = torch.arange(following, following + len(stamp))
            behind = following + len(stamp) + 1 + int(own.max())
            places += [line[:, None].expand(-1, 3), own + following + len(stamp), torch.full((1, 3), behind)]
            text += [torch.tensor(stamp), torch.full((len(own),), VISUAL), torch.tensor([end])]
            following = behind + 1
        return torch.cat(places), torch.cat(text)

    def in_prompt(self, rows: Tensor, index: Tensor, written: tuple[Tensor, Tensor]) -> Tensor:
        places, text = written
        visual = text == VISUAL
        of_text, of_rows = (~visual).nonzero().squeeze(1), visual.nonzero().squeeze(1)[index]
        if not len(of_text):
            return super().in_prompt(rows, index, written)
        words = self.get_language_model().embed_input_ids(text[of_text].to(rows.device)).to(rows.dtype)
        together = torch.cat([rows, torch.nn.functional.pad(words, (0, rows.shape[1] - words.shape[1]))])
        at, order = torch.cat([of_rows, of_text]).sort()
        return with_columns(together[order.to(rows.device)], places[at])
