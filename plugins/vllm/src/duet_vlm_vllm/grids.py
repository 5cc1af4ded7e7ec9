"""Models with M-RoPE: rows carry their place on the image's grid, and positions are made again from the rows that are left.

vLLM has a path for media of which rows were dropped (Efficient Video Sampling): embeddings come with their positions in further columns, and the
model takes those off and corrects the positions of the prompt before each step. It is switched on here, for images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal.video_prune.evs import compute_mrope_for_media
from vllm.platforms import current_platform

from duet_vlm.models.towers import packed_signals
from duet_vlm.serve.rows import reduced
from duet_vlm.serve.settings import REQUEST
from duet_vlm_vllm.placeholders import FewerPlaceholders
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.tower import Recorder, batches, budgets, check_engine, layer_of

BASE = 256  # bfloat16 holds whole numbers exactly up to here, so a position takes two columns
COLUMNS = 6


def in_columns(positions: Tensor) -> Tensor:
    """[n, 3] whole numbers below 65536 -> [n, 6], both halves exact in any floating point type."""
    return torch.cat([positions // BASE, positions % BASE], 1)


def from_columns(rows: Tensor) -> Tensor:
    """The inverse, of the last columns of rows [n, D + 6] -> [3, n] long."""
    high, low = rows[:, -COLUMNS:].long().T.chunk(2)
    return high * BASE + low


class GridProcessor(FewerPlaceholders):
    positions = "keep"
    each_image = "image_grid_thw"


class KeptPositions:
    """In front of a Qwen-VL model."""

    supports_multimodal_pruning = True

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Before the model's own ``__init__``."""
        check_engine(vllm_config)
        mm = vllm_config.model_config.multimodal_config
        if mm.is_multimodal_pruning_enabled():
            raise ValueError("--video-pruning-rate cannot be combined with duet: leave it out")
        mm.video_pruning_rate = 1e-9
        if current_platform.is_cpu():
            _let_cpu_runner_prune()

    def begin(self, vllm_config: VllmConfig) -> None:
        """After it."""
        self.duet = served(self.config, "keep")
        blocks = self.visual.blocks
        number = layer_of(self.duet.reducer, self.usual_block(), len(blocks), len(blocks))
        self.recorder = Recorder(blocks[number].attn.attn, self.duet.reducer)
        self.most = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.asked: Any = None

    width: int | None = None  # of the rows that methods look at, where those of several depths stand behind them

    def usual_block(self) -> int:
        """The block whose attention ranks."""
        return len(self.visual.blocks) - 1

    def raster(self, grids: Sequence[Sequence[int]]) -> Tensor:
        """Where the merged tokens of the call, in raster order, stand in the order that the blocks work in."""
        return torch.arange(sum(t * h * w for t, h, w in grids) // self.visual.spatial_merge_size**2)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        self.asked = kwargs.pop(REQUEST, None)
        return super().embed_multimodal(**kwargs)

    def _process_image_input(self, image_input: Any) -> tuple[Tensor, ...]:
        """Per image [K, D + 6]: its rows, and where each stands on the grid."""
        grids, merge = image_input["image_grid_thw"].tolist(), self.visual.spatial_merge_size
        places = [compute_mrope_for_media(grid, merge)[:, :3] for grid in grids]
        if image_input["type"] == "image_embeds":
            rows = super()._process_image_input(image_input)
            return tuple(_with_columns(row, place) for row, place in zip(rows, places, strict=True))
        asked, patches = budgets(self.asked, len(grids)), [t * h * w for t, h, w in grids]
        out: list[Tensor] = []
        for run in batches([count // merge**2 for count in patches], self.most):
            some = slice(run.start, run.stop)
            first, last = sum(patches[: run.start]), sum(patches[: run.stop])
            part = self._parse_and_validate_image_input(
                pixel_values=image_input["pixel_values"][first:last], image_grid_thw=image_input["image_grid_thw"][some]
            )
            self.recorder.take()
            rows = super()._process_image_input(part)
            parts = [torch.zeros(len(row), dtype=torch.long) for row in rows]
            signals, seen = self._signals(grids[some], [len(row) for row in rows]), [row[:, : self.width] for row in rows]
            kept = reduced(self.duet, rows, parts, asked[some], signals, seen)
            out += [_with_columns(row, place[index.cpu()]) for (row, index), place in zip(kept, places[some], strict=True)]
        return tuple(out)

    def _signals(self, grids: Sequence[Sequence[int]], counts: list[int]) -> tuple[Any, Any] | None:
        if not self.duet.reducer.signals:
            return None
        importance, keys = packed_signals(self.recorder.take(), self.visual.spatial_merge_size**2, self.duet.reducer.signal_segments)
        order = self.raster(grids).to(importance.device)
        return importance[order].split(counts), keys[order].split(counts)

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        return image_embeds_split  # the columns are there already

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, n] of a prompt that is reduced already, and what to add to a row's number behind it. Those of the text are right, also
        where the cache knows the prefix and nobody corrects them; an image's rows all stand at its first place until they come."""
        count, start, following, merge = len(input_tokens), 0, 0, self.config.vision_config.spatial_merge_size
        positions = torch.zeros(3, count, dtype=torch.long)
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        for feature in features:
            offset, length = feature.mm_position.offset, feature.mm_position.length
            t, h, w = feature.data["image_grid_thw"].data.tolist()
            positions[:, start:offset] = torch.arange(following, following + offset - start)
            following += offset - start
            positions[:, offset : offset + length] = following
            following += max(t, h // merge, w // merge)
            start = offset + length
        positions[:, start:] = torch.arange(following, following + count - start)
        return positions, following - start

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """The embeddings without their columns, and the positions with those of the rows that a step brings: any number of images, or pieces of
        them; doing it twice changes nothing."""
        device, config = mrope_positions.device, self.config
        ids = torch.as_tensor(input_ids, device=device)
        positions = mrope_positions.clone()
        delta = int(positions.max()) + 1 - ids.numel()
        if multimodal_embeddings:
            places = torch.cat([from_columns(rows).to(device) for rows in multimodal_embeddings], 1)
            media = ids == config.image_token_id
            media[:num_computed_tokens] = False
            at = media.nonzero().squeeze(1)[: places.shape[1]]
            starts = (ids == config.vision_start_token_id).nonzero().squeeze(1)
            positions[:, at] = positions[0, starts[torch.searchsorted(starts, at) - 1]] + 1 + places
        return [rows[:, :-COLUMNS] for rows in multimodal_embeddings], positions, delta


def _with_columns(rows: Tensor, places: Tensor) -> Tensor:
    return torch.cat([rows, in_columns(places).to(rows.device, rows.dtype)], 1)


def _let_cpu_runner_prune() -> None:
    """vLLM's CPU runner loads models by a method of its own, which never notes that media may be pruned. By now it has begun to, so the note
    becomes a question to the model."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def prunes(runner: Any) -> bool:
        return isinstance(getattr(runner, "model", None), KeptPositions)

    CPUModelRunner.is_multimodal_pruning_enabled = property(prunes, lambda runner, value: None)
