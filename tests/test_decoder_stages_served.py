"""Drops inside the decoder as a server counts them, without any server: stages, prompts, steps, groups of layers,
refusals."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import duet_vlm
from duet_vlm.planning.budget import SpanPlan, layer_counts
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.serve.decoder_stages import DecoderStages, check_decoder_method
from duet_vlm.serve.kv_groups import KVGroups, describe, describe_plan, describe_pool, nearest_good, prompts_held
from duet_vlm.serve.served_method import STAGE_FLAGS, ServedMethod, flags
from duet_vlm.serve.stage_choice import DropTables, attention_scores, rows_that_go_on
from duet_vlm.serve.staged_prompt import StagedPrompt
from duet_vlm.serve.staged_step import CutPromptError, StagedStep


def served(given: dict[str, Any], positions: str = "compact", depth: int = 32) -> ServedMethod:
    return ServedMethod.of({"stages": "all"} | given, positions, depth)


# ---- settings


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stages": "second"}, "stages='second': choose one of 'first', 'all'"),
        ({"method": "divprune", "keep": 9}, "divprune: it drops nothing inside the decoder"),
        ({"method": "none"}, "none: it drops nothing inside the decoder"),
        ({"method": "contrast+fastv", "budget": 64}, "contrast: it works inside the vision tower"),
        ({"method": "apet", "budget": 64}, "apet: it merges visual tokens inside the decoder"),
        ({"method": "sparsevlm", "budget": 64}, "sparsevlm: it merges"),
        ({"method": "pio", "budget": 64}, "pio: it needs gradient"),
        ({"method": "d2pruner", "budget": 64}, "d2pruner: it reads where tokens stood"),
        (
            {"method": "duet", "budget": 64, "options": {"multi_image": "per_image"}},
            "multi_image='per_image': a server ranks all images",
        ),
        (
            {"method": "duet", "budget": 64, "options": {"text_query": "raters"}},
            "text_query='raters'.*set 'all' or 'last'",
        ),
        ({"method": "duet", "budget": 64, "options": {"text_query": "salient"}}, "text_query='salient'"),
        ({"method": "duet", "budget": 64, "score_mask": "none"}, "score_mask='none'"),
        (
            {"method": "duet", "budget": 64, "options": {"trim_kv_cache": True}},
            "trim_kv_cache=True: each layer's cache",
        ),
        (
            {"method": "duet", "budget": 64, "options": {"positions": "keep"}},
            "vLLM gives this model 'compact' positions",
        ),
        ({"method": "duet", "dominant": 9, "options": {"cls_token": True}}, "cls_token=True"),
        ({"method": "duet", "dominant": 9, "schedule": [[0, 0.5]]}, "leave in front of decoder layer 0"),
        (
            {"method": "duet", "dominant": 9, "schedule": [[40, 0.5]]},
            "before layer 40, but this decoder has layers 0..31",
        ),
        ({"method": "pyramiddrop"}, "needs a budget"),
        ({"method": "duet", "dominant": 0}, "leave none of an image's 24576 visual tokens"),
        ({"method": "fastv", "budget": 0.01}, "fastv cannot reach"),
        ({"method": "fastv", "budget": 0.2, "typo": 1}, "typo"),
        ({"budget": 1.5}, "a float is a fraction"),
    ],
)
def test_methods_whose_drops_no_server_can_make_are_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        served(given)


def test_grids_keep_their_positions() -> None:
    fastv = {"method": "fastv", "budget": 0.2}
    with pytest.raises(ValueError, match="positions='compact': choose one of 'keep'"):
        served(fastv | {"options": {"positions": "compact"}}, "keep")
    both = [served(fastv | {"options": {"positions": one}}) for one in ("keep", "compact")]
    assert [one.decoder_reducer.options.positions for one in both if one.decoder_reducer] == ["keep", "compact"]


def test_without_the_depth_of_the_decoder_only_the_first_stage_can_be_served() -> None:
    with pytest.raises(ValueError, match="how many layers the decoder has is not known"):
        ServedMethod.of({"budget": 64, "stages": "all"}, "compact")
    assert len(ServedMethod.of({"budget": 64}, "compact").stages) == 1


SERVED = {
    "duet": {"method": "duet", "budget": 64},
    "duet, request's own": {"method": "duet", "dominant": 54, "contextual": 10, "schedule": [[16, 0.5], [24, 0.0]]},
    "duet_plus": {"method": "duet_plus", "budget": 0.22},
    "fastv": {"method": "fastv", "budget": 0.22},
    "pyramiddrop": {"method": "pyramiddrop", "schedule": [[8, 0.5], [16, 0.25], [24, 0.125]]},
    "dart": {"method": "dart", "budget": 0.3},
    "v2drop": {"method": "v2drop", "budget": 0.3},
    "visionzip+pyramiddrop": {"method": "visionzip+pyramiddrop", "budget": 0.15},
}


@pytest.mark.parametrize("name", list(SERVED))
@pytest.mark.parametrize("tokens", [24, 576, 1024])
def test_counts_are_those_of_attach(name: str, tokens: int) -> None:
    """Entry and counts of every layer are the method's own plan; requests that ask for less get theirs."""
    given = dict(SERVED[name])
    made = served(given)
    alone, budget = duet_vlm.make_method(str(given.pop("method"))), given.pop("budget", None)
    compact = {"options": {"positions": "compact"}} if isinstance(alone, duet_vlm.EncoderReducer) else {}
    alone = alone.with_settings(given | compact)
    for wanted in [budget] if budget is None else [budget, 0.05 if budget == 64 else 0.14]:
        request = made.asked({} if wanted == budget else {"duet_budget": wanted})
        plan = alone.plan(tokens, 32, wanted)
        stages = made.stages.counts(made.span((tokens,), requested=request))
        assert (
            tuple(stages[made.stages.of_layer(layer)] for layer in range(32)) == plan.counts and stages[0] == plan.entry
        )


