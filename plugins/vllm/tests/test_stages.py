"""Drops inside the decoder, one engine for each setting: answers equal those of ``attach``, whatever is batched,
preempted or cached."""

from __future__ import annotations

import gc
import json
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import stage_engine
import torch
from duet_vlm_vllm.stages import attention
from duet_vlm_vllm.stages.decoder import StagedPass
from duet_vlm_vllm.stages.ranking import attention_scores
from duet_vlm_vllm.stages.running_step import prompt_of
from duet_vlm_vllm.stages.worker import StagedRunner
from stage_cases import LONGER, SETTINGS, SYSTEM, prompts
from tiny import checksum
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import FullAttentionSpec

from duet_vlm.serve.decoder_stages import DecoderStages
from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm.serve.kv_groups import KVGroups
from duet_vlm.serve.served_method import NOTHING_ASKED, ServedMethod
from duet_vlm.serve.staged_prompt import StagedPrompt

REFERENCES = Path(__file__).parent / "references" / "stages"
CASES = [(family, name) for family, settings in SETTINGS.items() for name in settings]
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
SMALL: dict[str, dict[str, Any]] = {  # a cache that two or three prompts fill
    "pyramiddrop": {"max_model_len": 1280, "num_gpu_blocks_override": 162},
    "both stages": {"max_model_len": 288, "num_gpu_blocks_override": 40},
}


def wanted(family: str, folder: Path) -> dict[str, Any]:
    reference = json.loads((REFERENCES / f"{family}.json").read_text())
    assert checksum(folder) == reference["checksum"], (
        "the checkpoint is not the one of the reference: write it anew (stage_reference.py)"
    )
    return dict(reference["answers"])


@pytest.fixture
def started(checkpoints: dict[str, Path]) -> Iterator[Any]:
    """A function that starts an engine, which is shut down at the end of the test."""
    made: list[Any] = []

    def start(family: str, name: str, **more: Any) -> Any:
        made.append(stage_engine.start(checkpoints[family], family, SETTINGS[family][name], **more))
        return made[-1]

    yield start
    while made:
        made.pop().llm_engine.engine_core.shutdown()
    gc.collect()


def requests_of(family: str) -> dict[str, Any]:
    return {case: engine.request(*prompt) for case, prompt in prompts(family).items()}


def managers(llm: Any) -> list[Any]:
    return list(stage_engine.core(llm).scheduler.kv_cache_manager.coordinator.single_type_managers)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_are_those_of_attach(started: Any, checkpoints: dict[str, Path], family: str, name: str) -> None:
    """One after the other, all at once, and staggered, so that some are written while others are read; prefixes come
    from the cache."""
    llm, answers, requests = started(family, name), wanted(family, checkpoints[family])[name], requests_of(family)
    alone = {case: stage_engine.ask(llm, [request])[0] for case, request in requests.items()}
    together = dict(zip(requests, stage_engine.ask(llm, list(requests.values())), strict=True))
    staggered, steps = stage_engine.arrive(llm, [(3 * number, *one) for number, one in enumerate(requests.items())])
    llm.reset_prefix_cache()
    cold = dict(
        zip(requests, stage_engine.ask(llm, list(requests.values())), strict=True)
    )  # one prefix is read by two in its first step
    for found in (alone, together, staggered, cold):
        assert not [case for case in requests if not stage_engine.same(found[case], answers[case])]
    assert any(
        max(step.values()) > 1 and min(step.values()) == 1 for step in steps
    )  # one was read while others were written


