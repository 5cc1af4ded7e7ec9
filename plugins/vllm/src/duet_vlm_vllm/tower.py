"""The worker: what the tower's attention saw, budgets of requests, and how many images the tower takes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from duet_vlm.models.adapter import RecordedQK
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS
from duet_vlm.runtime.encode.selection import record_qk
from duet_vlm.serve.served_method import NOTHING_ASKED
from duet_vlm_vllm.placeholders import BUDGETS
from duet_vlm_vllm.stages.running_step import COUNTS


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse what runs a tower past Python: the attention that ranks could not be seen.

    Raises
    ------
    ValueError
        Names the option to leave out.
    """
    compilation, mm = vllm_config.compilation_config, vllm_config.model_config.multimodal_config
    for name in ("cudagraph_mm_encoder", "compile_mm_encoder"):
        if getattr(compilation, name, False):
            raise ValueError(
                f"{name}: a captured or compiled vision tower shows nobody the attention that ranks its tokens, leave it out"
            )
    if getattr(mm, "mm_encoder_tp_mode", "weights") == "data":
        raise ValueError(
            "--mm-encoder-tp-mode data: each rank would see the attention of some images only, leave it out"
        )


class Recorder:
    """Keeps what one attention layer of the tower was called with, all heads of it, until ``take``. ``whole``: each
    rank has all of them."""

    def __init__(self, attention: nn.Module, reducer: EncoderReducer, whole: bool = False) -> None:
        self.reducer, self.whole, self.calls = reducer, whole, []
        if reducer.requires & VISION_LAYER_INPUTS:
            attention.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key")))
        ends = kwargs.get("cu_seqlens", args[3] if len(args) > 3 else None)
        query, key = (x.reshape(*x.shape[:2], -1, module.head_size).transpose(1, 2) for x in (query, key))
        if not self.whole:
            query, key = _all_heads(query), _all_heads(key)
        segments = None if ends is None else ends[1:] - ends[:-1]
        self.calls.append(record_qk(self.reducer, query, key, float(module.scale), segments))

    def take(self) -> list[RecordedQK]:
        calls, self.calls = self.calls, []
        return calls


def _all_heads(rows: Tensor) -> Tensor:
    """[B, H, N, d] of this rank's heads -> of all ranks' heads."""
    if get_tensor_model_parallel_world_size() == 1:
        return rows
    return tensor_model_parallel_all_gather(rows.contiguous(), 1)


def layer_of(reducer: EncoderReducer, usual: int, depth: int, built: int) -> int:
    """The tower layer whose attention is read: ``usual``, or the one that the settings name among ``depth``, of which
    ``built`` are there.

    Raises
    ------
    ValueError
        A layer that is not there.
    """
    layer = reducer.signal_layers[0]
    if layer is None:
        return usual
    if isinstance(layer, float) or not -depth <= layer < depth or layer % depth >= built:
        raise ValueError(
            f"signal_layer={layer}: vLLM runs layers 0 to {built - 1} of this vision tower, name one of them"
        )
    return layer % depth


def take_budgets(fields: dict[str, Any]) -> dict[str, Any]:
    """Take the plug-in's own out of a model's arguments, which vLLM does not know: the budgets that requests asked for,
    by kind."""
    for name in COUNTS.values():
        fields.pop(name, None)
    return {kind: fields.pop(name, None) for kind, name in BUDGETS.items()}


def budgets(asked: Any, images: int) -> list[float]:
    """The budget that each image's request asked for, as it arrives in the model's arguments."""
    return [NOTHING_ASKED] * images if asked is None else torch.as_tensor(asked).flatten().tolist()


def batches(counts: Sequence[int], most: int) -> list[range]:
    """Images of ``counts`` unreduced tokens in runs of at most ``most`` (a larger image is alone): the scheduler counts
    reduced tokens, and would put many times more images into one call of the tower than memory was measured for."""
    runs, start, total = [], 0, 0
    for number, count in enumerate(counts):
        if number > start and total + count > most:
            runs.append(range(start, number))
            start, total = number, 0
        total += count
    return [*runs, range(start, len(counts))] if counts else []