def test_settings_of_both_stages_are_in_the_salt() -> None:
    others = [{"budget": 64}, {"budget": 65}, {"budget": 64, "options": {"text_query": "last"}}]
    others += [{"method": "fastv", "budget": 0.2}, {"method": "fastv", "budget": 0.3}]
    salts = {served(given).salt for given in others} | {served({"budget": 64}, depth=28).salt}
    salts.add(ServedMethod.of({"budget": 64}, "compact").salt)
    assert len(salts) == 7


LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"num_hidden_layers": 24}}


def test_flags_name_worker_scheduler_and_checks() -> None:
    found = flags(LLAVA, {"method": "duet", "budget": 64, "stages": "all"})
    assert (
        found[:2] == ["--hf-overrides.architectures+", "DuetLlavaForConditionalGeneration"]
        and tuple(found[-len(STAGE_FLAGS) :]) == STAGE_FLAGS
    )
    assert ("--hf-overrides.duet.stages", "all") in zip(found, found[1:], strict=False)
    assert not set(STAGE_FLAGS) & set(flags(LLAVA, {"method": "duet", "budget": 64}))
    with pytest.raises(ValueError, match="before layer 30, but this decoder has layers 0..23"):
        flags(LLAVA, {"method": "pyramiddrop", "schedule": [[30, 0.5]], "stages": "all"})


# ---- stages


def test_stages_are_runs_of_layers_that_read_the_same_rows() -> None:
    plans = [
        SpanPlan(n, n, 0, layer_counts(n, 12, schedule))
        for n in (40, 3)
        for schedule in (((4, 0.5), (9, 0)), ((4, 0.25),))
    ]
    stages = DecoderStages.of(plans, 12)
    assert (stages.starts, stages.sizes, len(stages)) == ((4, 9), (4, 5, 3), 3)
    assert [stages.of_layer(layer) for layer in range(12)] == [0] * 4 + [1] * 5 + [2] * 3
    assert [stages.counts(plan) for plan in plans] == [(40, 20, 0), (40, 10, 10), (3, 1, 0), (3, 0, 0)]
    with pytest.raises(
        ValueError, match="40 visual tokens would drop before decoder layer 5, and this server drops before 4, 9"
    ):
        stages.counts(SpanPlan(40, 40, 0, layer_counts(40, 12, ((5, 0.5),))))


