"""What is done to the cache of a reduced prompt: masked slots in a later turn, reset, reorder, select, repeat, crop,
copies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, TEXT, TWO, Picture, Row, build, forward, generate, shared
from method_matrix import Case, matrix
from reference_forward import choices_of, walk_batch
from torch import Tensor
from transformers import DynamicCache

import duet_vlm
from duet_vlm.models.adapter import SLIDING
from duet_vlm.models.lookup import adapter_for

CLOSE = {"rtol": 1e-3, "atol": 2e-4}
OTHER: Row = (1, 5, Picture(31, 3, 4), 71, 72)


def hides_nothing(model: Any) -> bool:
    """Windows count the slots that a mask hides, and states of linear layers take them in: in stock models too."""
    return SLIDING not in adapter_for(model).layer_types and not getattr(model, "_is_stateful", False)


def ragged(lists: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of token lists, padded with 0."""
    width = max(map(len, lists))
    pads = [[0] * (width - len(some)) for some in lists]
    ids = torch.tensor([pad + some if side == "left" else some + pad for pad, some in zip(pads, lists, strict=True)])
    return ids, (ids != 0).long()


@matrix("duet", "fastv", "visionzip", side=("left", "right"), padding=("left", "right"))
def test_a_later_turn_of_ragged_length(case: Case, side: str, padding: str) -> None:
    """First answers and second questions of different lengths, hidden slots between them: every row is that of its
    conversation alone."""
    made, model = FAMILIES[case.family], case.model()
    if not hides_nothing(model):
        return
    rows = [ONE, TWO, TEXT] if padding == "left" else [ONE, TWO]
    inputs = made.inputs(rows, padding)
    said = [[33, 34, 35], [36], [37, 38]][: len(rows)]  # after the prompt, of which the last is the question's first
    asked = [[41], [42, 43, 44], [45, 46]][: len(rows)]
    first, first_mask = ragged(said, "right")  # finished samples go on with padding
    second, second_mask = ragged(asked, side)
    masks = torch.cat([inputs["attention_mask"], first_mask, second_mask], 1)
    width = inputs["input_ids"].shape[1]
    with case.attach() as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        choices = choices_of(handle)
        forward(
            model,
            {"input_ids": first, "attention_mask": masks[:, : width + first.shape[1]]},
            past_key_values=cache,
            use_cache=True,
        )
        logits = forward(
            model, {"input_ids": second, "attention_mask": masks}, past_key_values=cache, use_cache=True
        ).logits
    for sample, (row, choice) in enumerate(zip(rows, choices, strict=True)):
        alone = torch.tensor([said[sample] + asked[sample]])
        choice.images = [
            (name, sum(other == name for other, _ in choice.images[:i])) for i, (name, _) in enumerate(choice.images)
        ]
        walk = walk_batch(shared(case.family, "eager"), made.inputs([row]), [choice], alone)[0]
        new = second_mask[sample].bool()
        torch.testing.assert_close(logits[sample][new], walk.logits[-len(asked[sample]) :], **CLOSE)


@matrix("duet", "fastv", attention=("sdpa",))
def test_generation_goes_on_behind_hidden_slots(case: Case) -> None:
    """generate() on a cache whose mask has holes: the same as each conversation alone."""
    made, model = FAMILIES[case.family], case.model()
    if not hides_nothing(model):
        return
    rows, said = [ONE, TWO], [[33, 34, 35], [36]]
    inputs = made.inputs(rows)
    first, first_mask = ragged(said, "right")
    question = torch.tensor([[41, 42], [43, 44]])
    masks = torch.cat([inputs["attention_mask"], first_mask, torch.ones(2, 2).long()], 1)
    with case.attach():
        cache = forward(model, inputs, use_cache=True).past_key_values
        forward(model, {"input_ids": first, "attention_mask": masks[:, :-2]}, past_key_values=cache, use_cache=True)
        together = generate(model, {"input_ids": question, "attention_mask": masks}, 4, past_key_values=cache)
        for sample, row in enumerate(rows):
            cache = forward(model, made.inputs([row]), use_cache=True).past_key_values
            forward(model, {"input_ids": torch.tensor([said[sample]])}, past_key_values=cache, use_cache=True)
            mask = torch.ones(1, len(made.expand(row)) + len(said[sample]) + 2).long()
            alone = generate(
                model, {"input_ids": question[sample][None], "attention_mask": mask}, 4, past_key_values=cache
            )
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[sample], b[0], **CLOSE)


# ---- reset


