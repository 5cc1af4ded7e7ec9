"""Stages inside the decoder beyond dropping by attention: merging, trimmed caches, raters, heads; each against
something slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, TEXT, THREE, TWO, Row, forward, generate, shared
from reference_forward import choices_of, step_logits, walk_batch
from torch import Tensor
from transformers import DynamicCache

import duet_vlm
from duet_vlm import DecoderReducer, DecoderView, Selection, SpanPlan
from duet_vlm.methods.decoder.sparsevlm import SparseVLM
from duet_vlm.methods.decoder.v2drop import V2Drop
from duet_vlm.ops.information import information
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.score import query_attention
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import layer_counts
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.scoring import ScoringRules

CLOSE = {"rtol": 1e-3, "atol": 2e-4}
RAGGED: tuple[Row, ...] = (ONE, THREE, TEXT, TWO)
SCHEDULE = ((3, 0.6), (5, 0.25))


def equals_oracle(family: str, rows: tuple[Row, ...], method: Any, **settings: Any) -> Any:
    """Greedy answers equal those of the full sequence with the same decisions, written without cache and hooks; the
    handle's report."""
    inputs, model = FAMILIES[family].inputs(rows), shared(family)
    with duet_vlm.attach(model, method, **settings) as handle:
        written = generate(model, inputs, 5)
        choices, report = choices_of(handle), handle.report()
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    walks = walk_batch(shared(family, "eager"), inputs, choices, generated)
    for step, expected in enumerate(step_logits(walks, choices, generated.shape[1])):
        torch.testing.assert_close(written.logits[step], expected, **CLOSE)
    return choices, report


# ---- caches that are cut