@pytest.mark.parametrize("starts", [(0,), (12,), (4, 4), (5, 4)])
def test_stages_that_have_no_layers_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="strictly increasing layers from 1 to 11"):
        DecoderStages(12, starts)


# ---- prompts


@pytest.mark.parametrize(
    ("length", "spans", "counts", "says"),
    [
        (20, [(3, 8), (7, 9)], [(5, 1), (2, 1)], "runs of visual rows that follow each other"),
        (20, [(3, 3)], [(0, 0)], "runs of visual rows"),
        (20, [(-1, 3)], [(4, 1)], "runs of visual rows"),
        (20, [(15, 21)], [(6, 1)], "in a prompt of 20 tokens"),
        (20, [(3, 8)], [(6, 1)], "shows 5 visual rows, and 6 were planned"),
        (20, [(3, 8)], [], "shows 5 visual rows, and 0 were planned"),
    ],
)
def test_prompts_that_disagree_with_their_plan_are_errors(length: int, spans: Any, counts: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StagedPrompt.of(length, spans, counts)


def test_a_prompt_needs_text_behind_its_last_image_and_a_step_that_holds_it() -> None:
    prompt = StagedPrompt.of(20, [(12, 16), (2, 7)], [(5, 3, 0), (4, 2, 1)])
    assert (prompt.spans, prompt.counts, prompt.first_visual, prompt.last_end) == (((2, 7), (12, 16)), (9, 5, 1), 2, 16)
    assert [prompt.dropped(stage) for stage in range(3)] == [0, 4, 8]
    prompt.check(20)
    with pytest.raises(ValueError, match="has 20 tokens, and one with images is read in one step of at most 19"):
        prompt.check(19)
    with pytest.raises(ValueError, match="ends in an image"):
        StagedPrompt.of(16, [(12, 16), (2, 7)], [(5, 3, 0), (4, 2, 1)]).check(99)
    text = StagedPrompt.of(9, [], [])
    text.check(2)
    assert (text.first_visual, text.last_end, text.dropped(2)) == (9, 0, 0)


# ---- steps, against a server that keeps lists

BLOCK = 4


@dataclass
class SlowRequest:
    """A request as lists of rows: what it is made of, and what each stage's cache holds. A row is (number in the prompt
    or behind, kind)."""

    prompt: StagedPrompt
    rows: list[tuple[int, str]]
    caches: list[list[tuple[int, str]]]
    blocks: list[list[int]] = field(default_factory=list)
    computed: int = 0


def slow_request(draw: random.Random, stages: int, blocks: list[int]) -> SlowRequest:
    rows: list[tuple[int, str]] = []
    spans, counts = [], []
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        rows += [(len(rows) + i, "text") for i in range(draw.randint(0, 6))]
        size, first, planned = draw.randint(1, 12), len(rows), []
        for _ in range(stages):
            planned.append(draw.randint(0, planned[-1]) if planned else size)
        rows += [(first + i, "visual") for i in range(size)]
        spans, counts = [*spans, (first, first + size)], [*counts, planned]
        if size > 4 and draw.random() < 0.5:  # a mark between the rows of one image
            middle = first + size // 2
            rows[middle] = (middle, "text")
            spans[-1:] = [(first, middle), (middle + 1, first + size)]
            counts[-1] = [min(n, size - 1) for n in planned]
    rows += [(len(rows) + i, "question") for i in range(draw.randint(1, 7))]
    if not spans:
        rows = [(number, "text") for number, _ in rows]
    held = [[blocks.pop() for _ in range(40)] for _ in range(stages)]
    return SlowRequest(StagedPrompt.of(len(rows), spans, counts), rows, [[] for _ in range(stages)], held)


def slow_step(draw: random.Random, requests: list[SlowRequest], scheduled: list[int]) -> list[dict[str, list[Any]]]:
    """Runs the step on lists; per stage its flat batch: rows with their request, places in the cache, slots, and
    lengths of all caches."""
    out: list[dict[str, list[Any]]] = [
        {"rows": [], "place": [], "slot": [], "length": [], "count": []} for _ in requests[0].caches
    ]
    for number, (request, count) in enumerate(zip(requests, scheduled, strict=True)):
        new = request.rows[request.computed : request.computed + count]
        for stage, table in enumerate(out):
            visual = [row for row in new if row[1] == "visual"]
            leaving = len(visual) - request.prompt.counts[stage] if visual else 0
            gone = set(draw.sample(visual, leaving))
            new = [row for row in new if row not in gone]
            for row in new:
                place = len(request.caches[stage])
                request.caches[stage].append(row)
                table["rows"].append((number, row))
                table["place"].append(place)
                table["slot"].append(request.blocks[stage][place // BLOCK] * BLOCK + place % BLOCK)
            table["length"].append(len(request.caches[stage]))
            table["count"].append(len(new))
        request.computed += count
    return out


@pytest.mark.parametrize("seed", range(40))
def test_steps_are_those_of_a_server_that_keeps_lists(seed: int) -> None:
    """Prefills, cached prefixes, decodes and preempted requests in any mixture: rows, starts, lengths, slots, who drops
    and who asks."""
    draw = random.Random(seed)
    depth = draw.choice([4, 9])
    stages = DecoderStages(depth, tuple(sorted(draw.sample(range(1, depth), draw.randint(0, 3)))))
    blocks = list(range(1000))
    draw.shuffle(blocks)
    requests = [slow_request(draw, len(stages), blocks) for _ in range(draw.randint(1, 6))]
    for _ in range(8):
        active = draw.sample(requests, draw.randint(1, len(requests)))
        scheduled = []
        for one in active:
            if one.computed and draw.random() < 0.2:  # preempted: all that was generated comes back as prompt
                one.computed, one.caches = 0, [[] for _ in one.caches]
            if not one.computed and (
                prefix := draw.choice([0, 0, min(one.prompt.first_visual, len(one.rows) - 1) // BLOCK * BLOCK])
            ):
                one.computed, one.caches = prefix, [list(one.rows[:prefix]) for _ in one.caches]
            if one.computed >= one.prompt.length or len(one.rows) > one.prompt.length:
                one.rows += [(len(one.rows), "generated")] if one.computed == len(one.rows) else []
            scheduled.append(len(one.rows) - one.computed)
        step = StagedStep(stages, [one.prompt for one in active], [one.computed for one in active], scheduled)
        begun = [one.computed for one in active]
        tables = slow_step(draw, active, scheduled)
        for stage, table in enumerate(tables):
            assert step.num_rows[stage].tolist() == table["count"] and step.seq_lens(stage).tolist() == table["length"]
            assert step.query_starts(stage).tolist() == [sum(table["count"][:i]) for i in range(len(active) + 1)]
            assert step.rows(stage).tolist() == table["place"] and step.requests(stage).tolist() == [
                number for number, _ in table["rows"]
            ]
            held = torch.tensor([one.blocks[stage] for one in active], dtype=torch.int32)
            assert step.slots(stage, held, BLOCK).tolist() == table["slot"]
        kinds = [(number, row[1]) for number, row in tables[0]["rows"]]
        shown = {number for number, kind in kinds if kind == "visual"}
        assert step.dropping.tolist() == [number in shown for number in range(len(active))]
        assert step.visual_rows.tolist() == [kind == "visual" for _, kind in kinds]
        asks = [number in shown and kind == "question" for number, kind in kinds]
        assert step.query_rows("all").tolist() == asks
        last = [
            ask and row[0] == active[number].prompt.length - 1
            for ask, (number, row) in zip(asks, tables[0]["rows"], strict=True)
        ]
        assert step.query_rows("last").tolist() == last
        assert step.visual == any(one.prompt.spans for one in active) and begun == step.computed.tolist()
        for stage in range(1, len(stages)):
            _check_drop(step, stage, tables[stage - 1]["rows"], active, shown)


def _check_drop(step: StagedStep, stage: int, before: list[Any], active: list[SlowRequest], shown: set[int]) -> None:
    losing = [n for n in sorted(shown) if active[n].prompt.counts[stage] < active[n].prompt.counts[stage - 1]]
    drop = step.drop(stage, "all")
    if drop is None:
        assert not losing
        return
    assert drop.requests.tolist() == losing
    for i, number in enumerate(losing):
        flat = [place for place, (owner, _) in enumerate(before) if owner == number]
        assert drop.rows[i][drop.valid[i]].tolist() == flat and drop.valid[i].tolist() == sorted(
            drop.valid[i], reverse=True
        )
        assert drop.counts[i] == (
            sum(before[place][1][1] == "visual" for place in flat),
            active[number].prompt.counts[stage],
        )
        assert drop.num_queries[i] == sum(before[place][1][1] == "question" for place in flat)
    single = step.drop(stage, "last")
    assert single is not None and set(single.num_queries) == {1}


@pytest.mark.parametrize(("computed", "scheduled"), [(0, 19), (0, 5), (3, 17), (8, 12), (19, 1), (2, 17)])
def test_a_prompt_with_images_that_is_cut_is_an_error(computed: int, scheduled: int) -> None:
    """Of 20 rows, 2 to 6 visual; other requests of the step are text."""
    prompt, text = StagedPrompt.of(20, [(2, 7)], [(5, 3)]), StagedPrompt(30)
    says = f"request 1 of the step has a prompt of 20 tokens with images from 2 on, and is read from {computed} to"
    with pytest.raises(CutPromptError, match=says):
        StagedStep(DecoderStages(4, (2,)), [text, prompt], [4, computed], [9, scheduled])


@pytest.mark.parametrize(
    ("computed", "scheduled", "drops"), [(0, 20, True), (2, 18, True), (1, 23, True), (20, 1, False), (24, 1, False)]
)
def test_a_prompt_that_is_whole_or_behind_is_none(computed: int, scheduled: int, drops: bool) -> None:
    step = StagedStep(DecoderStages(4, (2,)), [StagedPrompt.of(20, [(2, 7)], [(5, 3)])], [computed], [scheduled])
    assert step.dropping.tolist() == [drops] and step.seq_lens(1).tolist() == [computed + scheduled - 2]
    assert step.first_rows.tolist() == [[computed], [computed - 2 * (not drops)]] and np.issubdtype(
        step.num_rows.dtype, np.integer
    )


# ---- choice, against one request and one query at a time


def slow_scores(query: torch.Tensor, key: torch.Tensor, asks: list[int], before: int) -> torch.Tensor:
    """Attention that rows ``asks`` of one request pay to its rows: query [H, L, d], key [Hkv, before + L, d] -> [L], a
    softmax at a time."""
    heads, shared = query.shape[0], query.shape[0] // key.shape[0]
    total = torch.zeros(key.shape[1], dtype=torch.float64)
    for row in asks:
        for head in range(heads):
            seen = key[head // shared, : before + row + 1].double()
            weights = (seen @ query[head, row].double() / query.shape[2] ** 0.5).softmax(0)
            total[: len(weights)] += weights / heads / len(asks)
    return total[before:]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("text_query", ["all", "last"])
def test_rows_that_go_on_are_those_that_text_looks_at_most(seed: int, text_query: str) -> None:
    """Requests of unequal length, one with keys of a cached prefix, one that is only written, two drops one after the
    other."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = [
        StagedPrompt.of(40, [(9, 21), (23, 30)], [(12, 7, draw.randint(0, 7)), (7, 3, 3)]),
        StagedPrompt(11),
        StagedPrompt.of(25, [(2, 20)], [(18, 18, draw.randint(0, 9))]),
        StagedPrompt.of(31, [(8, 20)], [(12, 5, 0)]),
        StagedPrompt.of(22, [(3, 9)], [(6, 4, 1)]),
    ]
    computed, scheduled = [0, 10, 0, 8, 30], [40, 1, 27, 23, 1]  # the third was preempted with two tokens written
    step = StagedStep(DecoderStages(6, (2, 4)), prompts, computed, scheduled)
    reducer = duet_vlm.get_method("pyramiddrop")(schedule=((2, 0.5),), options=TokenOptions(text_query=text_query))
    current = torch.arange(sum(scheduled))
    for stage in (1, 2):
        query, key = (torch.randn(len(current), heads, 8, generator=generator) for heads in (4, 2))
        cached = {3: torch.randn(2, 8, 8, generator=generator)}
        tables = DropTables.of(step, stage, text_query, current)
        assert tables is not None
        losing = step.drop(stage, text_query)
        assert losing is not None
        prefix = torch.zeros(len(losing.requests), 2, 8, 8), torch.zeros(len(losing.requests), 8, dtype=torch.bool)
        for number, request in enumerate(losing.requests.tolist()):
            if request in cached:
                prefix[0][number], prefix[1][number] = cached[request], True
        batch = [x[tables.rows].transpose(1, 2) for x in (query, key)]
        scores = attention_scores(reducer, *batch, 8**-0.5, tables, prefix)
        total = len(current), int(step.num_rows[stage].sum())
        stay = rows_that_go_on(reducer, tables, {"scores": scores}, total, lambda rows: rows)
        expected = []
        starts = step.query_starts(stage - 1)
        for request, prompt in enumerate(prompts):
            own = list(range(starts[request], starts[request + 1]))
            places = [int(current[row]) - sum(scheduled[:request]) + computed[request] for row in own]
            visual = [i for i, place in enumerate(places) if any(a <= place < b for a, b in prompt.spans)]
            if request not in losing.requests:
                expected += own
                continue
            asks = [i for i, place in enumerate(places) if prompt.last_end <= place < prompt.length]
            before = torch.cat([cached.get(request, torch.zeros(2, 0, 8)), key[own].transpose(0, 1)], 1)
            asks = asks if text_query == "all" else asks[-1:]
            found = slow_scores(query[own].transpose(0, 1), before, asks, before.shape[1] - len(own))
            best = sorted(visual, key=lambda i: -float(found[i]))[: prompt.counts[stage]]
            expected += [row for i, row in enumerate(own) if i not in visual or i in best]
        assert stay.tolist() == expected
        current = current[stay]


def test_a_method_that_returns_rows_instead_of_a_mask_is_an_error() -> None:
    step = StagedStep(DecoderStages(4, (2,)), [StagedPrompt.of(9, [(2, 7)], [(5, 3)])], [0], [9])
    tables = DropTables.of(step, 1, "all", torch.arange(9))
    assert tables is not None

    class Merging(duet_vlm.get_method("pyramiddrop")):  # type: ignore[misc]
        def prune_tokens(self, view: Any) -> Any:
            return Selection(*[torch.zeros(1, 3, dtype=torch.long)] * 2, torch.zeros(1, 0), torch.zeros(1, 0))

    with pytest.raises(ValueError, match="pyramiddrop: prune_tokens returned a selection"):
        rows_that_go_on(Merging(schedule=((2, 0.5),)), tables, {"scores": torch.rand(1, 9)}, (9, 7), lambda rows: rows)


# ---- groups of the KV cache


@pytest.mark.parametrize(
    ("depth", "starts", "groups"),
    [  # (groups, layers of each, padding layers), as vLLM 0.32 makes them
        (32, (16, 24), (4, 8, 0)),
        (32, (8, 16, 24), (4, 8, 0)),
        (32, (2,), (16, 2, 0)),
        (32, (12,), (3, 12, 4)),
        (32, (14,), (2, 18, 4)),
        (28, (14, 21), (4, 7, 0)),
        (36, (18, 27), (4, 9, 0)),
        (40, (20, 30), (4, 10, 0)),
        (6, (3, 5), (6, 1, 0)),
        (32, (), (1, 32, 0)),
    ],
)
def test_groups_are_those_of_vllm(depth: int, starts: tuple[int, ...], groups: tuple[int, int, int]) -> None:
    made = KVGroups.of(DecoderStages(depth, starts))
    assert (made.count, made.layers, made.padding) == groups and made.good == (groups[2] == 0 and groups[0] <= 8)


@pytest.mark.parametrize(
    ("depth", "starts", "better"),
    [
        (32, (16, 24), (16, 24)),
        (32, (2,), (4,)),
        (32, (12,), (16,)),
        (32, (3, 20), (4, 20)),
        (12, (1, 2), (2, 4)),
        (28, (13, 20), (14, 21)),
        (31, (4,), None),
        (40, (21,), (20,)),
    ],
)
def test_the_nearest_schedule_that_wastes_no_memory(
    depth: int, starts: tuple[int, ...], better: tuple[int, ...] | None
) -> None:
    found = nearest_good(DecoderStages(depth, starts))
    assert (None if found is None else found.starts) == better
    assert found is None or KVGroups.of(found).good


def test_the_nearest_schedule_against_a_search_through_all() -> None:
    for depth in (12, 18, 28):
        for first in range(1, depth - 1):
            for second in range(first + 1, depth):
                every = [DecoderStages(depth, (a, b)) for a in range(1, depth - 1) for b in range(a + 1, depth)]
                good = [one for one in every if KVGroups.of(one).good]
                found = nearest_good(DecoderStages(depth, (first, second)))
                moved = [abs(one.starts[0] - first) + abs(one.starts[1] - second) for one in good]
                assert found is not None
                assert abs(found.starts[0] - first) + abs(found.starts[1] - second) == min(moved), (
                    depth,
                    first,
                    second,
                    found,
                )


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        ((16, 24), "rows leave before decoder layers 16, 24 of 32; 4 KV-cache groups of 8 layers"),
        (
            (14,),
            "rows leave before decoder layers 14 of 32; 2 KV-cache groups of 18 layers, 4 of them padding that holds memory for nobody; drops "
            "before 16 would waste nothing",
        ),
    ],
)
def test_what_is_told_at_the_start(starts: tuple[int, ...], told: str) -> None:
    assert describe(DecoderStages(32, starts)) == told


def test_a_pool_holds_as_many_prompts_as_a_slow_count_of_its_blocks() -> None:
    """12 layers in 4 groups of 3; a row takes one place in each of them, and one in all 12 layers without drops."""
    plan = SpanPlan(512, 100, 0, layer_counts(100, 12, ((6, 0.5), (9, 0))))
    stages = DecoderStages.of([plan], 12)
    rows_of_groups = [64 + count for count in (100, 100, 50, 0)]
    inside = 1000 / sum(math.ceil(rows / 16) for rows in rows_of_groups)
    without = (1000 * 3 / 12) / math.ceil(164 / 16)
    assert prompts_held(stages, plan, 1000, 16) == pytest.approx((inside, without))
    told = describe_pool(stages, plan, 1000, 16)
    assert (
        f"holds {inside:.1f} prompts of 64 rows of text and an image of 512 visual tokens, and would hold {without:.1f} if the 100"
        in told
    )
    assert (
        describe_plan(stages, plan)
        == "an image of 512 visual tokens: 100 enter, 50 from layer 6 on, 0 from layer 9 on; a mean of 62.5 over the layers"
    )


def test_the_image_that_is_told_about_is_one_that_can_be_reduced() -> None:
    assert served({"budget": 64}).example(576).tokens == 512
    assert served({"budget": 0.0005}).example(576).tokens == 1024


PYRAMID = duet_vlm.get_method("pyramiddrop")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"score_layer_offset": 2}, "it ranks 2 layers before a drop"),
        ({"extra_stages": lambda self, depth: frozenset({3})}, "it looks at rows in layers that drop none"),
        ({"calibration": lambda self: object()}, "it is calibrated for one model"),
        (
            {"scoring_rules": lambda self: ScoringRules(score_positions="divided")},
            "score_positions='divided': attention divided",
        ),
        (
            {"requires": frozenset({duet_vlm.Input.VISUAL_SELF_ATTENTION})},
            "it needs visual_self_attention, and a server makes only",
        ),
    ],
)
def test_methods_of_users_are_refused_by_what_they_declare(facts: dict[str, Any], says: str) -> None:
    check_decoder_method(PYRAMID(schedule=((2, 0.5),)))
    with pytest.raises(ValueError, match=says):
        check_decoder_method(type("Mine", (PYRAMID,), facts)(schedule=((2, 0.5),)))