@pytest.mark.parametrize("how", ["reset", "crop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_used_again(family: str, how: str) -> None:
    """The run dies with its rows: a text prompt, a paused one and another picture on the emptied cache are those of a
    fresh one."""
    model, made = shared(family), FAMILIES[family]
    if how == "crop" and not hides_nothing(model):
        return  # states and windows cannot be cropped, in stock models either

    def answers(row: Row, cache: Any) -> Tensor:
        return torch.stack(generate(model, made.inputs([row]), 3, past_key_values=cache).logits)

    with duet_vlm.attach(model, "duet", budget=0.4) as handle:
        cache = forward(model, made.inputs([ONE]), use_cache=True).past_key_values
        plain = type(DynamicCache(config=model.config.get_text_config()))
        for row, paused in ((TEXT, False), (OTHER, True), (OTHER, False), (TEXT, True)):
            if how == "reset":
                cache.reset()
            else:
                longest = max(layer.get_seq_length() for layer in cache.layers)
                cache.crop(-longest)
            assert how == "crop" or type(cache) is plain and not [name for name in vars(cache) if "duet" in name]
            with handle.paused() if paused else torch.no_grad():
                fresh = answers(row, DynamicCache(config=model.config.get_text_config()))
                assert torch.equal(answers(row, cache), fresh)


# ---- rows of the cache, in another order


def steps(model: Any, cache: Any, mask: Tensor, tokens: list[list[int]]) -> Tensor:
    """Logits of two steps."""
    found = []
    for column in zip(*tokens, strict=True):
        mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
        step = {"input_ids": torch.tensor(column)[:, None], "attention_mask": mask}
        if adapter_for(model).mrope:
            # the stock code has none for another batch; the reduced cache knows its own
            step["position_ids"] = torch.full((3, len(mask), 1), 40)
        found.append(forward(model, step, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found, 1)


@matrix("duet", "fastv", "visionzip", attention=("sdpa",), order=([1, 0, 2], [2, 2], [0, 0, 1, 1, 2, 2], [1]))
def test_the_run_follows_its_rows(case: Case, order: list[int]) -> None:
    """reorder_cache across samples, batch_select_indices, batch_repeat_interleave: what a row continues is its own
    prompt."""
    made, model = FAMILIES[case.family], case.model()
    if getattr(model, "_is_stateful", False) and len(order) != 3:
        return  # states cannot be selected or repeated, in stock models either
    rows = [ONE, TWO, OTHER]
    inputs = made.inputs(rows)
    tokens = [[33, 34], [35, 36], [37, 38]]
    index = torch.tensor(order)
    with case.attach():
        cache = forward(model, inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        usual = steps(model, twin, inputs["attention_mask"], tokens)
        cache.reorder_cache(torch.tensor([2, 0, 1]))  # there and back again
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        if order == [0, 0, 1, 1, 2, 2]:
            cache.batch_repeat_interleave(2)
        elif len(order) == 3:
            cache.reorder_cache(index)
        else:
            cache.batch_select_indices(index)
        found = steps(model, cache, inputs["attention_mask"][index], [tokens[i] for i in order])
    torch.testing.assert_close(found, usual[index], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_crop_stops_at_the_picture(family: str) -> None:
    """Behind the picture rows can be taken back; into it the layers hold different rows."""
    model, made = shared(family), FAMILIES[family]
    if getattr(model, "_is_stateful", False) or not made.drafts:
        return
    inputs = made.inputs([ONE])
    behind = int((inputs["input_ids"][0] == 99).flip(0).int().argmax())
    with duet_vlm.attach(model, "duet", budget=0.4):
        cache = forward(model, inputs, use_cache=True).past_key_values
        expected = steps(model, copy.deepcopy(cache), inputs["attention_mask"], [[33, 34]])
        steps(model, cache, inputs["attention_mask"], [[51, 52]])
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return  # windows forget what cropping would need
        with pytest.raises(
            ValueError, match=rf"crop\(-{behind + 3}\) would cut into the visual tokens .* at most {behind + 2} tokens"
        ):
            cache.crop(-(behind + 3))
        cache.crop(-2)
        torch.testing.assert_close(steps(model, cache, inputs["attention_mask"], [[33, 34]]), expected, **CLOSE)


def test_a_cache_can_be_saved() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE, TWO])
    with duet_vlm.attach(model, "duet", budget=0.4):
        cache = forward(model, inputs, use_cache=True).past_key_values
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        tokens = [[33, 34], [35, 36]]
        expected = steps(model, cache, inputs["attention_mask"], tokens)
        assert torch.equal(steps(model, again, inputs["attention_mask"], tokens), expected)
        assert isinstance(again, DynamicCache) and type(again).__name__ == "DynamicCache"
