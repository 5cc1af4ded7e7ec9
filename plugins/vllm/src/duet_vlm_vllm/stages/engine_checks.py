"""Engines that would give wrong answers with drops inside the decoder, refused at the start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig

from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.serve.served_method import REQUEST_CHECKS, SCHEDULER, WORKER
from duet_vlm_vllm.stages.attention import keys_can_be_read

TRY_SECOND = "DUET_VLM_SECOND_RUNNER"


def check_engine(vllm_config: VllmConfig, attentions: Sequence[Any]) -> None:
    """Refuse settings of the engine that do not go with drops inside the decoder.

    Raises
    ------
    ValueError
        Names all of them, each with what to do.
    """
    parallel, scheduler, model = vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.model_config
    wrong = {
        "compiled or captured decoders: start with --enforce-eager": not model.enforce_eager,
        "pipeline parallel: leave --pipeline-parallel-size out": parallel.pipeline_parallel_size > 1,
        "context parallel: leave --decode-context-parallel-size and --prefill-context-parallel-size out": (
            parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "micro-batches: leave --enable-dbo out": parallel.use_ubatching,
        "expert parallel: leave --enable-expert-parallel out": parallel.enable_expert_parallel,
        "speculative decoding: leave --speculative-config out": vllm_config.speculative_config is not None,
        "LoRA: leave --enable-lora out": vllm_config.lora_config is not None,
        "KV connectors: leave --kv-transfer-config out": vllm_config.kv_transfer_config is not None,
        "chunked prefill: start with --no-enable-chunked-prefill": scheduler.enable_chunked_prefill,
        "a step that a whole prompt may not fit in: give --max-num-batched-tokens at least --max-model-len": (
            scheduler.max_num_batched_tokens < model.max_model_len
        ),
        "long_prefill_token_threshold: leave it out": scheduler.long_prefill_token_threshold > 0,
        "prompt embeddings: leave --enable-prompt-embeds out": model.enable_prompt_embeds,
        "a single group of the KV cache: leave --disable-hybrid-kv-cache-manager out": scheduler.disable_hybrid_kv_cache_manager,
        "sliding windows or shared layers of the KV cache: use stages='first'": any(
            layer.sliding_window is not None or layer.kv_sharing_target_layer_name is not None for layer in attentions
        ),
        f"vLLM's second model runner, which was never run on a GPU: set VLLM_USE_V2_MODEL_RUNNER=0, or {TRY_SECOND}=1 to try it": (
            getattr(vllm_config, "use_v2_model_runner", False) and os.environ.get(TRY_SECOND) != "1"
        ),
        f"another worker: start with --worker-cls {WORKER}": named(parallel.worker_cls) != WORKER,
        f"another scheduler: start with --scheduler-cls {SCHEDULER}": named(scheduler.scheduler_cls) != SCHEDULER,
        f"requests that are not looked at: start with --logits-processors {REQUEST_CHECKS}": (
            REQUEST_CHECKS not in [named(one) for one in model.logits_processors or ()]
        ),
        "prefix caching, as the keys of this KV cache cannot be read and those of a cached prefix take part in ranking: start with "
        "--no-enable-prefix-caching": (
            vllm_config.cache_config.enable_prefix_caching
            and not all(keys_can_be_read(layer, vllm_config) for layer in attentions)
        ),
        "a cache of processed images in shared memory: leave --mm-processor-cache-type out": (
            getattr(model.multimodal_config, "mm_processor_cache_type", "lru") == "shm"
        ),
    }
    if found := [name for name, there in wrong.items() if there]:
        raise ValueError("drops inside the decoder do not go with " + "; ".join(found))


def check_ranks(reducer: DecoderReducer, ranks: int) -> None:
    """Refuse a method that looks at all heads at once where each rank has some.

    Raises
    ------
    ValueError
        Names the method.
    """
    keys = Input.DECODER_KEYS in reducer.requires
    if ranks > 1 and (keys or reducer.scoring_rules().score_heads not in ("mean", "each")):
        what = "keys of all heads" if keys else f"the {reducer.scoring_rules().score_heads} over heads"
        raise ValueError(
            f"{reducer.name}: it looks at {what}, and each of {ranks} ranks has some of them: serve it with one rank"
        )


def named(given: Any) -> str:
    """A class as a flag names it."""
    return (
        given
        if isinstance(given, str)
        else f"{given.__module__}.{given.__qualname__}"
        if isinstance(given, type)
        else str(given)
    )
