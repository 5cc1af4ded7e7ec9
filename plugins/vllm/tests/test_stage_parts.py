"""Drops inside the decoder without any engine: what is refused at the start, and what both of vLLM's model runners tell
a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from duet_vlm_vllm import qwen3_vl
from duet_vlm_vllm.placeholders import FewerPlaceholders
from duet_vlm_vllm.stages import engine_checks
from duet_vlm_vllm.stages.model import StagedModel
from duet_vlm_vllm.stages.model_state import StagedModelState
from duet_vlm_vllm.stages.request_checks import LEFT_BEHIND, RequestChecks
from duet_vlm_vllm.stages.running_step import COUNTS, RunningStep
from duet_vlm_vllm.stages.worker import StagedRunner
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor

import duet_vlm
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.serve.decoder_stages import DecoderStages
from duet_vlm.serve.served_method import REQUEST_CHECKS, SCHEDULER, WORKER

GOOD: dict[str, dict[str, Any]] = {
    "parallel_config": {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        "enable_expert_parallel": False,
        "worker_cls": WORKER,
    },
    "scheduler_config": {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 4096,
        "long_prefill_token_threshold": 0,
        "disable_hybrid_kv_cache_manager": False,
        "scheduler_cls": SCHEDULER,
    },
    "model_config": {
        "enforce_eager": True,
        "max_model_len": 4096,
        "enable_prompt_embeds": False,
        "logits_processors": [REQUEST_CHECKS],
        "multimodal_config": SimpleNamespace(mm_processor_cache_type="lru"),
        "dtype": torch.float32,
    },
    "cache_config": {"enable_prefix_caching": False, "block_size": 32, "cache_dtype": "auto"},
    "": {"speculative_config": None, "lora_config": None, "kv_transfer_config": None, "use_v2_model_runner": False},
}
LAYER = {"sliding_window": None, "kv_sharing_target_layer_name": None, "head_size": 32}


def config(part: str, name: str, value: Any) -> Any:
    """As much of vLLM's settings as is looked at, one of them another than usual."""
    given = {one: dict(settings) for one, settings in GOOD.items()}
    given[part][name] = value
    parts = {one: SimpleNamespace(**settings) for one, settings in given.items() if one}
    return SimpleNamespace(**parts, **given[""])


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("model_config", "enforce_eager", False, "compiled or captured decoders: start with --enforce-eager"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallel: leave --pipeline-parallel-size out"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallel: leave"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallel: leave"),
        ("parallel_config", "use_ubatching", True, "micro-batches: leave --enable-dbo out"),
        ("parallel_config", "enable_expert_parallel", True, "expert parallel: leave --enable-expert-parallel out"),
        ("parallel_config", "worker_cls", "auto", "another worker: start with --worker-cls"),
        ("", "speculative_config", object(), "speculative decoding: leave --speculative-config out"),
        ("", "lora_config", object(), "LoRA: leave --enable-lora out"),
        ("", "kv_transfer_config", object(), "KV connectors: leave --kv-transfer-config out"),
        ("", "use_v2_model_runner", True, "second model runner, .*: set VLLM_USE_V2_MODEL_RUNNER=0"),
        ("scheduler_config", "enable_chunked_prefill", True, "chunked prefill: start with"),
        ("scheduler_config", "max_num_batched_tokens", 4095, "--max-num-batched-tokens at least --max-model-len"),
        ("scheduler_config", "long_prefill_token_threshold", 1, "long_prefill_token_threshold: leave it out"),
        ("scheduler_config", "disable_hybrid_kv_cache_manager", True, "a single group of the KV cache: leave"),
        ("scheduler_config", "scheduler_cls", None, "another scheduler: start with --scheduler-cls"),
        ("model_config", "enable_prompt_embeds", True, "prompt embeddings: leave --enable-prompt-embeds out"),
        ("model_config", "logits_processors", None, "requests that are not looked at: start with"),
        (
            "model_config",
            "multimodal_config",
            SimpleNamespace(mm_processor_cache_type="shm"),
            "a cache of processed images in shared memory: leave --mm-processor-cache-type out",
        ),
    ],
)
def test_engines_that_would_answer_wrongly_are_refused(part: str, name: str, value: Any, says: str) -> None:
    layers = [SimpleNamespace(**LAYER)]
    with pytest.raises(ValueError, match=says):
        engine_checks.check_engine(config(part, name, value), layers)
    engine_checks.check_engine(config(part, name, GOOD[part][name]), layers)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 512), ("kv_sharing_target_layer_name", "layers.0")])
