"""Training through a reduced model: the loss over survivors, gradients, checkpointing, and which rows rank the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, MIXED, ONE, PAD, TWO, Inputs, build, shared
from method_matrix import OFFICIAL, Case, matrix
from reference_forward import choices_of, walk_batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import duet_vlm
from duet_vlm.reducers.options import TokenOptions

TRAINED = ("duet", "duet_plus", "fastv", "visionzip", "pyramiddrop")
CLOSE = {"rtol": 2e-3, "atol": 2e-5}


def labels_of(inputs: Inputs, answer: int = 3) -> Tensor:
    """Only the last ``answer`` real tokens of each row are supervised."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    from_end = mask.flip(1).cumsum(1).flip(1) * mask
    return ids.masked_fill((from_end > answer) | (from_end == 0) | (ids == IMAGE) | (ids == PAD), -100)


def survivors_loss(logits: Tensor, slots: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The loss by hand: each surviving row predicts the label of the next surviving row. Returns mean and number of
    targets."""
    terms = []
    for row, places, wanted in zip(logits, slots.tolist(), labels, strict=True):
        for j, slot in enumerate(places[1:]):
            if slot >= 0 and wanted[slot] != -100:
                terms.append(cross_entropy(row[j][None].float(), wanted[slot][None]))
    return torch.stack(terms).mean(), len(terms)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


@matrix(*TRAINED, side=("left", "right"))
def test_loss_is_the_loss_over_survivors(case: Case, side: str) -> None:
    model, inputs = case.model(), FAMILIES[case.family].inputs((*MIXED, TWO), side)
    labels = labels_of(inputs)
    with case.attach() as handle, torch.no_grad():
        output = model(**inputs, labels=labels)
        expected, targets = survivors_loss(output.logits, handle.slots, labels)
        assert targets == int((labels[:, 1:] != -100).sum())  # as many as without a reducer
        assert targets >= 11
        torch.testing.assert_close(output.loss, expected)
        summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(6)).loss
        torch.testing.assert_close(summed, expected * targets / 6)
    with torch.no_grad():
        # of 5: reduced answers are others
        assert abs(float(model(**inputs, labels=labels).loss) - float(expected)) > 1e-4


@matrix(*TRAINED, attention=("sdpa",))
def test_gradients_equal_those_of_the_oracle(case: Case) -> None:
    """The choice is not differentiated, everything after it is; with and without checkpointing of either kind."""
    inputs = FAMILIES[case.family].inputs(MIXED)
    labels = labels_of(inputs)
    results: dict[str, dict[str, Tensor]] = {}
    losses = []
    for mode in ("plain", "checkpoint", "checkpoint, reentrant"):
        model = case.fresh().train()
        if mode != "plain":
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": mode.endswith("reentrant")}
            )
        if mode.endswith("reentrant"):
            model.enable_input_require_grads()
        with case.attach(model) as handle:
            output = model(**inputs, labels=labels)
            output.loss.backward()
            choices, slots = choices_of(handle), handle.slots
        losses.append(output.loss.detach())
        results[mode] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    oracle = build(case.family, "eager")
    walks = walk_batch(oracle, inputs, choices, differentiate=True)
    terms = []
    for sample, (walk, choice) in enumerate(zip(walks, choices, strict=True)):
        wanted = labels[sample][inputs["attention_mask"][sample].bool()]
        seen = sorted(choice.visible(7))
        assert seen == [
            s - int((inputs["attention_mask"][sample] == 0).sum()) for s in slots[sample].tolist() if s >= 0
        ]
        terms += [
            cross_entropy(walk.logits[a][None], wanted[b][None])
            for a, b in zip(seen, seen[1:], strict=False)
            if wanted[b] != -100
        ]
    loss = torch.stack(terms).mean()
    expected = gradients(oracle, loss)
    # key biases have gradients that are zero but for rounding
    noise = 1e-6 * max(float(grad.norm()) for grad in expected.values())
    for mode, found in results.items():
        assert set(found) == set(expected), mode
        for name, grad in found.items():
            assert float((grad - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()) + noise, (
                f"{mode}: {name}"
            )
    for other in losses:
        torch.testing.assert_close(other, loss.detach(), **CLOSE)
    seeing = {id(weight) for weight in FAMILIES[case.family].tower(oracle).parameters()}
    seeing_names = {name for name, weight in oracle.named_parameters() if id(weight) in seeing}
    tower = [name for name in expected if name in seeing_names and name.endswith("weight") and "norm" not in name]
    assert len(tower) >= 8 and all(float(results["plain"][name].abs().sum()) > 0 for name in tower)


@matrix(*TRAINED, attention=("sdpa",))
def test_layers_do_not_decide_twice_under_checkpointing(case: Case) -> None:
    """Recomputation replays the forward's decisions: the survivors are those of the plain pass."""
    inputs = FAMILIES[case.family].inputs(MIXED)
    labels = labels_of(inputs)
    traces = []
    for checkpoint in (False, True):
        model = case.fresh().train()
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with case.attach(model) as handle:
            loss = model(**inputs, labels=labels).loss
            before = handle.trace
            loss.backward()
            assert handle.trace == before
            traces.append(before)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_in_between_changes_no_gradient(family: str) -> None:
    """Without gradients a layer takes over the keys that ranked it; that must not last into the next training step."""
    inputs, found = FAMILIES[family].inputs(MIXED), []
    labels = labels_of(inputs)
    for evaluate in (False, True):
        model = build(family).train()
        with duet_vlm.attach(model, "duet", schedule=((3, 0.4), (5, 0.2))):
            if evaluate:
                with torch.no_grad():
                    model(**inputs)
            found.append(gradients(model, model(**inputs, labels=labels).loss))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


# ---- who ranks the tokens in training


def survivors(handle: duet_vlm.Handle, model: nn.Module, inputs: Inputs, **options: Any) -> list[list[tuple[int, ...]]]:
    """Per span the tokens that each stage leaves."""
    with torch.no_grad():
        model(**inputs, **options)
    return [[stage.kept for stage in span.stages] for row in handle.trace for span in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_choose_for_themselves(family: str) -> None:
    """With labels the survivors are those of the prompt alone, whatever the answer says."""
    model, made = shared(family), FAMILIES[family]
    question = (*ONE, 41, 42)
    with duet_vlm.attach(model, "duet", schedule=((3, 0.4), (5, 0.2))) as handle:
        prompt = survivors(handle, model, made.inputs([question]))
        seen = []
        for answer in ((51, 52, 53), (61, 62, 63), (64, 65, 66)):
            inputs = made.inputs([(*question, *answer)])
            labels = labels_of(inputs, 3)
            assert survivors(handle, model, inputs | made.supervised(labels), labels=labels) == prompt
            seen.append(survivors(handle, model, inputs))
        assert any(kept != prompt for kept in seen)  # without labels the answers would have had a say


@pytest.mark.parametrize("family", FAMILIES)
def test_later_questions_do_not_choose_for_earlier_answers(family: str) -> None:
    model, made = shared(family), FAMILIES[family]
    prompts = []
    for start in (25, 60, 71):
        two_turns = made.inputs([(*ONE, 41, 42, 51, 52, *range(start, start + 9), 81, 82)])
        labels = two_turns["input_ids"].clone()
        labels[~torch.isin(labels, torch.tensor([51, 52, 81, 82]))] = -100
        prompts.append(two_turns | made.supervised(labels) | {"labels": labels})
    with duet_vlm.attach(model, "duet", schedule=((3, 0.4), (5, 0.2))) as handle:
        first = survivors(handle, model, made.inputs([(*ONE, 41, 42)]))
        assert all(survivors(handle, model, prompt) == first for prompt in prompts)
        handle.set(options=TokenOptions(training_turns="all"))
        assert any(survivors(handle, model, prompt) != first for prompt in prompts)


@pytest.mark.parametrize("method", ["duet", "pyramiddrop"])
def test_official_presets_leave_unanswered_samples_whole(method: str) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE, TWO])
    labels = labels_of(inputs)
    labels[1] = -100
    with duet_vlm.attach(model, OFFICIAL[method]) as handle, torch.no_grad():
        model(**inputs, labels=labels)
        stages = [[len(span.stages[-1].kept) for span in row] for row in handle.trace]
        plan = handle.plan(36)
        whole = {"duet": plan.entry - 1, "pyramiddrop": 36}[method]  # the fed CLS row is not in the trace
        assert stages[1] == [whole, whole]
        assert stages[0][0] < whole


@pytest.mark.parametrize("family", FAMILIES)
def test_shift_labels_are_refused(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    labels = labels_of(inputs)
    with duet_vlm.attach(model, "duet", budget=0.3), pytest.raises(ValueError, match="shift_labels"):
        model(**inputs, labels=labels, shift_labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["pyramiddrop", "fastv", "duet"])
def test_captions_right_after_the_image(family: str, method: str) -> None:
    """LLaVA pre-training prompts are an image and its caption: no text asks, so the last visual token that is left
    does, at every stage."""
    row = (1, ONE[2], 51, 52, 53)
    inputs = FAMILIES[family].inputs([row])
    labels = labels_of(inputs, 4 if FAMILIES[family].mrope else 3)  # Qwen's end-of-image token comes first
    with Case(family, "sdpa", method, "keep").attach() as handle:
        kept = survivors(handle, shared(family), inputs, labels=labels)
        first = int((labels[0] != -100).nonzero()[0])
        predicts = inputs["input_ids"][0, first - 1] == IMAGE  # the last visual token then never leaves
        assert len(kept[0][-1]) == max(handle.plan(FAMILIES[family].tokens(ONE[2])).counts[-1], int(predicts))  # type: ignore[arg-type]
