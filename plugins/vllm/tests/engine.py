"""One vLLM engine in this process, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
)  # fmt: skip

from cases import ARCHITECTURES
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)
COMMON: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8, "seed": 0, "block_size": 32,
    "limit_mm_per_prompt": {"image": 3, "video": 2}, "distributed_executor_backend": "uni",
}  # fmt: skip


def start(folder: Path | str, family: str, settings: dict[str, Any], **more: Any) -> LLM:
    """An engine with the plug-in's model; ``more`` are further arguments of it."""
    overrides = {"architectures": ["Duet" + ARCHITECTURES[family]], "duet": settings}
    return LLM(str(folder), hf_overrides=overrides, **COMMON | more)


def model_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def switch(llm: LLM, settings: dict[str, Any]) -> None:
    """Other settings in the running engine, as starting one takes long. No cache is emptied: rows of other settings
    must not be found."""
    model, config = model_of(llm), llm.llm_engine.vllm_config
    for module in model.modules():
        if isinstance(module, MMEncoderAttention):
            module._forward_pre_hooks.clear()
    config.model_config.hf_config.duet = model.config.duet = settings
    model.begin(config)


def shown(images: Sequence[Any], clips: Sequence[Any] = ()) -> dict[str, Any]:
    """Media as vLLM takes them."""
    return {kind: list(some) for kind, some in (("image", images), ("video", clips)) if some}


def request(text: str, images: Sequence[Any], clips: Sequence[Any] = (), **kwargs: Any) -> dict[str, Any]:
    media = shown(images, clips)
    return (
        {"prompt": text}
        | ({"multi_modal_data": media} if media else {})
        | ({"mm_processor_kwargs": kwargs} if kwargs else {})
    )


def found(output: Any) -> list[Any]:
    """Rows of the prompt, tokens, log probabilities."""
    best = output.outputs[0]
    chances = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
    return [len(output.prompt_token_ids), list(best.token_ids), chances]


def same(ours: list[Any], theirs: list[Any], within: float = 2e-4) -> bool:
    return ours[:2] == theirs[:2] and all(abs(a - b) < within for a, b in zip(ours[2], theirs[2], strict=True))