def test_layers_that_read_another_cache_are_refused(name: str, value: Any) -> None:
    layers = [SimpleNamespace(**LAYER), SimpleNamespace(**LAYER | {name: value})]
    with pytest.raises(ValueError, match="sliding windows or shared layers of the KV cache: use stages='first'"):
        engine_checks.check_engine(config("", "lora_config", None), layers)


@pytest.mark.parametrize(("block_size", "readable"), [(32, True), (16, False)])
def test_prefix_caching_needs_keys_that_can_be_read(block_size: int, readable: bool) -> None:
    cached = config("cache_config", "enable_prefix_caching", True)
    cached.cache_config.block_size = block_size
    if readable:
        engine_checks.check_engine(cached, [SimpleNamespace(**LAYER)])
    else:
        with pytest.raises(ValueError, match=r"prefix caching, .* start with --no-enable-prefix-caching"):
            engine_checks.check_engine(cached, [SimpleNamespace(**LAYER)])


def test_the_second_runner_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine_checks.TRY_SECOND, "1")
    engine_checks.check_engine(config("", "use_v2_model_runner", True), [SimpleNamespace(**LAYER)])


@pytest.mark.parametrize(("heads", "ranks", "refused"), [("max", 2, True), ("max", 1, False), ("mean", 2, False)])
def test_methods_that_look_at_all_heads_at_once_have_one_rank(heads: str, ranks: int, refused: bool) -> None:
    own = {"scoring_rules": lambda self: ScoringRules(score_heads=heads)}
    reducer = type("Own", (duet_vlm.get_method("pyramiddrop"),), own)(schedule=((2, 0.5),))
    if refused:
        with pytest.raises(ValueError, match="serve it with one rank"):
            engine_checks.check_ranks(reducer, ranks)
    else:
        engine_checks.check_ranks(reducer, ranks)


@pytest.mark.parametrize(("stages", "takes"), [("first", True), ("all", False)])
def test_clips_between_timestamps_have_the_first_stage_only(stages: str, takes: bool) -> None:
    info, text = object.__new__(qwen3_vl.Qwen3VLInfo), SimpleNamespace(num_hidden_layers=8)
    info.get_hf_config = lambda: SimpleNamespace(  # type: ignore[method-assign]
        duet={"method": "duet", "budget": 0.2, "stages": stages}, get_text_config=lambda: text
    )
    info.ctx = SimpleNamespace(
        get_mm_config=lambda: SimpleNamespace(enable_mm_embeds=False, get_limit_per_prompt=lambda kind: 9)
    )
    assert (info.get_supported_mm_limits()["video"] == 0) == (not takes)
    if takes:
        info.validate_num_items("video", 1)
    else:
        with pytest.raises(ValueError, match=r"its timestamps stand .* serve the first stage"):
            info.validate_num_items("video", 1)
    info.validate_num_items("image", 1)


# ---- model runners


def feature(first: int, end: int, counts: list[int], modality: str = "image") -> Any:
    """An image or clip as vLLM keeps it with a request."""
    place = SimpleNamespace(extract_embeds_range=lambda: [(first, end - 1)])
    return SimpleNamespace(
        modality=modality, mm_position=place, data={COUNTS[modality]: SimpleNamespace(data=torch.tensor(counts))}
    )


REQUESTS: dict[str, tuple[int, list[Any], int, int]] = {  # prompt, images, computed, scheduled
    "two pictures": (40, [feature(9, 21, [12, 7, 3]), feature(23, 30, [7, 3, 3])], 0, 40),
    "text": (11, [], 0, 11),
    "written": (22, [feature(3, 9, [6, 4, 1], "video")], 30, 1),
    "preempted": (25, [feature(2, 20, [18, 9, 0])], 0, 27),
}


