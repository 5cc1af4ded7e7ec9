"""Methods whose rows a module makes: the module on the model and off it again, its file, its gradient, its question,
and the rows themselves."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, THREE, TWO, build, clips_for, forward, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import duet_vlm
from duet_vlm import EncoderView
from duet_vlm.methods.trained.quecc import QueCCModule
from duet_vlm.methods.trained.vqtoken import VQToken
from duet_vlm.ops.kmeans import cluster_sums, elbow, farthest_start, kmeans
from duet_vlm.ops.merge import merged_rows, unit_rows
from duet_vlm.ops.windows import windows, within
from duet_vlm.reducers.compressor import BESIDE, Compressor, NewWeights
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime.training.compressor_module import touch_all_params
from duet_vlm.viz import draw

OWN = {"quecc": {"kernel": 2}, "resampler": {}, "vqtoken": {}}
CODE = {"vqtoken": {"form": "code"}}
quick = settings(max_examples=30, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- windows


def cut_by_hand(places: list[tuple[int, int]], count: int) -> list[list[int]]:
    """Tokens in bands of whole windows by row, in each band dealt to windows by column: windows by their tokens."""
    rows, columns = (max(p[i] for p in places) - min(p[i] for p in places) + 1 for i in (0, 1))
    bands = min(count, max(1, round(math.sqrt(count * rows / columns))))
    total = len(places)
    by_row = sorted(range(total), key=lambda t: (places[t], t))
    band = {token: (rank * count // total) * bands // count for rank, token in enumerate(by_row)}
    by_band = sorted(range(total), key=lambda t: (band[t], places[t][1], places[t][0], t))
    return [[t for rank, t in enumerate(by_band) if rank * count // total == window] for window in range(count)]


@quick
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7), st.data())
def test_windows_equal_those_cut_by_hand(seed: int, rows: int, columns: int, data: st.DataObject) -> None:
    every = list(itertools.product(range(rows), range(columns)))
    there = data.draw(st.lists(st.booleans(), min_size=len(every), max_size=len(every)).filter(any))
    left = [place for place, real in zip(every, there, strict=True) if real]
    count = data.draw(st.integers(1, len(left)))
    place = torch.tensor(every)[None].repeat(2, 1, 1)
    valid = torch.tensor([there, [True] * len(every)])  # beside a picture that is there in full
    found = windows(place, valid, torch.tensor([count, 1]), count, max(-(-len(left) // count), len(every)))
    token_of = [t for t, real in enumerate(there) if real]
    if count < len(left):
        expected = [[token_of[t] for t in window] for window in cut_by_hand(left, count)]
        ours = [
            [int(t) for t, real in zip(row, mask, strict=True) if real]
            for row, mask in zip(found.tokens[0], found.real[0], strict=True)
        ]
        assert ours == expected
        for window, centre in zip(expected, found.centre[0].tolist(), strict=True):
            middle = [sum(every[t][i] for t in window) / len(window) for i in (0, 1)]
            far = {t: sum((every[t][i] - middle[i]) ** 2 for i in (0, 1)) for t in window}
            assert far[centre] <= min(far.values()) + 1e-9 and centre == min(
                t for t in far if far[t] <= min(far.values()) + 1e-9
            )
        assert {len(window) for window in expected} <= {len(left) // count, -(-len(left) // count)}
    else:
        assert found.whole[0] and found.centre[0].tolist() == token_of  # every token, in order
        assert (found.selection().target_row[0] == -1).all()


@pytest.mark.parametrize("side", [2, 3, 4])
def test_pooling_equals_torchs_on_whole_windows(side: int) -> None:
    grid, rows = 12, normal(side, 2, 144, 5)
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))[None].expand(2, -1, -1)
    count = (grid // side) ** 2
    found = windows(place, torch.ones(2, 144, dtype=torch.bool), torch.tensor([count, count]), count, side**2)
    expected = (
        nn.functional.avg_pool2d(rows.transpose(1, 2).unflatten(2, (grid, grid)), side).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(merged_rows(rows, found.selection()), expected)
    inside = within(place, found)[0, 0]
    assert torch.allclose(inside[:, 0].unique(), (torch.arange(side) + 0.5) / side * 2 - 1)


@pytest.mark.parametrize("kernel", [2, 3])
def test_queries_of_whole_cells_are_those_of_a_convolution(kernel: int) -> None:
    grid, width = 6, 8
    module = QueCCModule(width, 12, 5, 2, kernel)
    place = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))[None]
    count = (grid // kernel) ** 2
    found = windows(place, torch.ones(1, 36, dtype=torch.bool), torch.tensor([count]), count, kernel**2)
    rows = normal(1, 1, 36, width)
    expected = module.q_downsample(rows.transpose(1, 2).unflatten(2, (grid, grid))).flatten(2).transpose(1, 2)
    ours = module.queries(rows[0][found.tokens], found.real, within(place, found))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_constant_kernel_is_the_mean_of_cells_of_any_shape() -> None:
    """Stretched to other cells its sum stays: constant weights 1 / 4 over 2 x 2 give means of whatever cells there are."""
    module = QueCCModule(8, 12, 5, 2, 2)
    nn.init.constant_(module.q_downsample.weight, 0.25)
    nn.init.zeros_(module.q_downsample.bias)  # type: ignore[arg-type]
    place = torch.cartesian_prod(torch.arange(5), torch.arange(7))[None]
    found = windows(place, torch.ones(1, 35, dtype=torch.bool), torch.tensor([9]), 9, 4)
    rows = normal(2, 1, 35, 8)
    torch.testing.assert_close(
        module.queries(rows[0][found.tokens], found.real, within(place, found)), merged_rows(rows, found.selection())
    )


# ---- clusters


def lloyd_by_hand(rows: Tensor, first: list[int], rounds: int) -> tuple[list[int], list[Tensor]]:
    centres = [rows[i] for i in first]
    for _ in range(rounds):
        labels = [max(range(len(centres)), key=lambda k: float(row @ (centres[k] / centres[k].norm()))) for row in rows]
        moved = []
        for k, centre in enumerate(centres):
            members = [row for row, label in zip(rows, labels, strict=True) if label == k]
            moved.append(torch.stack(members).mean(0) if members else centre)
        change = sum(float((a - b).square().sum()) for a, b in zip(moved, centres, strict=True)) ** 0.5
        centres = moved
        if change < 1e-4:
            break
    return labels, centres


@quick
@given(st.integers(0, 10_000), st.integers(2, 14), st.data())
def test_clusters_equal_those_found_by_hand(seed: int, tokens: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, tokens))
    rows = unit_rows(normal(seed, 2, tokens, 5))
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, count:] = False  # a shorter one in the same batch
    there = torch.ones(2, count, dtype=torch.bool)
    first = farthest_start(rows, valid, count)
    chosen = [int((rows[0] @ rows[0].sum(0)).argmax())]
    while len(chosen) < count:
        chosen.append(int((rows[0] @ rows[0][chosen].T).amax(1).argmin()))
    assert first[0].tolist() == chosen
    labels, centres = kmeans(rows, valid, first, there, 8)
    expected, means = lloyd_by_hand(rows[0], chosen, 8)
    assert labels[0].tolist() == expected and torch.allclose(centres[0], torch.stack(means), atol=1e-5)
    assert (labels[1, count:] == -1).all()
    alone, _ = kmeans(
        rows[1:, :count], valid[1:, :count], farthest_start(rows[1:, :count], valid[1:, :count], count), there[1:], 8
    )
    assert torch.equal(alone[0], labels[1, :count])


@quick
@given(st.integers(0, 10_000), st.integers(1, 12), st.data())
def test_every_cluster_stands_at_a_token_of_its_own(seed: int, tokens: int, data: st.DataObject) -> None:
    """Also where tokens are alike, so that clusters are empty."""
    kinds = data.draw(st.integers(1, 4))
    rows = unit_rows(normal(seed, kinds, 5))[torch.arange(tokens) % kinds][None]
    count = data.draw(st.integers(1, tokens))
    valid, there = torch.ones(1, tokens, dtype=torch.bool), torch.ones(1, count, dtype=torch.bool)
    labels, centres = kmeans(rows, valid, farthest_start(rows, valid, count), there, 4)
    place, labels = cluster_sums(rows, valid, labels, centres, there)
    assert place[0].tolist() == sorted(set(place[0].tolist())) and len(place[0]) == count
    assert labels[0][place[0]].tolist() == list(range(count)) and set(labels[0].tolist()) == set(range(count))


@pytest.mark.parametrize("seed", range(20))
def test_of_two_rows_the_first_stands_for_them(seed: int) -> None:
    """Both are as like their mean, up to rounding, which is another one in a batch."""
    rows = unit_rows(torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(seed)))
    there, labels = torch.tensor([[True]]), torch.zeros(1, 2, dtype=torch.long)
    assert (
        cluster_sums(rows, torch.ones(1, 2, dtype=torch.bool), labels, rows.mean(1, keepdim=True), there)[0].item() == 0
    )


def test_the_elbow_is_the_released_codes() -> None:
    assert elbow([9, 5, 4, 3.5], 12) == 12 and elbow([3], 12) == 12
    bend = [100.0 - k for k in range(16)] + [70.0] * 5  # the largest second difference at place 15
    assert elbow(bend, 12) == 19


# ---- on the model and off it


def opened(method: str) -> dict[str, Any]:
    return {"keep": 0.4} | OWN.get(method, {})


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", OWN)
def test_the_module_is_the_models_only_while_attached(method: str, family: str, tmp_path: Path) -> None:
    model = build(family)
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    with duet_vlm.attach(model, method, **opened(method)) as handle:
        mine = {id(weight) for weight in handle.module.parameters()}  # type: ignore[union-attr]
        assert mine and mine <= {id(weight) for weight in model.parameters()}
        assert list(model.state_dict()) == keys
        assert model.load_state_dict(model.state_dict()).missing_keys == []
        model.save_pretrained(tmp_path / "attached")
        model.train()
        assert handle.module.training  # type: ignore[union-attr]
        model.eval()
    assert [name for name, _ in model.named_modules()] == names
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [*OWN, "pool"])
def test_gradients_reach_the_module_and_what_else_learns(method: str, family: str, frozen: bool) -> None:
    model = build(family).train()
    inputs = FAMILIES[family].inputs([ONE, TWO], "right")
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    model.requires_grad_(not frozen)
    with duet_vlm.attach(model, method, **opened(method)) as handle:
        if method == "vqtoken":  # begins as nothing: its first step moves the last maps only
            for weight in handle.module.parameters():  # type: ignore[union-attr]
                nn.init.normal_(weight, std=0.1)
        if frozen and handle.module is None:
            return
        model(**inputs, labels=labels).loss.backward()
        missing = [
            name
            for name, weight in (handle.module or nn.Module()).named_parameters()
            if weight.grad is None or not weight.grad.any()
        ]
        assert not missing
        projector = list(handle.adapter.projector().parameters())
        assert all((weight.grad is None) == frozen for weight in projector)
        assert frozen or all(
            weight.grad.isfinite().all() and weight.grad.any() for weight in projector if weight.grad is not None
        )
        tower = [
            weight
            for name, weight in handle.adapter.tower().named_parameters()
            if "patch_embed" in name and "weight" in name
        ]
        assert tower and all((weight.grad is None or not weight.grad.any()) == frozen for weight in tower)


def slope(model: nn.Module, inputs: dict[str, Any], weights: list[Tensor], directions: list[Tensor]) -> float:
    """How fast the loss rises along ``directions``: central differences at two steps, extrapolated to none."""

    def difference(step: float) -> float:
        made = []
        with torch.no_grad():
            for sign in (step, -step):
                for weight, direction in zip(weights, directions, strict=True):
                    weight.add_(direction, alpha=sign)
                made.append(float(model(**inputs).loss))
                for weight, direction in zip(weights, directions, strict=True):
                    weight.sub_(direction, alpha=sign)
        return (made[0] - made[1]) / (2 * step)

    near, far = difference(4e-4), difference(12e-4)
    return near + (near - far) / 8


def question_and_answer(family: str) -> dict[str, Any]:
    inputs = FAMILIES[family].inputs([ONE, TWO], "right")
    return inputs | {
        "labels": inputs["input_ids"].where(
            torch.arange(inputs["input_ids"].shape[1]) >= inputs["input_ids"].shape[1] - 4, -100
        )
    }


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", pytest.param("llava_next", marks=pytest.mark.slow), "qwen3_vl", "internvl"]
)
def test_the_gradient_is_the_slope_of_the_loss(family: str) -> None:
    """Also through the tower's layers that the module reads, and through the decoder's reading of the question."""
    model, inputs = build(family).train(), question_and_answer(family)
    with duet_vlm.attach(model, "quecc", keep=0.4, kernel=2) as handle:
        model(**inputs).loss.backward()
        for part in (handle.adapter.tower(), handle.adapter.text_model, handle.adapter.projector(), handle.module):
            weights = [weight for weight in part.parameters() if weight.grad is not None and weight.ndim > 1]  # type: ignore[union-attr]
            directions = [
                normal(number, *weight.shape) * weight.detach().std() for number, weight in enumerate(weights)
            ]
            analytic = sum(float((weight.grad * way).sum()) for weight, way in zip(weights, directions, strict=True))  # type: ignore[operator]
            assert analytic == pytest.approx(slope(model, inputs, weights, directions), rel=0.03, abs=0.01), type(
                part
            ).__name__


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_checkpointing_changes_no_gradient_of_what_the_module_reads(family: str) -> None:
    model, inputs = build(family).train(), question_and_answer(family)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    with duet_vlm.attach(model, "quecc", keep=0.4, kernel=2) as handle:
        expected = gradients()
        assert not any(weight.grad is None for weight in handle.module.parameters())  # type: ignore[union-attr]
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        for trained in (True, False):  # the tower; of what is used several times the sum has another order
            handle.adapter.tower().requires_grad_(trained)
            found = gradients()
            assert (found.keys() == expected.keys()) == trained
            for name, grad in found.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    model.gradient_checkpointing_disable()


def test_a_tower_that_runs_without_its_gradient_is_refused() -> None:
    """Re-entrant checkpointing around the whole tower runs its layers under no_grad."""
    model, inputs = build("llava").train(), question_and_answer("llava")
    tower = model.model.vision_tower
    plain = tower.forward

    def forward(pixels: Tensor, **options: Any) -> Any:
        return checkpoint(lambda rows: plain(rows, **options), pixels.requires_grad_(), use_reentrant=True)

    tower.forward = forward
    with duet_vlm.attach(model, "quecc", keep=0.4):
        with pytest.raises(
            ValueError, match=r"quecc uses layers of the vision tower, .* checkpointing loses: .*freeze the tower"
        ):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)


def test_ranks_wait_for_no_gradient() -> None:
    """A batch without pictures gives every weight a gradient of zero."""
    module = nn.Linear(3, 2)
    touch_all_params(torch.ones(1, 2, 4, requires_grad=True), module).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in module.parameters())
    rows = torch.ones(1, 2, 4)
    assert touch_all_params(rows, nn.Module()) is rows  # the bare codebook has no weights


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "qwen3_vl"])
def test_the_question_is_what_the_stock_decoder_makes_of_it_alone(family: str) -> None:
    model, seen = shared(family), []

    class Spy(duet_vlm.get_method("quecc")):  # type: ignore[misc]
        def select_tokens(self, view: EncoderView) -> Any:
            seen.append(view.question_state)
            return super().select_tokens(view)

    inputs = FAMILIES[family].inputs([ONE, THREE], "right")
    with duet_vlm.attach(model, Spy(keep=0.4)) as handle:
        forward(model, inputs)
    places = handle.adapter.placeholders(inputs["input_ids"], None)["image"]
    for view in seen:
        for sample, got in ((0, view[0]), (1, view[-1])):
            real = inputs["attention_mask"][sample].bool()
            last = int(places[sample].nonzero().max())
            ids = inputs["input_ids"][sample, last + 1 :][real[last + 1 :]]
            ids = ids[None]
            with torch.no_grad():
                expected = handle.adapter.text_model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state[
                    0, -1
                ]
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert seen


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llava", "llava_onevision"])
@pytest.mark.parametrize("method", [*OWN, "pool"])
def test_clips_alone_and_in_a_batch(method: str, family: str) -> None:
    model, rows = shared(family), clips_for(family)
    with duet_vlm.attach(model, method, **opened(method)) as handle:
        together = forward(model, FAMILIES[family].inputs(rows)).logits
        slots, traces = handle.slots, handle.trace
        for sample, row in enumerate(rows):
            if not traces[sample]:  # text alone
                continue
            alone = forward(model, FAMILIES[family].inputs([row])).logits
            assert handle.trace[0] and [span.merged for span in handle.trace[0]] == [
                span.merged for span in traces[sample]
            ]
            torch.testing.assert_close(
                together[sample][slots[sample] >= 0], alone[0][handle.slots[0] >= 0], rtol=1e-3, atol=2e-4
            )
            assert handle.report().nominal == handle.report().measured


@pytest.mark.parametrize("second", ["pyramiddrop", "fastv"])
def test_in_front_of_drops_under_one_budget(second: str, tmp_path: Path) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    with duet_vlm.attach(model, f"quecc+{second}", budget=0.3, quecc_seed=3) as handle:
        logits = forward(model, inputs).logits
        report = handle.report()
        assert report.measured_mean == report.nominal_mean <= 0.3 * 36 + 1e-9 and len(set(report.measured)) > 1
        file = handle.save_weights(tmp_path / "w.safetensors")
    with duet_vlm.attach(model, f"quecc+{second}", budget=0.3, quecc_weights=str(file)):
        assert torch.equal(forward(model, inputs).logits, logits)


# ---- its file


@pytest.mark.parametrize("method", [*OWN, "code"])
def test_weights_come_back_bit_by_bit(method: str, tmp_path: Path) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs(MIXED)
    name, more = ("vqtoken", CODE["vqtoken"]) if method == "code" else (method, OWN[method])
    with duet_vlm.attach(model, name, keep=0.4, seed=5, **more) as handle:
        for weight in handle.module.parameters():  # type: ignore[union-attr]
            nn.init.normal_(weight, std=0.3)
        expected = forward(model, inputs).logits
        file = handle.save_weights(tmp_path / "weights.safetensors")
        with pytest.raises(ValueError, match="detach and attach again"):
            handle.set(weights=str(file))
        assert handle.set(keep=0.5).plan(36).entry == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]
    with duet_vlm.attach(model, name, keep=0.4, **more):
        assert not torch.equal(forward(model, inputs).logits, expected)
    for how in (0, 1):
        with duet_vlm.attach(model, name, keep=0.4, **more, **({"weights": str(file)} if how else {})) as handle:
            if not how:
                handle.load_weights(file)
            assert torch.equal(forward(model, inputs).logits, expected)


def test_new_weights_are_those_of_the_seed() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))
        before = torch.random.get_rng_state()
        with duet_vlm.attach(model, "quecc", keep=0.4, seed=seed):
            made.append(forward(model, inputs).logits)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("method", ["quecc", "resampler", "vqtoken"])
def test_a_module_that_has_learned_nothing_is_told(method: str, tmp_path: Path) -> None:
    """Its answers would look like any others; one that is loaded, and a method without weights, say nothing."""
    model = shared("llava")
    with pytest.warns(NewWeights, match=f"{method}: its module is new and has learned nothing.*or give weights=FILE"):
        handle = duet_vlm.attach(model, method, budget=4)
    with handle:
        file = handle.save_weights(tmp_path / "some.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, settings in ((method, {"weights": str(file)}), ("pool", {})):
            duet_vlm.attach(model, name, budget=4, **settings).detach()


def test_a_checkpoint_remembers_its_weights(tmp_path: Path) -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([TWO])
    with duet_vlm.attach(model, "resampler", budget=9, seed=2) as handle:
        expected = forward(model, inputs).logits
        duet_vlm.save_to_config(handle)
        handle.save_weights(tmp_path)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["duet_vlm"]["settings"] == {"seed": 2, "weights": BESIDE}
    again = type(model).from_pretrained(tmp_path).eval()
    for place in (tmp_path, again, again.config):
        assert duet_vlm.load_from_config(place)["settings"]["weights"] == str(tmp_path / BESIDE)  # type: ignore[index]
    with duet_vlm.attach(again) as handle:
        assert handle.budget == 9 and torch.equal(forward(again, inputs).logits, expected)


def message(call: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def test_what_cannot_be_loaded_is_one_clear_sentence(tmp_path: Path) -> None:
    model = shared("llava")
    with duet_vlm.attach(model, "quecc", keep=0.4) as handle:
        file = str(handle.save_weights(tmp_path / "quecc.safetensors"))
        assert "a .safetensors file" in message(lambda: handle.save_weights(tmp_path / "quecc.bin"))
    with duet_vlm.attach(model, "pool", keep=0.4) as handle:
        assert handle.module is None
        assert "pool has no weights of its own" in message(lambda: handle.save_weights(tmp_path))
        assert "pool has no weights of its own" in message(lambda: handle.load_weights(tmp_path))

    def refused(family: str = "llava", method: str = "quecc", **changes: Any) -> str:
        fresh = shared(family)
        names = [name for name, _ in fresh.named_modules()]
        said = message(lambda: duet_vlm.attach(fresh, method, **{"keep": 0.4, "weights": file} | changes))
        assert [name for name, _ in fresh.named_modules()] == names and duet_vlm.handle_of(fresh) is None
        return said

    assert "were trained for a model with family llava, here it is qwen2_5_vl; train some" in refused("qwen2_5_vl")
    wider = build("llava")
    with duet_vlm.attach(wider, "quecc", keep=0.4) as handle:
        other = handle.save_weights(tmp_path / "wider.safetensors")
        said = handle.adapter.vision_dims().width
    tensors, metadata = load_file(other), safe_open(other, "pt").metadata()
    save_file(
        tensors,
        other,
        {name: text.replace(f'"rows of width": {said}', '"rows of width": 64') for name, text in metadata.items()},
    )
    # another tower
    assert f"were trained for a model with rows of width 64, here it is {said}" in refused(weights=str(other))
    assert "were trained for a model with method quecc, here it is resampler" in refused(method="resampler")
    assert "were trained with kernel=4, the settings say 2" in refused(kernel=2)
    assert "no such file; train some for this model with 'duet-vlm train --method quecc'" in refused(
        weights=str(tmp_path / "none.safetensors")
    )
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    assert "are no weights of a compressor" in refused(weights=str(tmp_path / "broken.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "are no weights of a compressor" in refused(weights=str(tmp_path / "other.safetensors"))
    assert "heads=7: rows of this model are 32 numbers wide" in refused(weights=None, heads=7)
    assert "weights=3: give the path" in message(lambda: duet_vlm.get_method("quecc")(weights=3))
    assert "cls_token=True: quecc makes its rows of patches" in message(
        lambda: duet_vlm.get_method("quecc")(options=TokenOptions(cls_token=True, positions="compact"))
    )
    assert load_file(file)


def test_a_question_that_is_not_there_is_asked_for() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    with duet_vlm.attach(model, "quecc", keep=0.4), pytest.raises(ValueError, match="quecc chooses by the question"):
        model.get_image_features(inputs["pixel_values"])


# ---- beside PEFT, in either order

TARGETS = (r".*language_model.*\.(q_proj|v_proj)", ["q_proj", "v_proj"], "all-linear")
FROZEN = "all weights of its own module are frozen .* and untrained"


def adapted(model: nn.Module, target: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False, **options))


def one_step(model: nn.Module) -> dict[str, Tensor]:
    """What learns, behind a step of SGD."""
    weights = {
        name.rpartition("base_model.model.")[2]: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    model.train()
    model(**question_and_answer("llava")).loss.backward()
    torch.optim.SGD(weights.values(), lr=0.1).step()
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize("target", TARGETS, ids=["expression", "names", "all-linear"])
@pytest.mark.parametrize("method", OWN)
def test_peft_in_either_order_trains_the_same(method: str, target: Any, tmp_path: Path) -> None:
    """Adapters go into the layers of the model, whatever the module calls its own, and its file is one that attach
    loads."""
    behind = adapted(build("llava"), target)
    stock = {
        name.rpartition("base_model.model.")[2] for name, weight in behind.named_parameters() if weight.requires_grad
    }
    with duet_vlm.attach(behind, method, **opened(method)):
        expected = one_step(behind)
    core = build("llava")
    handle = duet_vlm.attach(core, method, **opened(method))
    model = adapted(core, target)
    new = {name: weight.detach().clone() for name, weight in handle.module.named_parameters()}  # type: ignore[union-attr]
    handle.module.requires_grad_(True)  # type: ignore[union-attr]
    found = one_step(model)
    own = {name for name in found if "duet_vlm_module" in name}
    assert found.keys() - own == stock and len(own) == len(new)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    learned = load_file(handle.save_weights(tmp_path / "w.safetensors"))
    assert learned.keys() == new.keys() and any(not torch.equal(learned[name], new[name]) for name in new)
    handle.detach()
    with duet_vlm.attach(build("llava"), method, weights=str(tmp_path / "w.safetensors"), **opened(method)) as again:
        assert all(torch.equal(weight, learned[name]) for name, weight in again.module.state_dict().items())  # type: ignore[union-attr]


@pytest.mark.parametrize("method", OWN)
def test_a_module_that_was_frozen_before_it_learned_is_refused(method: str, tmp_path: Path) -> None:
    model, inputs = build("llava"), question_and_answer("llava")
    handle = duet_vlm.attach(model, method, **opened(method))
    with pytest.raises(TypeError, match="leave it out of modules_to_save"):
        adapted(model, TARGETS[0], modules_to_save=["duet_vlm_module"])
    handle.detach()
    model = build("llava")
    handle = duet_vlm.attach(model, method, **opened(method))
    model = adapted(model, TARGETS[0]).train()
    with pytest.raises(
        ValueError, match=f"{method}: {FROZEN}, so the model would learn to read random rows: attach behind"
    ):
        model(**inputs)
    with pytest.raises(ValueError, match=f"{method}: {FROZEN}, so there is nothing to save"):
        handle.save_weights(tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        model(**inputs)  # asking is no training
        model.eval()
    model(**inputs)
    handle.module.requires_grad_(True)  # type: ignore[union-attr]
    one_step(model)
    handle.module.requires_grad_(False)  # type: ignore[union-attr]
    handle.save_weights(tmp_path / "w.safetensors")  # it has learned
    handle.detach()


def test_a_trained_module_may_stay_as_it_is(tmp_path: Path) -> None:
    with duet_vlm.attach(shared("llava"), "resampler", keep=0.4, seed=4) as handle:
        file = str(handle.save_weights(tmp_path / "w.safetensors"))
    core = build("llava")
    handle = duet_vlm.attach(core, "resampler", keep=0.4, weights=file)
    model = adapted(core, TARGETS[0])
    with pytest.warns(
        UserWarning, match="resampler: all weights of its own module are frozen .*, so they stay as they are"
    ):
        one_step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model)  # said once
    with pytest.raises(ValueError, match=r"resampler: layers of its module were replaced .*out.bias"):
        handle.module.out = nn.Sequential(handle.module.out)  # type: ignore[union-attr, assignment]
        handle.save_weights(tmp_path / "other.safetensors")
    handle.detach()


# ---- VQToken's forms


def test_the_code_form_says_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="form='code' reads maps of one size.*give frame=.*form='paper'"):
        duet_vlm.attach(shared("qwen2_5_vl"), "vqtoken", keep=0.4, form="code")
    model, inputs = shared("video_llava"), FAMILIES["video_llava"].inputs(clips_for("video_llava")[:1])
    with duet_vlm.attach(model, "pool", keep=0.4) as handle:
        forward(model, inputs)
        span = handle._prompt_state.spans[0][0].tokens  # type: ignore[union-attr]
    frames = next(n for n in (8, 4, 3, 2) if span % n == 0)
    with duet_vlm.attach(model, "vqtoken", keep=frames + 1, form="code", frame=span // frames) as handle:
        forward(model, inputs)
        assert handle.report().nominal == handle.report().measured
    with duet_vlm.attach(model, "vqtoken", keep=1, form="code", frame=span // frames):
        assert f"makes a row for each of {frames} frames, and 1 may enter" in message(lambda: forward(model, inputs))
    with duet_vlm.attach(model, "vqtoken", keep=9, form="code", frame=span - 1):
        assert f"form='code' reads maps of {span - 1} tokens, {span} are no number of them" in message(
            lambda: forward(model, inputs)
        )


def test_the_paper_form_begins_as_means_of_the_same_length() -> None:
    """Of rows that point one way, a new module gives the mean itself; the released form loses the length."""
    rows = torch.cat(
        [
            normal(1, 1, 1, 32) * torch.tensor([1.0, 2.0, 3.0])[:, None],
            normal(2, 1, 1, 32) * torch.tensor([4.0, 8.0])[:, None],
        ],
        1,
    )
    valid, place = torch.ones(1, 5, dtype=torch.bool), torch.stack([torch.zeros(5).long(), torch.arange(5)], -1)[None]
    plan = duet_vlm.SpanPlan(5, 2, 0, (2,))
    for reducer, scale in ((VQToken(keep=2), (2.0, 6.0)), (VQToken.official(2), None)):
        module = reducer.build_module(_sizes(32), {})
        view = EncoderView(
            valid, torch.tensor([2]), torch.tensor([0]), (plan,), features=rows, parts=torch.zeros(1, 5).long(), coords=place,
            grid_size=torch.tensor([[1, 5]]), crop_grid=torch.zeros(1, 2, dtype=torch.long), module=module, max_parts=(1, 5),
        )  # fmt: skip
        made = merged_rows(rows, reducer.select_tokens(view))
        expected = (
            unit_rows(rows[:, [0, 3]])
            if scale is None
            else torch.stack([rows[0, 0] * scale[0], rows[0, 3] / 4 * scale[1]])[None]
        )
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def _sizes(width: int) -> Any:
    from duet_vlm.reducers.compressor import ModuleSizes

    return ModuleSizes(width, 0, width, None)


# ---- what is told of them


def test_the_trace_says_where_rows_come_from() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    for method, settings_ in (
        ("pool", {}),
        ("quecc", {}),
        ("resampler", {}),
        ("vqtoken", {}),
        ("vqtoken", {"form": "code"}),
    ):
        with duet_vlm.attach(model, method, keep=9, **settings_) as handle:
            forward(model, inputs)
            for span in handle.trace[0]:
                kept = span.stages[0].kept
                assert len(kept) == 9
                if method == "resampler" or settings_:
                    assert all({anchor, *span.merged[anchor]} == set(range(36)) for anchor in kept)
                else:
                    groups = [token for anchor in kept for token in (anchor, *span.merged.get(anchor, ()))]
                    assert sorted(groups) == list(range(36))
                assert not span.stages[0].dropped


def test_tokens_of_every_group_get_the_colour_of_none() -> None:
    from PIL import Image

    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    with duet_vlm.attach(model, "resampler", keep=4) as handle:
        forward(model, inputs)
        span = handle.trace[0][0]
    picture = draw(Image.new("RGB", (84, 84), (255, 255, 255)), span, size=180)
    assert {color for _, color in picture.getcolors(1 << 20)} >= {
        tuple(round(255 * 0.48 + c * 0.52) for c in (150, 150, 158))
    }


def test_each_setting_of_a_module_is_a_setting() -> None:
    for name, cls in duet_vlm.list_methods().items():
        if issubclass(cls, Compressor):
            assert set(cls.module_inputs) <= set(cls().settings()), name
