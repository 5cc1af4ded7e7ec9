"""Methods that look at several vision layers, crops, the question or the projector: equal to slow twins, and refused where they cannot run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, THREE, TWO, Picture, any_res_crops, any_res_layout, build, forward, generate, shared
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import duet_vlm
from duet_vlm import SpanPlan
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.inputs.clip_text import ClipTextEncoder
from duet_vlm.methods.cdpruner import CDPruner
from duet_vlm.methods.hired import HiRED
from duet_vlm.methods.holov import HoloV
from duet_vlm.methods.prunesid import PruneSID
from duet_vlm.methods.vscan import VScan
from duet_vlm.methods.zoo_prune import ZooPrune
from duet_vlm.ops.groups import segment_numbers
from duet_vlm.ops.saliency import direction
from duet_vlm.reducers.base import EncoderReducer
from duet_vlm.reducers.encoder_view import EncoderView, LayerView


def view_of(images: list[tuple[int, int]], seed: int = 0, width: int = 6) -> EncoderView:
    """Square pictures of (tokens a side, how many to keep), padded on the right; padding holds numbers that would win."""
    draw, sizes = torch.Generator().manual_seed(seed), [side**2 for side, _ in images]
    most, batch = max(sizes), len(images)
    valid = torch.arange(most) < torch.tensor(sizes)[:, None]
    layers = tuple(LayerView(torch.rand(batch, most, generator=draw).masked_fill(~valid, 9.0)) for _ in range(2))
    features = torch.randn(batch, most, width, generator=draw).masked_fill(~valid[..., None], 9.0)
    token, side = torch.arange(most).expand(batch, -1), torch.tensor([[side] for side, _ in images])
    count = torch.tensor([n for _, n in images])
    plans = tuple(SpanPlan(size, n, 0, (n,)) for size, (_, n) in zip(sizes, images, strict=True))
    return EncoderView(
        valid, count, count * 0, plans, layers[0].importance, None, features, torch.where(valid, 0, -1), layers=layers,
        coords=torch.stack([token // side, token % side], 2).masked_fill(~valid[..., None], -1), grid_size=side.expand(-1, 2),
        crop_grid=torch.zeros(batch, 2).long(),
    )  # fmt: skip


def chosen(method: EncoderReducer, view: EncoderView) -> list[list[int]]:
    selection = method.select_tokens(view)
    return [sorted(index[valid].tolist()) for index, valid in zip(selection.index, selection.valid, strict=True)]


def best(scores: Any, tokens: Any, count: int) -> list[int]:
    return sorted(tokens, key=lambda i: (-float(scores[i]), i))[:count]


IMAGES = [(6, 14), (4, 16), (5, 3), (3, 1)]


# ---- hired


def split(weights: list[int], sizes: list[int], total: int) -> list[int]:
    """Largest remainders, where no crop is filled."""
    exact = [total * w / sum(weights) for w in weights]
    counts = [math.floor(x + 1e-4) for x in exact]
    assert all(n < size for n, size in zip(counts, sizes, strict=True))
    order = sorted(range(len(weights)), key=lambda i: (-(exact[i] - counts[i]), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@pytest.mark.parametrize("picture", [Picture(1, 8, 8), Picture(2, 5, 10)])
def test_hired_counts_what_is_important_where_a_crop_shows_it(picture: Picture) -> None:
    """By hand, on a packed picture of LLaVA-NeXT: overview of 4 x 4, crops whose borders are cut off."""
    model, seen = shared("llava_next"), []

    class Spy(HiRED):
        def select_tokens(self, view: Any) -> Any:
            seen.append(view)
            return super().select_tokens(view)

    with duet_vlm.attach(model, Spy(keep=0.4)) as handle:
        forward(model, FAMILIES["llava_next"].inputs([(1, picture, 5, 6)]))
        kept = sorted(handle.trace[0][0].stages[0].kept)
        plan = handle.plan(FAMILIES["llava_next"].tokens(picture))
    (view,) = seen
    layout, (rows, columns) = any_res_layout(picture), any_res_crops(picture)
    late, early = (layer.importance[0] for layer in view.layers)
    crop = {i: at[0] for i, at in enumerate(layout) if at is not None}
    mosaic = [((at[0] - 1) // columns * 4 + at[1] // 4, (at[0] - 1) % columns * 4 + at[1] % 4) for at in layout if at is not None and at[0]]
    top, bottom, left, right = (f(place[axis] for place in mosaic) for axis in (0, 1) for f in (min, max))
    weights = [0] * (rows * columns)
    for token in best(early, [i for i in crop if crop[i] == 0], 8):
        y, x = layout[token][1] // 4, layout[token][1] % 4
        down, across = top + (y + 0.5) / 4 * (bottom + 1 - top), left + (x + 0.5) / 4 * (right + 1 - left)
        weights[int(down // 4) * columns + int(across // 4)] += 1
    full = min(16, int(plan.entry * 0.5))
    sizes = [sum(number == each for number in crop.values()) for each in range(1, 1 + len(weights))]
    counts = [full, *split(weights, sizes, plan.entry - full)]
    expected = [i for each, n in enumerate(counts) for i in best(late, [i for i in crop if crop[i] == each], n)]
    assert kept == sorted(expected) and len(kept) == plan.entry


def test_hired_keeps_the_most_attended_tokens_of_a_picture_that_is_whole() -> None:
    view = view_of(IMAGES)
    for row, (side, n) in enumerate(IMAGES):
        assert chosen(HiRED(keep=1), view)[row] == sorted(best(view.importance[row], range(side**2), n))


# ---- vscan


@pytest.mark.parametrize("window", [2, 3, 6])
def test_vscan_scans_twice_and_merges_the_rest(window: int) -> None:
    images = [(6, 14), (4, 15), (5, 3), (3, 1)]
    view, method = view_of(images), VScan(keep=1, window=window)
    selection = method.select_tokens(view)
    for row, (side, n) in enumerate(images):
        deep, shallow = (layer.importance[row] for layer in view.layers)
        number = max(1, side // window)
        limit, local, given = math.ceil(n // 2 / number**2), [], {}
        for token in best(shallow, range(side**2), side**2):
            at = min(token // side // window, number - 1), min(token % side // window, number - 1)
            if len(local) < n // 2 and given.get(at, 0) < limit:
                given[at] = given.get(at, 0) + 1
                local.append(token)
        kept = sorted(local + best(deep, set(range(side**2)) - set(local), n - len(local)))
        index = selection.index[row][selection.valid[row]].tolist()
        assert index == kept
        unit = torch.nn.functional.normalize(view.features[row].double(), dim=-1)
        joined = {int(m): index[int(i)] for m, i in zip(selection.source_tokens[row], selection.target_row[row], strict=True) if i >= 0}
        assert joined == {m: max(kept, key=lambda k, m=m: float(unit[m] @ unit[k])) for m in range(side**2) if m not in kept}


def test_vscan_has_a_plan_for_its_released_windows() -> None:
    assert [VScan.official(n, ()).plan(576, 32, None).entry for n in (64, 75, 96, 100, 192, 576)] == [64, 70, 96, 98, 192, 576]
    with pytest.raises(ValueError, match="keep=31 has 15 local tokens for 16 windows: give at least 32"):
        VScan.official(31, ()).plan(576, 32, None)
    plan = VScan().plan(576, 32, 64)
    assert plan.mean <= 64 < VScan().plan(576, 32, 65).mean + 1 and plan.counts[0] == plan.entry > plan.counts[16] == plan.counts[31]
    with pytest.raises(ValueError, match="with a budget give fractions"):
        VScan(local="equal").plan(576, 32, 64)


def test_vscan_needs_local_tokens_for_the_windows_of_a_picture_not_of_a_batch() -> None:
    inputs, model = FAMILIES["llava"].inputs((THREE, THREE)), shared("llava")  # six pictures in one call of the tower
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output[0].shape[0]
    each = math.isqrt(tokens) // 2
    with duet_vlm.attach(model, VScan.official(2 * each**2, (), window=2, shallow=1)) as handle:
        forward(model, inputs)
        assert [len(span.stages[0].kept) for row in handle.trace for span in row] == [2 * each**2] * 6


# ---- holov


@pytest.mark.parametrize("crops", [1, 3, 7])
def test_holov_shares_by_attention_and_variety(crops: int) -> None:
    view, method = view_of(IMAGES), HoloV(keep=1, num_crops=crops)
    stretch = segment_numbers(view.valid, method.num_crops)
    score = method.score(view, stretch)
    for row, (side, _) in enumerate(IMAGES):
        total, groups, start = side**2, [], 0
        for number in range(crops):
            size = total // crops + (number < total % crops)
            groups.append(list(range(start, start + size)))
            start += size
        unit = torch.nn.functional.normalize(view.features[row].double(), dim=-1)
        for number, group in enumerate(groups):
            assert all(int(stretch[row, i]) == number for i in group)
            if len(group) < 2:
                assert all(float(score[row, i]) == pytest.approx(float(view.importance[row, i])) for i in group)
                continue
            variety = {}
            for i in group:
                likeness = [0.0 if i == j else float(unit[i] @ unit[j]) for j in group]
                mean = sum(likeness) / (len(group) - 1)
                variety[i] = sum((x - mean) ** 2 for x in likeness) / (len(group) - 1)
            level = sum(float(view.importance[row, i]) for i in group) / sum(variety.values())
            for i in group:
                assert float(score[row, i]) == pytest.approx(float(view.importance[row, i]) + 0.09 * variety[i] * level, rel=1e-4)
    assert [len(row) for row in chosen(method, view)] == [n for _, n in IMAGES]
    assert [len(row) for row in chosen(HoloV.official(1, crops=crops), view)] == [n for _, n in IMAGES]


# ---- prunesid


def test_prunesid_keeps_a_token_of_every_group_and_no_twins_first() -> None:
    """Pictures of four textures, many copies each: without a quota for every group, attention alone would take one texture."""
    torch.manual_seed(1)
    signs = torch.tensor([[(-1.0) ** bin(row & column).count("1") for column in range(32)] for row in (1, 2, 4, 8)])  # orthogonal, of mean 0
    kind = torch.arange(24) % 4
    strength = torch.tensor([0.15, 0.25, 0.35, 0.45])[:, None]
    features = ((0.5 + strength * signs).logit()[kind] + 0.01 * torch.randn(24, 32))[None]
    attention = (kind == 2).float()[None] + torch.rand(1, 24) / 10
    count = torch.tensor([16])
    plan = SpanPlan(24, 16, 0, (16,))
    view = EncoderView(torch.ones(1, 24, dtype=torch.bool), count, count * 0, (plan,), attention, None, features)
    group, groups = PruneSID(keep=16).groups(view)
    assert groups == 4
    for a in range(24):
        for b in range(24):
            assert (group[0, a] == group[0, b]) == (kind[a] == kind[b])
    (kept,) = chosen(PruneSID(keep=16), view)
    assert {int(kind[i]) for i in kept} == {0, 1, 2, 3} and len(kept) == 16
    first = [best(attention[0], (kind == k).nonzero().flatten().tolist(), 1)[0] for k in range(4)]
    assert set(first) <= set(kept)


def test_prunesid_threshold_is_the_mean_likeness_of_pairs() -> None:
    view = view_of(IMAGES)
    from duet_vlm.ops.greedy import cosine

    likeness = cosine(view.features, view.valid)
    found = PruneSID(keep=1).threshold(view, likeness)
    for row, (side, n) in enumerate(IMAGES):
        pairs = [float(likeness[row, i, j]) for i in range(side**2) for j in range(i)]
        assert float(found[row]) == pytest.approx(min(sum(pairs) / len(pairs) * n / 32, 0.999), abs=1e-5)


# ---- zoo_prune


def test_zoo_prune_measures_how_far_the_projector_moves() -> None:
    model, seen = shared("llava"), []

    class Spy(ZooPrune):
        def select_tokens(self, view: Any) -> Any:
            seen.append((view, self.sensitivity(view), self.weight(view)))
            return super().select_tokens(view)

    with duet_vlm.attach(model, Spy(keep=0.4, directions=3, step=0.05)):
        forward(model, FAMILIES["llava"].inputs([ONE]))
    ((view, found, weight),) = seen
    with torch.no_grad():
        pixels = FAMILIES["llava"].inputs([ONE])["pixel_values"]
        rows = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        project, total = model.model.multi_modal_projector, torch.zeros(rows.shape[:2])
        for number in range(3):
            step = 0.05 * direction(0, number, rows.shape[2])
            total += (project(rows + step) - project(rows - step)).norm(dim=-1)
    torch.testing.assert_close(found, total / (3 * 2 * 0.05), rtol=1e-3, atol=1e-6)
    assert float(weight.min()) == 0 and float(weight.max()) == 1 and view.features is not None
    assert float(direction(0, 1, 32).norm()) == pytest.approx(1) and not torch.equal(direction(0, 1, 32), direction(1, 1, 32))


# ---- cdpruner


def test_cdpruner_by_the_decoders_own_embeddings() -> None:
    """Relevance: mean cosine to the words behind the image, scaled over each picture; another question chooses other tokens."""
    model, seen = shared("llava"), []

    class Spy(CDPruner):
        def select_tokens(self, view: Any) -> Any:
            seen.append((view, self.weight(view)))
            return super().select_tokens(view)

    inputs = FAMILIES["llava"].inputs([ONE, TWO])
    with duet_vlm.attach(model, Spy(keep=8)) as handle:
        forward(model, inputs)
        first = [handle.trace[0][0].stages[0].kept]
        inputs["input_ids"][0, -3:] = torch.tensor([61, 62, 63])
        forward(model, inputs)
        second = [handle.trace[0][0].stages[0].kept]
    view, weight = seen[0]
    for span, row in enumerate((ONE, TWO, TWO)):
        last = max(i for i, item in enumerate(row) if isinstance(item, Picture))
        words = torch.nn.functional.normalize(model.get_input_embeddings()(torch.tensor(row[last + 1 :])), dim=-1)
        likeness = (torch.nn.functional.normalize(view.features[span], dim=-1) @ words.T).mean(1)
        expected = (likeness - likeness.min() + 1e-6) / (likeness.max() - likeness.min())
        torch.testing.assert_close(weight[span], expected.detach(), rtol=1e-3, atol=1e-5)
    assert first != second


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_same_question_chooses_the_same_tokens_by_any_way(family: str) -> None:
    """forward, generate() with and without beams, several pictures in a prompt, left and right padding."""
    model, made = shared(family), FAMILIES[family]
    rows = (ONE, THREE)
    with duet_vlm.attach(model, "cdpruner", keep=0.4) as handle:
        found = []
        for side in ("left", "right"):
            forward(model, made.inputs(rows, side))
            found.append([[span.stages[0].kept for span in sample] for sample in handle.trace])
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            generate(model, made.inputs(rows), 2, **options)
            beams = options.get("num_beams", 1)
            found.append([[span.stages[0].kept for span in sample] for sample in handle.trace[::beams]])
        with pytest.raises(ValueError, match=f"{made.make().config.model_type}: cdpruner chooses by the question, and an encoder that is called"):
            brought = {name: value for name, value in made.inputs([ONE]).items() if "ids" not in name and name != "attention_mask"}
            encode(model, brought)
    assert all(each == found[0] for each in found)


def clip(width: int = 32) -> Any:
    sizes = dict(intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=60, hidden_size=16, max_position_embeddings=8, eos_token_id=59) | sizes
    vision = dict(hidden_size=width, image_size=28, patch_size=14) | sizes
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


class Processor:
    """A tokenizer whose words are the ids."""

    tokenizer = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))


def ids_of(text: str) -> dict[str, list[int]]:
    return {"input_ids": [58, *(int(word) % 50 for word in text.split()), 59]}


def test_cdpruner_reads_each_question_with_the_text_tower() -> None:
    """Two samples with questions of different lengths, one longer than the tower's window: negated mean cosine over its pieces."""
    model, seen, tower = shared("llava"), [], ClipTextEncoder(clip(), ids_of)

    class Spy(CDPruner):
        def select_tokens(self, view: Any) -> Any:
            seen.append((view, self.likeness(view)))
            return super().select_tokens(view)

    long = (1, ONE[2], *range(30, 42))
    inputs = FAMILIES["llava"].inputs([ONE, long])
    with duet_vlm.attach(model, Spy(keep=0.4, relevance="contrastive"), text_tower=tower, processor=Processor()):
        forward(model, inputs)
    ((view, likeness),) = seen
    with torch.no_grad():
        rows = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        images = torch.nn.functional.normalize(tower.clip.visual_projection(tower.clip.vision_model.post_layernorm(rows)), dim=-1)
        for sample, words in enumerate((ONE[3:], long[2:])):
            ids = ids_of(" ".join(map(str, words)))["input_ids"]
            texts = [tower.clip.text_model(input_ids=torch.tensor([ids[i : i + 8]])).pooler_output for i in range(0, len(ids), 8)]
            texts = torch.nn.functional.normalize(tower.clip.text_projection(torch.cat(texts)), dim=-1)
            assert int(view.text_similarity_valid[sample].sum()) == len(texts) == math.ceil(len(ids) / 8)
            torch.testing.assert_close(likeness[sample], -(images[sample] @ texts.T).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava", {}, "pass text_tower=duet_vlm.inputs.clip_text.ClipTextEncoder"),
        ("llava", {"text_tower": "clip"}, "got str"),
        ("llava", {"text_tower": ClipTextEncoder(clip(), ids_of)}, "pass processor= to attach"),
        ("llava", {"text_tower": ClipTextEncoder(clip(48), ids_of), "processor": Processor()}, "a vision tower of width 48, this model's has 32"),
        ("qwen2_5_vl", {"text_tower": ClipTextEncoder(clip(), ids_of), "processor": Processor()}, "qwen2_5_vl cannot give: its vision"),
    ],
)
def test_text_towers_that_do_not_fit_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        duet_vlm.attach(shared(family), "cdpruner", relevance="contrastive", keep=0.4, **options)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(TypeError, match="Linear has no text_model; give a transformers CLIPModel"):
        ClipTextEncoder(torch.nn.Linear(2, 2), ids_of)