def test_both_runners_tell_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for name in ("__init__", "add_request", "remove_request", "prepare_attn"):
        monkeypatch.setattr(DefaultModelState, name, lambda *args, **kwargs: told.append((args[1:], kwargs)))
    stages, computed, scheduled = (
        DecoderStages(6, (2, 4)),
        [one[2] for one in REQUESTS.values()],
        [one[3] for one in REQUESTS.values()],
    )
    state = StagedModelState(None, None, None, None)
    state.model = SimpleNamespace(running=RunningStep(stages))
    for number, (name, (length, features, *_)) in enumerate(REQUESTS.items()):
        state.add_request(number, SimpleNamespace(req_id=name, prompt_len=length, mm_features=features))
    spare = 3  # rows of the tables that hold nobody
    batch = SimpleNamespace(
        req_ids=list(REQUESTS),
        num_computed_tokens_np=np.array(computed + [7] * spare),
        num_scheduled_tokens=np.array(scheduled),
    )
    state.prepare_attn(batch, "mode", for_capture=False)
    assert told[-1] == ((batch, "mode"), {"for_capture": False})
    second = state.model.running.step

    runner = object.__new__(StagedRunner)
    runner.requests = {name: SimpleNamespace(mm_features=one[1]) for name, one in REQUESTS.items()}
    runner.input_batch = SimpleNamespace(
        req_ids=list(REQUESTS),
        num_prompt_tokens=np.array([one[0] for one in REQUESTS.values()] + [0] * spare),
        num_computed_tokens_cpu=np.array(computed + [7] * spare),
    )
    first = runner._step(RunningStep(stages), dict(zip(REQUESTS, scheduled, strict=True)))
    for one in (first, second):
        assert one.num_rows.tolist() == [[40, 11, 1, 27], [31, 11, 1, 18], [27, 11, 1, 9]]
        assert one.first_rows.tolist() == [[0, 0, 30, 0], [0, 0, 28, 0], [0, 0, 25, 0]]
        assert one.dropping.tolist() == [True, False, False, True]
    assert first.prompts == second.prompts
    state.remove_request("written")
    state.prepare_attn(batch)  # a run that measures or warms up names requests that nobody sent
    assert state.model.running.step is None and set(state.prompts) == REQUESTS.keys() - {"written"}


def test_the_second_runner_asks_the_model() -> None:
    model = StagedModel()
    assert resolve_model_state_cls(None, model) is DefaultModelState
    model.running = RunningStep(DecoderStages(6, (2,)))
    assert resolve_model_state_cls(None, model) is StagedModelState


def test_requests_are_checked_with_both_runners() -> None:
    assert issubclass(RequestChecks, LogitsProcessor) and issubclass(RequestChecks, SecondLogitsProcessor)
    checks, logits = RequestChecks(None, None), torch.randn(2, 5)
    assert checks.apply(logits) is logits and checks.apply(logits, object()) is logits
    assert not checks.add_request(0, None)
    for refused, says in (
        (SamplingParams(prompt_logprobs=0), "prompt_logprobs: visual tokens that leave"),
        (SamplingParams(max_tokens=1, logprobs=4, detokenize=False), "beam search: each step would be a prompt"),
    ):
        with pytest.raises(ValueError, match=says):
            RequestChecks.validate_params(refused)
    for fine in (SamplingParams(), SamplingParams(max_tokens=1, logprobs=4), SamplingParams(detokenize=False)):
        RequestChecks.validate_params(fine)


class StockProcessor:
    def apply(self, inputs: Any) -> str:
        return "processed"


class Processor(FewerPlaceholders, StockProcessor):
    duet = SimpleNamespace(decoder_reducer=None)  # type: ignore[assignment]
    info = SimpleNamespace(get_hf_config=SimpleNamespace)


class Cache:
    cleared = 0

    def clear_cache(self) -> None:
        self.cleared += 1


def test_images_of_a_refused_request_are_sent_again() -> None:
    LEFT_BEHIND.clear()
    inputs, processor = SimpleNamespace(prompt=[1, 2], cache=Cache()), Processor()
    assert processor.apply(inputs) == "processed" and inputs.cache.cleared == 0
    with pytest.raises(ValueError, match="prompt_logprobs"):
        RequestChecks.validate_params(SamplingParams(prompt_logprobs=1))
    assert processor.apply(SimpleNamespace(prompt=[1, 2], cache=None)) == "processed"  # has nothing to forget
    for _ in range(2):
        assert processor.apply(inputs) == "processed" and inputs.cache.cleared == 1
