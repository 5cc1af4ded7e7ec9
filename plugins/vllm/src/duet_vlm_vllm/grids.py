"""Models with M-RoPE: rows carry their place on the image's grid, and positions are made again from the rows that are
left.

vLLM has a path for media of which rows were dropped (Efficient Video Sampling): embeddings come with their positions in
further columns, and the model takes those off and corrects the positions of the prompt before each step. It is switched
on here, for images and clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal.video_prune.evs import compute_mrope_for_media
from vllm.platforms import current_platform

from duet_vlm.models.tower_signals import packed_signals
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS
from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm_vllm.placeholders import FewerPlaceholders
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.stages.model import StagedModel
from duet_vlm_vllm.tower import Recorder, batches, budgets, check_engine, layer_of, take_budgets

BASE = 256  # bfloat16 holds whole numbers exactly up to here, so a position takes two columns
COLUMNS = 8  # of three positions, and of the row's own number
VISUAL = -1  # in place of the id of a text token


def in_columns(numbers: Tensor) -> Tensor:
    """[n, 4] whole numbers below 65536 -> [n, 8], both halves exact in any floating point type."""
    return torch.cat([numbers // BASE, numbers % BASE], 1)


def from_columns(rows: Tensor) -> Tensor:
    """The inverse, of the last columns of rows [n, D + 8] -> [4, n] long."""
    high, low = rows[:, -COLUMNS:].long().T.chunk(2)
    return high * BASE + low


class GridProcessor(FewerPlaceholders):
    positions = "keep"
    counted: ClassVar[dict[str, str]] = {"image": "image_grid_thw", "video": "video_grid_thw"}

    def spans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[Tensor]:
        return [steps_of(item[f"{kind}_grid_thw"].data.tolist(), tokens)]


def steps_of(grid: Sequence[int], tokens: int) -> Tensor:
    """The step of time that each of an image's or clip's rows shows [n]."""
    return torch.arange(grid[0]).repeat_interleave(tokens // grid[0])


class KeptPositions(StagedModel):
    """In front of a Qwen-VL model."""

    supports_multimodal_pruning = True

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Before the model's own ``__init__``."""
        check_engine(vllm_config)
        mm = vllm_config.model_config.multimodal_config
        if mm.is_multimodal_pruning_enabled():
            raise ValueError("--video-pruning-rate cannot be combined with duet: leave it out")
        mm.video_pruning_rate = 1e-17  # 1 - rate is 1: on, and vLLM itself takes no row from a clip
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

    clock = "second_per_grid_ts"  # the field that says when the steps of a clip are
    width: int | None = None  # of the rows that methods look at, where those of several depths stand behind them

    def usual_block(self) -> int:
        """The block whose attention ranks."""
        return len(self.visual.blocks) - 1

    def raster(self, grids: Sequence[Sequence[int]]) -> Tensor:
        """Places of the merged tokens of the call, in raster order, in the order that the blocks work in."""
        return torch.arange(_patches(grids) // self.visual.spatial_merge_size**2)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        self.asked = take_budgets(kwargs)
        return super().embed_multimodal(**kwargs)

    def _process_image_input(self, image_input: Any) -> tuple[Tensor, ...]:
        given = image_input["type"] == "image_embeds"
        return self._reduced("image", image_input, super()._process_image_input(image_input) if given else None)

    def _process_video_input(self, video_input: Any) -> tuple[Tensor, ...]:
        given = video_input["type"] == "video_embeds"
        return self._reduced("video", video_input, super()._process_video_input(video_input) if given else None)

    def _reduced(self, kind: str, media: Any, given: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """Per image or clip [K, D + 8]: its rows, and where each stands on the grid. ``given``: rows that were chosen
        from already."""
        grids, merge, clocks = media[f"{kind}_grid_thw"].tolist(), self.visual.spatial_merge_size, media.get(self.clock)
        written = [
            self.written(kind, *one)
            for one in zip(grids, [None] * len(grids) if clocks is None else clocks, strict=True)
        ]
        if given is not None:
            return tuple(
                self.in_prompt(row, torch.arange(len(row)), whole) for row, whole in zip(given, written, strict=True)
            )
        pixels = media["pixel_values" if kind == "image" else "pixel_values_videos"]
        asked, patches = budgets(self.asked[kind], len(grids)), [t * h * w for t, h, w in grids]
        out: list[Tensor] = []
        for run in batches([count // merge**2 for count in patches], self.most):
            some = slice(run.start, run.stop)
            first, last = sum(patches[: run.start]), sum(patches[: run.stop])
            rows, signals = self._encoded(pixels[first:last], grids[some])
            parts = [steps_of(grid, len(row)) for grid, row in zip(grids[some], rows, strict=True)]
            seen = [row[:, : self.width] for row in rows]
            kept = reduce_rows(self.duet, rows, parts, asked[some], signals, seen, stream=kind)
            out += [
                self.in_prompt(row, index.cpu(), whole) for (row, index), whole in zip(kept, written[some], strict=True)
            ]
        return tuple(out)

    def _encoded(self, pixels: Tensor, grids: list[list[int]]) -> tuple[list[Tensor], Any]:
        """Rows and signals of images or clips. One that is too large for a call of the tower goes through it in pieces:
        steps of time do not see each other there."""
        pieces = [grids]
        if len(grids) == 1:
            t, h, w = grids[0]
            pieces = [
                [[len(steps), h, w]] for steps in batches([h * w // self.visual.spatial_merge_size**2] * t, self.most)
            ]
        calls = [
            self._call(part, piece)
            for part, piece in zip(pixels.split([_patches(piece) for piece in pieces]), pieces, strict=True)
        ]
        rows, *signals = ([torch.cat(each) for each in zip(*some, strict=True)] for some in zip(*calls, strict=True))
        return rows, signals or None

    def _call(self, pixels: Tensor, grids: list[list[int]]) -> tuple[Sequence[Tensor], ...]:
        """Rows, importance and keys (or rows alone) of one call of the tower, which takes clips as it takes images."""
        self.recorder.take()
        media = self._parse_and_validate_image_input(pixel_values=pixels, image_grid_thw=torch.tensor(grids))
        rows = super()._process_image_input(media)
        if not self.duet.reducer.requires & VISION_LAYER_INPUTS:
            return (rows,)
        importance, keys = packed_signals(
            self.recorder.take(), self.visual.spatial_merge_size**2, self.duet.reducer.scoring_rules().signal_segments
        )
        order, counts = self.raster(grids).to(importance.device), [len(row) for row in rows]
        return rows, importance[order].split(counts), keys[order].split(counts)

    def written(self, kind: str, grid: Sequence[int], clock: Any) -> tuple[Tensor, Tensor]:
        """A whole image or clip as the prompt shows it, as if it came first: positions of its rows [n, 3], and the ids
        of text between them [n], ``VISUAL`` for its own."""
        vision, seconds = self.config.vision_config, 1.0 if clock is None else float(clock)
        places = compute_mrope_for_media(
            grid, vision.spatial_merge_size, getattr(vision, "tokens_per_second", 1.0), seconds
        )[:, :3]
        return places, torch.full((len(places),), VISUAL)

    def in_prompt(self, rows: Tensor, index: Tensor, written: tuple[Tensor, Tensor]) -> Tensor:
        """The content of the prompt for rows [K, D] that are ``index`` [K], ascending, of a span's: with their columns,
        and text between them."""
        return with_columns(rows, written[0][index])

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        return image_embeds_split  # the columns are there already

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        return video_embeds_split

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, n] of a prompt that is reduced already, and what to add to a row's number behind it. Those of
        the text are right, also where the cache knows the prefix and nobody corrects them; rows of an image or clip all
        stand at its first place until they come."""
        count, start, following = len(input_tokens), 0, 0
        positions = torch.zeros(3, count, dtype=torch.long)
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        for feature in features:
            offset, length = feature.mm_position.offset, feature.mm_position.length
            grid, clock = feature.data[f"{feature.modality}_grid_thw"].data.tolist(), feature.data.get(self.clock)
            places, _ = self.written(feature.modality, grid, None if clock is None else clock.data)
            positions[:, start:offset] = torch.arange(following, following + offset - start)
            following += offset - start
            positions[:, offset : offset + length] = following
            following += 1 + int(places.max())
            positions[:, offset + length - 1] = following - 1  # what comes next counts from here
            start = offset + length
        positions[:, start:] = torch.arange(following, following + count - start)
        return positions, following - start

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """The embeddings without their columns, and the positions with those of the rows that a step brings: any number
        of images and clips, or pieces of them; doing it twice changes nothing."""
        device, config = mrope_positions.device, self.config
        ids = torch.as_tensor(input_ids, device=device)
        positions = mrope_positions.clone()
        delta = int(positions.max()) + 1 - ids.numel()
        if multimodal_embeddings:
            *places, number = torch.cat([from_columns(rows).to(device) for rows in multimodal_embeddings], 1)
            media = (ids == config.image_token_id) | (ids == config.video_token_id)
            media[:num_computed_tokens] = False
            at = media.nonzero().squeeze(1)[: len(number)]
            before = at - number - 1  # the text in front of each one's image or clip
            positions[:, at] = torch.where(before < 0, 0, positions[0, before] + 1) + torch.stack(places)
        return [rows[:, :-COLUMNS] for rows in multimodal_embeddings], positions, delta


def _patches(grids: Sequence[Sequence[int]]) -> int:
    return sum(t * h * w for t, h, w in grids)


def with_columns(rows: Tensor, places: Tensor) -> Tensor:
    numbers = torch.cat([places, torch.arange(len(places))[:, None]], 1)
    return torch.cat([rows, in_columns(numbers).to(rows.device, rows.dtype)], 1)


def _let_cpu_runner_prune() -> None:
    """vLLM's CPU runner loads models by a method of its own, which never notes that media may be pruned. By now it has
    begun to, so the note becomes a question to the model."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def prunes(runner: Any) -> bool:
        return isinstance(getattr(runner, "model", None), KeptPositions)

    CPUModelRunner.is_multimodal_pruning_enabled = property(prunes, lambda runner, value: None)