@pytest.mark.parametrize("rows", [(ONE,), RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize(
    ("family", "positions"),
    [("llava", "keep"), ("llava", "compact"), ("qwen2_5_vl", "keep"), ("gemma3", "keep"), ("qwen3_5", "keep")],
)
def test_a_cut_cache_answers_as_if_earlier_layers_had_never_held_the_rest(
    family: str, positions: str, rows: tuple[Row, ...]
) -> None:
    choices, report = equals_oracle(
        family,
        rows,
        "duet",
        dominant=0.6,
        contextual=0.2,
        schedule=SCHEDULE,
        options=TokenOptions(trim_kv_cache=True, positions=positions),
    )
    assert all(choice.cut for choice in choices)
    assert report.observed.kv_bytes == report.predicted.kv_bytes
    _, full = equals_oracle(
        family, rows, "duet", dominant=0.6, contextual=0.2, schedule=SCHEDULE, options=TokenOptions(positions=positions)
    )
    assert report.observed.kv_bytes < full.observed.kv_bytes and report.observed.flops == full.observed.flops


def test_beams_follow_a_cut_cache() -> None:
    inputs, model = FAMILIES["llava"].inputs(RAGGED), shared("llava")
    with duet_vlm.attach(model, "fastv", layers=3, keep=0.4, options=TokenOptions(trim_kv_cache=True)) as handle:
        written = generate(model, inputs, 4, num_beams=3, output_scores=True)
        choices = choices_of(handle)
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    own = choices[:: len(choices) // len(generated)]
    walks = walk_batch(shared("llava", "eager"), inputs, own, generated)
    for step, expected in enumerate(step_logits(walks, own, generated.shape[1])):
        torch.testing.assert_close(written.logits[step][written.beam_indices[:, step]], expected, **CLOSE)


def test_a_cut_cache_needs_a_cache_to_cut() -> None:
    inputs, model = FAMILIES["llava"].inputs([ONE]), shared("llava")
    with duet_vlm.attach(model, "fastv", layers=3, keep=0.4, options=TokenOptions(trim_kv_cache=True)):
        with pytest.raises(
            ValueError, match="trim_kv_cache=True takes rows out of a cache, and use_cache=False has none"
        ):
            generate(model, inputs, 3, use_cache=False)
        assert forward(model, inputs, use_cache=False).logits.isfinite().all()  # a single pass writes nothing


def test_a_cache_that_holds_something_else_is_not_cut() -> None:
    inputs, model = FAMILIES["llava"].inputs([ONE]), shared("llava")

    class Short(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            found = super().update(*args, **kwargs)
            for layer in self.layers:
                layer.keys = layer.keys[:, :, -4:] if layer.keys is not None else None
            return found

    with duet_vlm.attach(model, "fastv", layers=3, keep=0.4, options=TokenOptions(trim_kv_cache=True)):
        with pytest.raises(ValueError, match="trim_kv_cache=True needs a cache that holds keys and values as they are"):
            forward(model, inputs, past_key_values=Short(config=model.model.language_model.config), use_cache=True)
    with pytest.raises(TypeError, match="trim_kv_cache='half': give True or False"):
        V2Drop(options=TokenOptions(trim_kv_cache="half"))


# ---- merging


@dataclass(frozen=True)
class Halves(DecoderReducer):
    """Every other token stays, and takes half of the next one; in reverse order, so that renumbered rows are seen to
    follow it."""

    name, paper, summary = "halves", "-", "-"
    merges = True

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, ((3, (tokens + 1) // 2),)))

    def prune_tokens(self, view: DecoderView) -> Selection:
        place = view.valid.cumsum(1) - 1
        index, valid = pack_right(view.valid & (place % 2 == 0), max(stay for _, stay in view.host_counts))
        tokens = torch.arange(place.shape[1]).expand_as(place)
        row = torch.where(view.valid, place // 2, -1)
        weights = torch.where(place % 2 == 0, 1.0, 0.5)
        alone = view.valid & (place == view.valid.sum(1, keepdim=True) - 1) & (place % 2 == 0)
        return Selection(index, valid, tokens, row.masked_fill(alone, -1), weights=weights)


@pytest.mark.parametrize("share", ["joint", "per_image"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5", "video_llava"])
def test_weighed_merges_inside_the_decoder_equal_the_oracle(family: str, share: str) -> None:
    choices, _ = equals_oracle(family, RAGGED, Halves(options=TokenOptions(multi_image=share)))
    assert any(choice.merged.get(3) for choice in choices)


@pytest.mark.parametrize("share", ["joint", "per_image"])
def test_merges_inside_the_decoder_without_a_cache_are_replayed(share: str) -> None:
    inputs, model = FAMILIES["llava"].inputs(RAGGED), shared("llava")
    with duet_vlm.attach(model, Halves(options=TokenOptions(multi_image=share))):
        cached = generate(model, inputs, 5)
        uncached = generate(model, inputs, 5, use_cache=False)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_with_share_each_nobody_joins_another_image() -> None:
    inputs, model = FAMILIES["llava"].inputs([THREE, TWO]), shared("llava")
    with duet_vlm.attach(
        model, "tokencarve", schedule=((3, 0.5),), options=TokenOptions(trim_kv_cache=False, multi_image="per_image")
    ) as handle:
        forward(model, inputs)
        each = handle.trace
        for sample in (0, 1):
            for span in each[sample]:
                last = span.stages[-1]
                members = [m for joined in last.merged.values() for m in joined]
                assert sorted([*last.kept, *last.dropped, *members]) == list(range(span.span.tokens))
                assert len(last.kept) == span.span.tokens // 2


def test_gradients_flow_through_merged_rows_with_and_without_checkpointing() -> None:
    from families import build

    inputs = FAMILIES["llava"].inputs([ONE])
    found = []
    for checkpointing in (False, True):
        model = build("llava", "sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with duet_vlm.attach(model, Halves()):
            forward_with_grad = model(**inputs, labels=inputs["input_ids"].clone())
            forward_with_grad.loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("vision_tower" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Wrong(Halves):
    """Returns what it must not."""

    how: str = "count"

    def prune_tokens(self, view: DecoderView) -> Any:
        made = super().prune_tokens(view)
        if self.how == "count":
            return Selection(made.index, made.valid & False, made.source_tokens, made.target_row, weights=made.weights)
        if self.how == "twice":
            return Selection(
                made.index * 0 + made.index[:, :1], made.valid, made.source_tokens[:, :0], made.target_row[:, :0]
            )
        return Selection(
            made.index, made.valid, made.source_tokens, made.target_row, weights=made.weights * float("nan")
        )


@dataclass(frozen=True)
class Silent(Halves):
    merges = False


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Wrong(how="count"), "halves"),
        (Wrong(how="twice"), "halves"),
        (Wrong(how="nan"), "halves"),
        (Silent(), "halves.prune_tokens returned a Selection: a method that merges inside the decoder says so"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(method: DecoderReducer, says: str) -> None:
    inputs, model = FAMILIES["llava"].inputs([ONE]), shared("llava")
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, method) as handle:
        with pytest.raises(ValueError, match=says):
            forward(model, inputs)
        with handle.paused():
            assert torch.equal(forward(model, inputs).logits, plain)
    assert torch.equal(forward(model, inputs).logits, plain)


def test_an_unknown_input_is_named() -> None:
    cls = type("Curious", (Halves,), {"requires": frozenset({Input.HIDDEN_STATES, "weather"}), "name": "curious"})
    with pytest.raises(
        ValueError, match=r"Curious.requires names 'weather': choose from .*Input.GRADIENT.*, Input.SCORES"
    ):
        cls()
    early = type("Early", (Halves,), {"requires": frozenset({Input.FEATURES}), "name": "early"})
    with pytest.raises(ValueError, match=r"Early.requires names features: choose from"):
        early()


def test_an_input_that_was_not_declared_is_named() -> None:
    @dataclass(frozen=True)
    class Careless(Halves):
        name = "careless"

        def prune_tokens(self, view: DecoderView) -> Any:
            return top(view.require(Input.SCORES), view.valid, view.num_keep)

    with (
        pytest.raises(ValueError, match=r"careless: DecoderView.scores is not there: declare Input.SCORES in requires"),
        duet_vlm.attach(shared("llava"), Careless()),
    ):
        forward(shared("llava"), FAMILIES["llava"].inputs([ONE]))


# ---- what is shown


@dataclass(frozen=True)
class Seen(DecoderReducer):
    """Keeps what it is shown."""

    name, paper, summary = "seen", "-", "-"
    requires = frozenset(
        {
            Input.SCORES,
            Input.HIDDEN_STATES,
            Input.PREVIOUS_HIDDEN_STATES,
            Input.TEXT_HIDDEN_STATES,
            Input.DECODER_KEYS,
            Input.POSITIONS,
        }
        | {Input.VISUAL_SELF_ATTENTION}
    )

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, ((4, tokens // 2),)))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        VIEWS.append(view)
        assert view.scores is not None
        return top(view.scores if view.scores.ndim == 2 else view.scores.sum(-1), view.valid, view.num_keep)


VIEWS: list[DecoderView] = []


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_and_texts_are_those_that_the_layers_read(family: str) -> None:
    inputs, model = FAMILIES[family].inputs([ONE]), shared(family)
    read: dict[int, Tensor] = {}
    with duet_vlm.attach(model, Seen()) as handle:
        hooks = [
            layer.register_forward_hook(lambda m, a, o, i=i: read.__setitem__(i, o[0] if isinstance(o, tuple) else o))
            for i, layer in enumerate(handle.adapter.layers)
        ]
        VIEWS.clear()
        forward(model, inputs)
        for hook in hooks:
            hook.remove()
    (view,) = VIEWS
    visual = handle._prompt_state.prompt.visual[0]
    assert view.host_counts == ((int(visual.sum()), int(visual.sum()) // 2),)
    assert torch.equal(view.hidden_states[0], read[3][0][visual]) and torch.equal(
        view.previous_hidden_states[0], read[2][0][visual]
    )
    after = torch.arange(len(visual)) > visual.nonzero().max()
    assert torch.equal(view.text_hidden_states[0], read[3][0][after]) and view.text_valid.all()
    assert (
        view.positions[0].tolist() == visual.nonzero().flatten().tolist()
        and view.text_positions[0].tolist() == after.nonzero().flatten().tolist()
    )


@pytest.mark.parametrize("heads", ["mean", "max", "most", "each"])
def test_heads_are_put_together_as_asked(heads: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 300, 8), torch.randn(2, 2, 40, 8)
    allowed, weight = torch.rand(2, 300, 40) > 0.3, (torch.rand(2, 300) > 0.2).float()
    allowed[..., 0] = True
    ours = query_attention(query, key, 0.3, allowed, weight, heads=heads)
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.3
    maps = logits.masked_fill(~allowed[:, None], -1e30).softmax(-1)
    asked = weight / weight.sum(1, keepdim=True)
    slow = {
        "mean": torch.einsum("bhqk,bq->bk", maps, asked) / 4,
        "max": torch.einsum("bqk,bq->bk", maps.amax(1), asked),
        "most": maps.masked_fill(weight[:, None, :, None] == 0, 0).amax((1, 2)),
        "each": torch.einsum("bhqk,bq->bkh", maps, asked),
    }[heads]
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        query_attention(query, key, 0.3, lambda block: allowed[:, block], weight, heads=heads), ours
    )


def test_raters_are_the_text_that_pictures_resemble_more_than_the_mean() -> None:
    inputs, model = FAMILIES["llava"].inputs(RAGGED), shared("llava")
    caught: list[Tensor] = []
    first = model.model.language_model.layers[0]
    hook = first.register_forward_pre_hook(
        lambda m, a, k: caught.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with duet_vlm.attach(model, Seen(options=TokenOptions(text_query="raters"))) as handle:
        VIEWS.clear()
        forward(model, inputs)
    hook.remove()
    (view,), prompt = VIEWS, handle._prompt_state.prompt
    for sample in range(len(RAGGED)):
        visual, real = prompt.visual[sample], prompt.valid[sample]
        if not visual.any():
            continue
        after = real & (torch.arange(len(real)) > visual.nonzero().max())
        text = caught[0][sample][after].double()
        share = torch.stack([(text @ row).softmax(0) for row in caught[0][sample][visual].double()]).mean(0)
        ours = view.text_valid[sample][: len(share)]
        assert ours.tolist() == (share > share.mean()).tolist() and 0 < int(ours.sum()) < len(share)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_divided_by_positions_is_that_over_rotated_ones(family: str) -> None:
    inputs, model = FAMILIES[family].inputs([ONE]), shared(family)
    views = []
    for positions in ("as_is", "divided"):
        rules = ScoringRules(score_heads="each", score_positions=positions)
        cls = type("Each", (Seen,), {"scoring_rules": lambda self, rules=rules: rules})
        with duet_vlm.attach(model, cls(options=TokenOptions(text_query="last"))):
            VIEWS.clear()
            forward(model, inputs)
            views.append(VIEWS[0])
    config = model.config.text_config
    slots, last = views[0].positions[0], int(views[0].text_positions[0, -1])
    if family == "llava":
        width = config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
        ones = 2 * torch.cos(theta * (last - slots[:, None]).double()).sum(1) / width**0.5
        expected = views[0].scores[0].double() / ones.clamp(min=0.01 * width**0.5)[:, None]
        torch.testing.assert_close(views[1].scores[0].double(), expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(views[0].scores, views[1].scores)


# ---- information


@pytest.mark.parametrize(("count", "width"), [(7, 12), (12, 7), (5, 5)])
def test_information_is_that_of_the_singular_values(count: int, width: int) -> None:
    torch.manual_seed(1)
    rows, valid = torch.randn(3, count, width), torch.arange(count) < torch.tensor([count, 3, 1])[:, None]
    for one, real, ours in zip(rows, valid, information(rows, valid), strict=True):
        left, values, _ = torch.linalg.svd(one[real].double(), full_matrices=False)
        torch.testing.assert_close(ours[real].double(), (left * values).abs().sum(1), rtol=1e-4, atol=1e-5)
        assert not ours[~real].abs().max() > 1e-5 if (~real).any() else True


# ---- several stages


@pytest.mark.parametrize("rows", [(ONE,), (THREE, TWO)], ids=["one", "ragged"])
def test_layers_in_a_row_rank_by_the_rows_that_are_left(rows: Any) -> None:
    """A drop in front of every layer: a layer's attention is that of the rows that it reads."""
    model, family = shared("llava", "eager"), FAMILIES["llava"]
    inputs = family.inputs(rows)
    seen: list[DecoderView] = []

    class Spy(SparseVLM):
        def prune_tokens(self, view: DecoderView) -> Any:
            seen.append(view)
            return super().prune_tokens(view)

    with duet_vlm.attach(
        model, Spy(schedule=((2, 0.7), (3, 0.5), (4, 0.4)), recycle=False, options=TokenOptions(text_query="last"))
    ) as handle:
        out = forward(model, inputs, output_attentions=True)
        groups = [handle._prompt_state.layer_group(layer).tokens for layer in (1, 2, 3)]
    for shown, tokens, attention in zip(seen, groups, out.attentions[1:4], strict=True):
        for b in range(len(rows)):
            expected = attention[b, :, -1][:, tokens.visual[b]].T
            torch.testing.assert_close(shown.scores[b][shown.valid[b]], expected, rtol=1e-4, atol=1e-6)