def test_settings_out_of_range_are_refused() -> None:
    for method, settings, message in (
        ("hired", {"alpha": 1.5}, "alpha=1.5: the overview's share"),
        ("hired", {"early": 9, "keep": 4}, "signal_layer=9: this vision tower has no such layer"),
        ("holov", {"num_crops": 0}, "crops=0"),
        ("vscan", {"window": 0}, "window=0"),
        ("zoo_prune", {"directions": 0}, "directions=0"),
        ("zoo_prune", {"step": 0.0}, "step=0.0"),
        ("cdpruner", {"relevance": "clip"}, "choose one of 'decoder', 'contrastive'"),
    ):
        with pytest.raises(ValueError, match=message):
            duet_vlm.attach(shared("llava"), method, **settings)


@pytest.mark.parametrize("method", ["hired", "vscan", "holov", "prunesid", "cdpruner", "zoo_prune"])
def test_half_precision_and_gradients(method: str) -> None:
    """bfloat16 runs; in training the loss reaches the projector, and the choice carries none."""
    settings = {"keep": 0.4} | ({"directions": 2} if method == "zoo_prune" else {})
    model = build("llava", dtype=torch.bfloat16)
    inputs = FAMILIES["llava"].inputs([ONE, TWO])
    with duet_vlm.attach(model, method, **settings) as handle:
        forward(model, inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
        assert handle.report().measured[0] < 36
    model = build("llava").train()
    with duet_vlm.attach(model, method, **settings):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 20, -100)).loss.backward()
    grad: Tensor = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad is not None and float(grad.abs().sum()) > 0