@pytest.mark.parametrize("name", list(SMALL))
def test_preempted_requests_answer_the_same_and_leave_nothing_behind(
    started: Any, checkpoints: dict[str, Path], name: str
) -> None:
    """Twenty requests at random times in a cache that holds two or three: what was written comes back as prompt and
    never ranks."""
    llm, draw = started("llava", name, enable_prefix_caching=False, max_num_seqs=6, **SMALL[name]), random.Random(0)
    answers, requests, scheduler = (
        wanted("llava", checkpoints["llava"])[name],
        requests_of("llava"),
        stage_engine.core(llm).scheduler,
    )
    free, preempted, stock = scheduler.kv_cache_manager.block_pool.get_num_free_blocks(), [], scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.num_output_tokens)
        return stock(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    drawn = [(draw.randrange(12), f"{number}:{draw.choice(list(requests))}") for number in range(20)]
    done, _ = stage_engine.arrive(llm, [(when, name, requests[name.split(":")[1]]) for when, name in drawn], LONGER)
    assert len(done) == 20
    assert not [case for case, found in done.items() if not stage_engine.same(found, answers[case.split(":")[1]])]
    assert any(preempted), "nobody was preempted with tokens written: make the cache smaller"
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert not any(manager.prompts for manager in scheduler.stage_managers)


@pytest.mark.parametrize("name", list(SMALL))
def test_forty_arrivals_with_aborts_in_a_small_cache(started: Any, name: str) -> None:
    """At random steps, eight of them given up while they wait, are read or are written: the others answer as one by
    one, and all blocks come back."""
    llm, draw, requests = (
        started("llava", name, max_num_seqs=6, enable_prefix_caching=False, **SMALL[name]),
        random.Random(1),
        requests_of("llava"),
    )
    scheduler = stage_engine.core(llm).scheduler
    pool = scheduler.kv_cache_manager.block_pool
    alone = {case: stage_engine.ask(llm, [request], LONGER)[0] for case, request in requests.items()}
    free = pool.get_num_free_blocks()
    drawn = [(draw.randrange(60), f"{number}:{draw.choice(list(requests))}") for number in range(40)]
    gone = {name: when + draw.randrange(1, 30) for when, name in draw.sample(drawn, 8)}
    done, _ = stage_engine.arrive(
        llm, [(when, name, requests[name.split(":")[1]]) for when, name in drawn], LONGER, gone
    )
    assert set(done) >= {name for _, name in drawn} - gone.keys() and len(done) < 40
    assert not [case for case, found in done.items() if not stage_engine.same(found, alone[case.split(":")[1]])]
    assert pool.get_num_free_blocks() == free and not any(manager.prompts for manager in scheduler.stage_managers)


def test_later_stages_own_fewer_blocks(started: Any) -> None:
    """Of 576 rows of an image 288 are left in layers 1 and 2, 144 in layer 3; vLLM alone would hold as many blocks in
    all four groups."""
    llm = started("llava", "pyramiddrop", enable_prefix_caching=False)
    scheduler = stage_engine.core(llm).scheduler
    held: list[list[int]] = []
    stock = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        out = stock(*args, **kwargs)
        held.append([sum(map(len, manager.req_to_blocks.values())) for manager in managers(llm)])
        return out

    scheduler.schedule = schedule
    stage_engine.ask(llm, [requests_of("llava")["one"]], new=2)
    rows = len(llm.get_tokenizer().encode("USER: \nhi ASSISTANT:")) + 1  # and what is written
    expected = [-(-(rows + visual) // 32) for visual in (576, 288, 288, 144)]
    assert sorted(held[0], reverse=True) == expected


def test_controls_that_must_differ(started: Any, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst rows kept, and the keys of a cached prefix left out of the softmax: each gives other answers, so the
    tests above would see it."""
    llm, answers, requests = (
        started("llava", "pyramiddrop"),
        wanted("llava", checkpoints["llava"])["pyramiddrop"],
        requests_of("llava"),
    )
    case = "system prompt"
    stage_engine.ask(llm, [requests[case]])
    cached = llm.generate([requests[case]], stage_engine.greedy(), use_tqdm=False)[0]
    first = cached.prompt_token_ids.index(stage_engine.core(llm).vllm_config.model_config.hf_config.image_token_index)
    assert cached.num_cached_tokens == first // 32 * 32 >= 64, "the prefix cache ends at the first image"
    assert stage_engine.same(engine.found(cached)[1:], answers[case])

    def worst(*args: Any, **kwargs: Any) -> Any:
        return -attention_scores(*args, **kwargs)

    def no_prefix(reducer: Any, query: Any, key: Any, scaling: float, tables: Any, prefix: Any = None) -> Any:
        return attention_scores(reducer, query, key, scaling, tables, None) * (prefix is not None)

    for other in (worst, no_prefix):
        monkeypatch.setattr("duet_vlm_vllm.stages.ranking.attention_scores", other)
        assert not stage_engine.same(stage_engine.ask(llm, [requests[case]])[0], answers[case])
    monkeypatch.undo()
    assert stage_engine.same(stage_engine.ask(llm, [requests[case]])[0], answers[case])


def test_what_was_written_before_a_preemption_never_ranks(
    started: Any, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a control: where it ranks, too, answers are others."""
    llm, answers, requests = (
        started("llava", "pyramiddrop", max_num_seqs=1),
        wanted("llava", checkpoints["llava"])["pyramiddrop"],
        requests_of("llava"),
    )
    for case in ("one", "system prompt", "two, text between", "text only"):
        assert stage_engine.same(stage_engine.preempted(llm, requests[case], after=8), answers[case])

    def all_that_is_read(runner: Any, name: str, length: int) -> StagedPrompt:
        request = runner.requests[name]
        if runner.input_batch.num_computed_tokens_cpu[0] <= len(SYSTEM):
            request.read = request.num_tokens
        return prompt_of(request.read, request.mm_features)

    monkeypatch.setattr(StagedRunner, "_prompt", all_that_is_read)
    assert stage_engine.same(stage_engine.ask(llm, [requests["one"]])[0], answers["one"])
    assert not stage_engine.same(stage_engine.preempted(llm, requests["one"], after=8), answers["one"])


def test_bfloat16_answers_nearly_as_float32(started: Any, checkpoints: dict[str, Path]) -> None:
    """First tokens and their log probabilities, as close as bfloat16 comes; the same alone and together."""
    llm = started("llava", "both stages", dtype="bfloat16")
    answers, requests = wanted("llava", checkpoints["llava"])["both stages"], requests_of("llava")
    alone = {case: stage_engine.ask(llm, [request], 1)[0] for case, request in requests.items()}
    together = dict(zip(requests, stage_engine.ask(llm, list(requests.values()), 1), strict=True))
    assert not [case for case in requests if not stage_engine.same(together[case], alone[case], 0.01)]
    assert sum(alone[case][0] == answers[case][0][:1] for case in requests) >= len(requests) - 1
    assert sum(abs(alone[case][1][0] - answers[case][1][0]) for case in requests) / len(requests) < 0.08


class Reads(TorchDispatchMode):
    """Notes operations of the library's whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            frames = [
                frame for frame in traceback.extract_stack()[:-1] if "/site-packages/torch/" not in frame.filename
            ]
            inside = [frame.name for frame in frames if "/duet_vlm" in frame.filename]
            if "/duet_vlm" in frames[-1].filename and "check_finite" not in inside:
                self.seen.append(f"{frames[-1].filename}:{frames[-1].lineno} {func._schema.name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["both stages", "dart", "v2drop", "compact"])
def test_the_host_waits_for_nothing_in_a_step(started: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the layers and where tables are made; several requests, one behind a cached prefix."""
    llm, requests = started("llava", name), list(requests_of("llava").values())
    stage_engine.ask(llm, [requests[2]])
    reads, calls = Reads(), []

    def watched(stock: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(stock.__name__)
            with reads:
                return stock(*args, **kwargs)

        return call

    monkeypatch.setattr(StagedPass, "__call__", watched(StagedPass.__call__))
    monkeypatch.setattr(attention, "stage_metadata", watched(attention.stage_metadata))
    stage_engine.ask(llm, requests)
    assert {"__call__", "stage_metadata"} <= set(calls) and not reads.seen
    seen = Reads()  # of a first stage, where one is allowed
    with seen:
        method = ServedMethod.of({"method": "divprune", "keep": 9}, "compact")
        reduce_rows(method, [torch.randn(40, 8)], [torch.zeros(40, dtype=torch.long)], [NOTHING_ASKED], None)
    assert seen.seen


def test_requests_that_cannot_be_served_are_errors_and_the_next_one_is_answered(
    started: Any, checkpoints: dict[str, Path]
) -> None:
    llm, answers, requests = (
        started("llava", "pyramiddrop"),
        wanted("llava", checkpoints["llava"])["pyramiddrop"],
        requests_of("llava"),
    )
    picture = prompts("llava")["one"][1]
    stage_engine.ask(llm, [requests["one"]])
    with pytest.raises(ValueError, match="the prompt ends in an image"):
        llm.generate([engine.request("USER: <image>", picture)], stage_engine.greedy(), use_tqdm=False)
    refused = stage_engine.greedy()
    refused.prompt_logprobs = 1
    with pytest.raises(VLLMValidationError, match="prompt_logprobs: visual tokens that leave"):
        llm.generate([requests["one"]], refused, use_tqdm=False)
    assert stage_engine.same(stage_engine.ask(llm, [requests["one"]])[0], answers["one"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"block_size": 16}, "prefix caching, as the keys of this KV cache cannot be read"),
        ({"worker_cls": "auto"}, "another worker: start with --worker-cls"),
        (
            {"scheduler_cls": None, "logits_processors": None},
            "another scheduler: start with .*requests that are not looked at",
        ),
        (
            {"enable_chunked_prefill": True, "max_num_batched_tokens": 64},
            "chunked prefill: start with .*a step that a whole prompt may not fit in",
        ),
    ],
)
def test_engines_that_would_answer_wrongly_are_refused_at_the_start(
    checkpoints: dict[str, Path], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        stage_engine.start(checkpoints["llava"], "llava", SETTINGS["llava"]["pyramiddrop"], **more)


@pytest.mark.parametrize(
    ("depth", "starts"),
    [(32, drops) for drops in ((16, 24), (8, 16, 24), (2,), (12,), (14,), (11, 22))]
    + [(28, (14, 21)), (36, (18, 27)), (40, (20, 30)), (6, (3, 5))],
)
def test_groups_are_counted_as_vllm_makes_them(depth: int, starts: tuple[int, ...]) -> None:
    from duet_vlm_vllm.stages.kv_cache import StageSpec

    stages, shape = (
        DecoderStages(depth, starts),
        {"block_size": 16, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16},
    )
    specs = {
        f"layer {layer}": StageSpec(**shape, stage=stages.of_layer(layer))
        if stages.of_layer(layer)
        else FullAttentionSpec(**shape)
        for layer in range(depth)
    }
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    size = max(len(group.layer_names) for group in groups)
    assert KVGroups.of(stages) == KVGroups(len(groups), size, len(groups) * size - depth)
