"""Methods inside the decoder against slow twins of what they choose, and their bad inputs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, TEXT, THREE, TWO, forward, shared
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import duet_vlm
from duet_vlm import DecoderView
from duet_vlm.api.calibrate import calibrate
from duet_vlm.cli.main import app
from duet_vlm.methods.d2pruner import D2Pruner
from duet_vlm.methods.fitprune import FitPrune
from duet_vlm.methods.sparsevlm import SparseVLM
from duet_vlm.ops.fitting import fitted, counts_after_layers
from duet_vlm.ops.graph import greedy_independent, rescaled
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.calibration import Calibration


def view(there: list[int], stay: list[int], seed: int, heads: int = 3, **more: Tensor) -> DecoderView:
    """Random rows and scores of as many tokens as each sample has."""
    draw = torch.Generator().manual_seed(seed)
    most = max(there)
    valid = torch.arange(most) < torch.tensor(there)[:, None]
    return DecoderView(
        valid, torch.tensor(stay), host_counts=tuple(zip(there, stay, strict=True)), scores=torch.rand(len(there), most, heads, generator=draw),
        hidden_states=torch.randn(len(there), most, 8, generator=draw), **more,
    )  # fmt: skip


# ---- sparsevlm


def slow_peaks(rows: list[list[float]], count: int, nearest: int) -> tuple[list[int], list[int]]:
    """Centres by falling product of density and distance to a denser row, and the number of each row's centre."""
    total = range(len(rows))
    apart = [[math.dist(rows[i], rows[j]) / math.sqrt(len(rows[0])) for j in total] for i in total]
    density = [math.exp(-sum(d * d for d in sorted(apart[i])[:nearest]) / nearest) for i in total]
    delta = []
    for i in total:
        denser = [apart[i][j] for j in total if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta.append(min(denser, default=max(map(max, apart))))
    centres = sorted(total, key=lambda i: -density[i] * delta[i])[:count]
    into = [centres.index(i) if i in centres else min(range(count), key=lambda c: apart[i][centres[c]]) for i in total]
    return centres, into


def slow_sparsevlm(scores: list[float], rows: list[list[float]], stay: int) -> dict[int, list[int]]:
    """Anchor -> members for all that go on: the kept ones, then the clusters' centres."""
    there = len(scores)
    order = sorted(range(there), key=lambda i: -scores[i])
    for kept in range(there, -1, -1):
        pooled = int(0.3 * (there - kept)) + 1 if kept < there else 0
        clusters = pooled // 10 + 1 if kept < there else 0
        if kept + clusters == stay:
            break
    members = order[kept : kept + pooled]
    out = {token: [] for token in sorted(order[:kept])}
    if members:
        centres, into = slow_peaks([rows[m] for m in members], clusters, clusters)
        out |= {members[c]: [m for m, c2 in zip(members, into, strict=True) if centres[c2] == c and m != members[c]] for c in centres}
    return out


def groups(chosen: Selection, b: int) -> dict[int, list[int]]:
    index = chosen.index[b][chosen.valid[b]].tolist()
    pairs = zip(chosen.source_tokens[b].tolist(), chosen.target_row[b].tolist(), strict=True)
    out: dict[int, list[int]] = {token: [] for token in index}
    for member, row in pairs:
        if row >= 0:
            out[index[row]].append(member)
    return out


@pytest.mark.parametrize("stay", [[10, 40, 12], [57, 7, 30], [58, 59, 31], [60, 50, 40]])
def test_sparsevlm_recycles_as_loops_do(stay: list[int]) -> None:
    there = [60, 120, 40]
    shown = view(there, stay, seed=sum(stay))
    chosen = SparseVLM(schedule=((2, 5),)).prune_tokens(shown)
    assert isinstance(chosen, Selection)
    for b, (n, k) in enumerate(zip(there, stay, strict=True)):
        expected = slow_sparsevlm(shown.scores[b, :n].mean(-1).tolist(), shown.hidden_states[b, :n].tolist(), k)
        assert groups(chosen, b) == expected and len(expected) == k
        index = chosen.index[b][chosen.valid[b]].tolist()
        assert index == sorted(index)


def test_sparsevlm_keeps_within_counts_too_small_for_its_clusters() -> None:
    for stay in (1, 2, 3):
        chosen = SparseVLM(schedule=((2, 5),)).prune_tokens(view([200], [stay], seed=stay))
        assert int(chosen.valid.sum()) == stay
        best = view([200], [stay], seed=stay).scores[0].mean(-1).argmax()
        assert int(best) in chosen.index[0][chosen.valid[0]].tolist()


def test_sparsevlm_second_release_reads_the_heads_that_look_most() -> None:
    shown = view([9, 6], [4, 3], seed=5, heads=6)
    mask = SparseVLM(schedule=((2, 4),), recycle=False, best_heads=2).prune_tokens(shown)
    for b, (n, k) in enumerate(shown.host_counts):
        scores = shown.scores[b, :n].T.tolist()
        two = sorted(scores, key=sum, reverse=True)[:2]
        mean = [sum(column) for column in zip(*two, strict=True)]
        assert set(mask[b].nonzero().flatten().tolist()) == set(sorted(range(n), key=lambda i: -mean[i])[:k])
    everyone = SparseVLM(schedule=((2, 4),), recycle=False, best_heads=14).prune_tokens(shown)
    assert torch.equal(everyone, SparseVLM(schedule=((2, 4),), recycle=False).prune_tokens(shown))


@pytest.mark.parametrize(("tokens", "expected"), [(192, (309, 204, 113)), (64, (82, 32, 18))])
def test_sparsevlm_official_counts(tokens: int, expected: tuple[int, ...]) -> None:
    """Means of all that go on at 576 tokens and 32 layers: 206.5 for nominal 192, 82.3 for 64."""
    counts = SparseVLM.official(tokens).plan(576, 32, None).counts
    assert (counts[0], counts[2], counts[3], counts[7], counts[16]) == (576, 576, *expected)
    assert pytest.approx(sum(counts) / 32, abs=0.06) == {192: 206.5, 64: 82.3}[tokens]


def test_sparsevlm_official_asks_where_only_the_order_changes() -> None:
    """A stage whose number is not below what is there recycles one token: as many go on, that one behind the others."""
    method = SparseVLM.official(schedule=((2, 8), (4, 100)))
    model = shared("llava")
    with duet_vlm.attach(model, method) as handle:
        forward(model, FAMILIES["llava"].inputs([ONE]))
        before, after = (handle._run.layer_group(layer).tokens for layer in (3, 4))
    slots = [tokens.prompt_index[0][tokens.visual[0]].tolist() for tokens in (before, after)]
    assert sorted(slots[0]) == sorted(slots[1]) and slots[0] != slots[1] and slots[1][:-1] == [s for s in slots[0] if s != slots[1][-1]]


def refused(method: str, message: str, **fields: Any) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(shared("llava"), method, **fields)
    assert duet_vlm.handle_of(shared("llava")) is None


def test_sparsevlm_bad_input() -> None:
    refused("sparsevlm", "best_heads=0: a number of heads", budget=0.4, best_heads=0)
    refused("sparsevlm", "drop before layer 1 or later", schedule=((0, 0.5),))
    with pytest.raises(ValueError, match="version='3'"):
        SparseVLM.official(version="3")
    with pytest.raises(ValueError, match="tokens='100'"):
        SparseVLM.official(100)


# ---- all


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

    with duet_vlm.attach(model, Spy(schedule=((2, 0.7), (3, 0.5), (4, 0.4)), recycle=False, text_query="last")) as handle:
        out = forward(model, inputs, output_attentions=True)
        groups = [handle._run.layer_group(layer).tokens for layer in (1, 2, 3)]
    for shown, tokens, attention in zip(seen, groups, out.attentions[1:4], strict=True):
        for b in range(len(rows)):
            expected = attention[b, :, -1][:, tokens.visual[b]].T
            torch.testing.assert_close(shown.scores[b][shown.valid[b]], expected, rtol=1e-4, atol=1e-6)


# ---- fitprune


def test_fitprune_keeps_the_largest_products() -> None:
    draw = torch.Generator().manual_seed(1)
    shown = view([9, 5], [4, 2], seed=2)
    shown = replace(shown, scores=torch.rand(2, 9, generator=draw), visual_self_attention=torch.rand(2, 9, generator=draw))
    mask = FitPrune(schedule=((1, 4),)).prune_tokens(shown)
    for b, (n, k) in enumerate(shown.host_counts):
        products = [c * s for c, s in zip(shown.scores[b, :n].tolist(), shown.visual_self_attention[b, :n].tolist(), strict=True)]
        assert set(mask[b].nonzero().flatten().tolist()) == set(sorted(range(n), key=lambda i: -products[i])[:k])


@pytest.mark.parametrize(("reduction", "mean"), [(10, 541), (40, 362), (55, 274), (60, 245), (90, 73)])
def test_fitprune_released_tables(reduction: int, mean: int) -> None:
    """Mean tokens that enter attention, of 576; a budget of as many finds the same line of the table."""
    counts = FitPrune.official(reduction).plan(576, 32, None).counts
    assert round(sum(counts) / 32) == mean
    assert FitPrune().plan(576, 32, sum(counts) / 32 / 576 + 1e-9).counts == counts
    assert FitPrune.official(reduction, 6).plan(576, 6, None).counts == counts[:6]


@pytest.mark.parametrize("depth", [4, 8, 28, 32, 40])
def test_fitprune_budgets_between_the_lines(depth: int) -> None:
    for tokens in (64, 576, 1000):
        before = None
        for percent in range(99, int(100 / depth) + 1, -7):
            counts = FitPrune().plan(tokens, depth, percent / 100).counts
            assert percent / 100 * tokens - 1 < sum(counts) / depth <= percent / 100 * tokens + 1e-9
            assert before is None or all(a >= b for a, b in zip(before, counts, strict=True))
            before = counts
    with pytest.raises(duet_vlm.BudgetError, match="first layer runs at full width"):
        FitPrune().plan(576, depth, 0.5 / depth)


def slow_left(cross: list[list[float]], own: list[list[float]], part: float) -> list[int]:
    alive, counts = set(range(len(cross[0]))), [len(cross[0])]
    for layer in range(len(cross)):
        leaves = []
        for received in (cross[layer], own[layer]):
            gone: list[int] = []
            for token in sorted(alive, key=lambda t: (received[t], t)):
                if sum(received[t] for t in alive if t not in (*gone, token)) < (1 - part) * sum(received):
                    break
                gone.append(token)
            leaves.append(set(gone))
        alive -= leaves[0] & leaves[1]
        counts.append(len(alive))
    return counts


@pytest.mark.parametrize("part", [0.05, 0.2, 0.5])
def test_fitting_equals_loops(part: float) -> None:
    draw = torch.Generator().manual_seed(3)
    cross, own = (torch.rand(4, 17, generator=draw, dtype=torch.float64) ** 3 for _ in range(2))
    found = counts_after_layers(cross, own, part)
    assert found == slow_left(cross.tolist(), own.tolist(), part) and found[-1] < 17


def test_fitting_meets_its_share() -> None:
    draw = torch.Generator().manual_seed(4)
    pictures = [tuple(torch.rand(2, 7, n, generator=draw)) for n in (30, 50)]
    for share in (0.8, 0.4):
        curve = fitted(pictures, share)  # type: ignore[arg-type]
        assert len(curve) == 8 and curve[0] == 1 and curve == sorted(curve, reverse=True)
        assert share - 0.1 < sum(curve) / 8 <= share


# ---- d2pruner


def slow_d2pruner(relative: list[float], rows: list[list[float]], keep: int, important: float, alike: float) -> set[int]:
    total = range(len(rows))

    def cosine(a: int, b: int) -> float:
        return sum(x * y for x, y in zip(rows[a], rows[b], strict=True)) / math.hypot(*rows[a]) / math.hypot(*rows[b])

    every = [cosine(a, b) for a in total for b in total if a != b]
    low, high = min(every), max(every)
    order = sorted(total, key=lambda i: -relative[i])
    chosen = order[: int(keep * important)]
    for token in order:
        likes = [(cosine(token, other) - low) / (high - low) for other in chosen if other != token]
        if len(chosen) < keep and token not in chosen and all(like <= alike for like in likes):
            chosen.append(token)
    for token in order:
        if len(chosen) < keep and token not in chosen:
            chosen.append(token)
    return set(chosen)


@pytest.mark.parametrize("alike", [0.3, 0.6, 0.8])
def test_d2pruner_chooses_as_loops_do(alike: float) -> None:
    there, stay = [30, 21, 8], [12, 9, 7]
    shown = view(there, stay, seed=int(alike * 10))
    shown = replace(shown, scores=shown.scores[..., 0], token_index=torch.arange(30).expand(3, -1), span_index=torch.zeros(3, 30, dtype=torch.long))
    mask = D2Pruner(schedule=((2, 9),), alike=alike).prune_tokens(shown)
    for b, (n, k) in enumerate(shown.host_counts):
        expected = slow_d2pruner(shown.scores[b, :n].tolist(), shown.hidden_states[b, :n].tolist(), k, 0.7, alike)
        assert set(mask[b].nonzero().flatten().tolist()) == expected


def test_d2pruner_divides_by_the_prior_of_the_place(tmp_path: Path) -> None:
    """Attention that is the prior times something else: the something ranks."""
    bias, real = torch.rand(4, 6) + 0.1, torch.rand(24)
    path = str(Calibration("d2pruner", {}, {"4x6": bias}).save(tmp_path / "prior.safetensors"))
    shown = replace(
        view([24], [10], seed=1), scores=(bias.flatten() * real)[None], token_index=torch.arange(24)[None], span_index=torch.zeros(1, 24, dtype=torch.long),
        spans=((0, 24),), grids=((4, 6),),
    )  # fmt: skip
    mask = D2Pruner(schedule=((2, 9),), prior=path, important=1.0).prune_tokens(shown)
    assert set(mask[0].nonzero().flatten().tolist()) == set(real.topk(10).indices.tolist())
    other = replace(shown, grids=((6, 4),))
    with pytest.raises(ValueError, match=r"knows no grid of 6x4, only 4x6: resize=True"):
        D2Pruner(schedule=((2, 9),), prior=path).prune_tokens(other)
    assert D2Pruner(schedule=((2, 9),), prior=path, resize=True).prune_tokens(other).sum() == 10


def test_nothing_alike_is_picked_twice() -> None:
    """Three copies of each of four rows: a set of four has one of each."""
    rows = torch.eye(4).repeat_interleave(3, 0)[None]
    joined = rescaled(rows @ rows.transpose(1, 2), torch.ones(1, 12, dtype=torch.bool)) > 0.8
    picked = greedy_independent(torch.rand(1, 12), joined, torch.ones(1, 12, dtype=torch.bool), torch.tensor([6]), 6)
    assert sorted(token // 3 for token in picked[0].nonzero().flatten().tolist()) == [0, 1, 2, 3]


# ---- calibration


def mean_attention(model: Any, prompts: list[Any], layer: int) -> Tensor:
    """What image tokens get from the last text token, mean over heads and prompts, by the eager model's own maps."""
    found = []
    for inputs in prompts:
        out = model(**inputs, output_attentions=True, use_cache=False)
        there = inputs["input_ids"][0] == model.config.image_token_id
        found.append(out.attentions[layer][0, :, -1][:, there].mean(0))
    return torch.stack(found).mean(0)


def test_calibrated_files_are_what_the_model_does(tmp_path: Path) -> None:
    model, family = shared("llava", "eager"), FAMILIES["llava"]
    first = dict(family.inputs([ONE]))
    prompts = [first, first | {"pixel_values": first["pixel_values"].flip(-1)}]
    with torch.no_grad():
        plain = model(**prompts[0]).logits
        made = calibrate(model, "d2pruner", prompts, tmp_path / "prior.safetensors")
        expected = mean_attention(model, prompts, 1)
        assert torch.equal(model(**prompts[0]).logits, plain)
    (bias,) = made.data.values()
    torch.testing.assert_close(bias.flatten(), expected, rtol=1e-4, atol=1e-6)
    table = calibrate(model, "fitprune", [dict(family.inputs([row])) for row in (ONE, THREE)], tmp_path / "table.json")
    assert [len(line) for line in table.data["curves"]] == [8] * 9
    for name, setting, path in (("d2pruner", "prior", "prior.safetensors"), ("fitprune", "table", "table.json")):
        with duet_vlm.attach(model, name, budget=0.5, **{setting: str(tmp_path / path)}) as handle:
            forward(model, family.inputs([ONE, TWO]))
            assert handle.report().measured_mean > 0
            counts = handle.plan(family.tokens(ONE[2])).counts
    line = [x * family.tokens(ONE[2]) for x in table.data["curves"][4]]
    assert all(abs(a - b) < 0.15 * line[0] for a, b in zip(counts, line, strict=True))  # the line of a half, about


def test_files_of_other_models_and_methods_are_refused(tmp_path: Path) -> None:
    facts = {"family": "llava", "layers": 8, "hidden": 64, "heads": 4, "tokens": None}
    deeper = str(Calibration("fitprune", facts | {"layers": 9}, {"curves": [[1.0] * 9]}).save(tmp_path / "deeper.json"))
    message = "was made for a model with layers 9, this one has 8: make one for this model with 'duet-vlm calibrate"
    refused("fitprune", message, budget=0.5, table=deeper)
    other = str(Calibration("d2pruner", facts | {"family": "qwen2_vl"}, {"2x2": torch.ones(2, 2)}).save(tmp_path / "other.safetensors"))
    refused("d2pruner", "was made for a model with family qwen2_vl, this one has llava", budget=0.5, prior=other)
    refused("fitprune", "was made for the method d2pruner", budget=0.5, table=other)
    refused("fitprune", "no such file; make one", budget=0.5, table=str(tmp_path / "nothing.json"))
    (tmp_path / "text.json").write_text("{}")
    refused("fitprune", "is no file of duet-vlm calibrate", budget=0.5, table=str(tmp_path / "text.json"))
    (tmp_path / "bytes.safetensors").write_bytes(b"nothing")
    refused("d2pruner", "is no file of duet-vlm calibrate", budget=0.5, prior=str(tmp_path / "bytes.safetensors"))
    refused("fitprune", "a schedule says itself what stays", schedule=((2, 0.5),), table=deeper)
    refused("d2pruner", r"important=1.5: a number in \[0, 1\]", budget=0.5, important=1.5)
    with pytest.raises(ValueError, match=r"what fitprune stores is a \.json file"):
        Calibration("fitprune", facts, {"curves": []}).save(tmp_path / "table.txt")


def test_what_cannot_be_calibrated_is_refused() -> None:
    model, family = shared("llava"), FAMILIES["llava"]
    with pytest.raises(ValueError, match="fastv is not calibrated to a model; methods that are: d2pruner, fitprune"):
        calibrate(model, "fastv", [])
    with pytest.raises(ValueError, match="nothing to calibrate by"):
        calibrate(model, "fitprune", [dict(family.inputs([TEXT]))])
    assert duet_vlm.handle_of(model) is None


def test_calibrate_on_the_command_line(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    out = tmp_path / "table.json"
    result = CliRunner().invoke(app, ["calibrate", "fitprune", "--image", str(tmp_path / "red.png"), "--out", str(out)])
    assert result.exit_code == 0 and "knows tiny from 1 image:" in result.output
    assert json.loads(out.read_text())["method"] == "fitprune"
    result = CliRunner().invoke(app, ["calibrate", "duet", "--image", str(tmp_path / "red.png"), "--out", str(out)])
    assert result.exit_code != 0 and "duet is not calibrated to a model" in result.output
