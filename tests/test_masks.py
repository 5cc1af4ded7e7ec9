"""Masks of the caller: pictures that are hidden, prompts that are all padding, packed documents, logits asked for by
slot."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, MIXED, ONE, TEXT, THREE, TWO, Picture, Row, forward, generate, shared
from method_matrix import REDUCING, Case, matrix
from torch import Tensor
from transformers import DataCollatorWithFlattening

import duet_vlm
from duet_vlm.models.adapter import SLIDING
from duet_vlm.models.lookup import adapter_for

CLOSE = {"rtol": 1e-3, "atol": 2e-4}
METHODS = ("duet", "fastv", "visionzip", "uniform")


def hidden(family: str, rows: list[Row], sample: int, picture: int) -> dict[str, Tensor]:
    """Inputs with one picture of a sample masked out."""
    inputs = FAMILIES[family].inputs(rows)
    sizes = [FAMILIES[family].tokens(item) for item in rows[sample] if isinstance(item, Picture)]
    places = (inputs["input_ids"][sample] == IMAGE).nonzero().flatten()
    inputs["attention_mask"][sample, places.split(sizes)[picture]] = 0
    return inputs


# ---- hidden pictures


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if not FAMILIES[name].mrope and name not in ("idefics3", "smolvlm")]
)
@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_a_hidden_picture_is_left_out(family: str, method: str) -> None:
    """Beginning and text of the prompt stay: the second picture of the first row counts for nothing, whatever it shows."""
    made, model = FAMILIES[family], shared(family)
    logits = []
    for seed in (3, 9):
        row: Row = (1, Picture(2, 3, 4), 11, Picture(seed, 5, 3), 12, 13, 14)
        inputs = hidden(family, [row, ONE], 0, 1)
        with duet_vlm.attach(model, method, **REDUCING.get(method, {})) as handle:
            logits.append(forward(model, inputs).logits[:, -1])
            slots, real = handle.slots[0].tolist(), inputs["attention_mask"][0].bool()
            text = ((inputs["input_ids"][0] != IMAGE) & real).nonzero().flatten().tolist()
            assert set(text) <= set(slots)
            assert all(real[s] for s in slots if s >= 0)
            assert [len(spans) for spans in handle.trace] == [1, 1]
            report = handle.report()
            assert report.nominal == report.measured
            # nothing is taken out of a prompt that is not reduced
            assert method == "none" or report.predicted == report.observed
            kept = handle.plan(made.tokens(Picture(2, 3, 4))).counts[-1]
            assert len(handle.trace[0][0].stages[-1].kept) == kept
            generate(model, inputs, 3)
    torch.testing.assert_close(*logits, **CLOSE)


@matrix("duet", "fastv", attention=("sdpa",))
def test_a_hidden_picture_in_part_is_refused(case: Case) -> None:
    if FAMILIES[case.family].mrope:
        return  # the stock position code refuses it first
    inputs = FAMILIES[case.family].inputs([ONE, TWO])
    inputs["attention_mask"][1, (inputs["input_ids"][1] == IMAGE).nonzero()[1]] = 0
    with (
        case.attach(),
        pytest.raises(
            ValueError, match=r"attention_mask hides 1 of the \d+ placeholders of image 0 of sample 1: hide all of them"
        ),
    ):
        forward(case.model(), inputs)


@matrix("duet", "fastv", attention=("sdpa",))
def test_all_pictures_hidden(case: Case) -> None:
    """As many rows as the text has: nothing is ranked, nothing is NaN."""
    model = case.model()
    if FAMILIES[case.family].mrope:
        return  # the stock position code wants every picture that was passed
    inputs = hidden(case.family, [ONE], 0, 0)
    with case.attach() as handle:
        logits = forward(model, inputs).logits
        assert torch.isfinite(logits[:, -1]).all() and handle.trace == [[]]
        assert handle.report().measured_mean == 0


@pytest.mark.parametrize("family", ["llava", "llava_gqa", "vipllava"])
def test_a_row_that_is_all_padding(family: str) -> None:
    """Its neighbours are answered as without it."""
    made, model = FAMILIES[family], shared(family)
    inputs = made.inputs([ONE, TEXT, TWO])
    inputs["attention_mask"][1] = 0
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        together = forward(model, inputs).logits[:, -1]
        written = generate(model, inputs, 3)
        for sample, row in ((0, ONE), (2, TWO)):
            torch.testing.assert_close(together[sample], forward(model, made.inputs([row])).logits[0, -1], **CLOSE)
            torch.testing.assert_close(
                written.logits[2][sample], generate(model, made.inputs([row]), 3).logits[2][0], **CLOSE
            )


# ---- logits by slot


@matrix("duet", "fastv", "visionzip", attached_before={"int slots": False, "the last one": True})
def test_logits_are_kept_by_slot(case: Case, attached_before: bool) -> None:
    """``logits_to_keep`` as a tensor: prompt slots of every row, also where rows of the batch lose different numbers."""
    inputs, model = FAMILIES[case.family].inputs(MIXED), case.model()
    width = inputs["input_ids"].shape[1]
    wanted = torch.tensor([width - 1] if attached_before else [width - 4, width - 2, width - 1])
    with case.attach() as handle:
        everything, slots = forward(model, inputs).logits, handle.slots
        found = forward(model, inputs, logits_to_keep=wanted).logits
    assert found.shape[1] == len(wanted)
    for sample, places in enumerate(slots.tolist()):
        for column, slot in enumerate(wanted.tolist()):
            # of a dropped slot: the survivor before it
            row = max(i for i, place in enumerate(places) if 0 <= place <= slot)
            torch.testing.assert_close(found[sample, column], everything[sample, row], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_by_position_are_heeded_like_those_by_name(family: str) -> None:
    """Labels decide which rows predict, the slots kept which logits come back. Some stock models fill in what they name
    themselves, and take nothing behind it by position."""
    model, inputs = shared(family), FAMILIES[family].inputs(MIXED)
    width = inputs["input_ids"].shape[1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    names = list(inspect.signature(model.forward).parameters)

    def by_place(extra: dict[str, Any]) -> Any:
        given, known = inputs | extra, names[: 1 + max(names.index(name) for name in extra)]
        with torch.no_grad():
            return model(*(given.get(name) for name in known), **{k: v for k, v in given.items() if k not in known})

    for extra in ({"labels": labels}, {"logits_to_keep": torch.tensor([width - 3, width - 1])}):
        try:
            by_place(extra)
        except TypeError as error:
            assert "got multiple values for argument 'vision_feature_layer'" in str(error)
            continue
        with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
            named, placed = forward(model, inputs, **extra), by_place(extra)
        assert torch.equal(named.logits, placed.logits)
        assert named.loss is None or torch.equal(named.loss, placed.loss)


# ---- documents packed in one row


def packed(family: str, rows: list[Row]) -> tuple[dict[str, Any], list[int]]:
    """One row of several documents, positions beginning anew with each, as collators that flatten make it; and where
    each document ends."""
    made = FAMILIES[family]
    alone = [made.inputs([row]) for row in rows]
    together = {"input_ids": torch.cat([one["input_ids"] for one in alone], 1)}
    for name in alone[0].keys() - together.keys() - {"attention_mask"}:
        parts = [one[name] for one in alone if name in one]
        together[name] = torch.cat(parts, 1 if name == "mm_token_type_ids" else 0)
    lengths = [one["input_ids"].shape[1] for one in alone]
    together["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return together, torch.tensor(lengths).cumsum(0).tolist()


def blocks(ends: list[int], additive: bool) -> Tensor:
    """The prepared mask of such a row: causal inside each document."""
    number = torch.searchsorted(torch.tensor(ends), torch.arange(ends[-1]), right=True)
    allowed = torch.ones(ends[-1], ends[-1], dtype=torch.bool).tril() & (number[:, None] == number)
    return (
        torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        if additive
        else allowed[None, None]
    )


PACKED: list[Row] = [ONE, THREE, TEXT, TWO]


@pytest.mark.parametrize("how", ["positions", "bool mask", "additive mask"])
@pytest.mark.parametrize("family", ["llava", "llava_gqa", "llava_next", "vipllava", "internvl"])
def test_packed_documents_are_refused_by_name(family: str, how: str) -> None:
    """One row, several prompts: text of the last would rank the pictures of all, and documents would see each other."""
    model = shared(family)
    together, ends = packed(family, PACKED)
    if how != "positions":
        together["attention_mask"] = blocks(ends, how.startswith("additive"))
    for method in ("duet", "fastv", "visionzip"):
        with duet_vlm.attach(model, method, **REDUCING[method]) as handle:
            with pytest.raises(
                ValueError, match=r"sample 0 packs 4 documents in one row .* Give each document a row of its own"
            ):
                forward(model, together, use_cache=False)
            with handle.paused():
                full = forward(model, together, use_cache=False).logits
    torch.testing.assert_close(full, forward(model, together, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_packed_text_is_left_to_the_stock_model(family: str) -> None:
    model = shared(family)
    together, _ = packed(family, [TEXT, (1, 41, 42), TEXT])
    plain = forward(model, together, use_cache=False).logits
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        assert torch.equal(forward(model, together, use_cache=False).logits, plain)


def test_a_flattening_collator() -> None:
    """transformers' own, with pictures beside it: named when it packs, nothing to name with one document."""
    model, made = shared("llava"), FAMILIES["llava"]
    collate = DataCollatorWithFlattening(return_tensors="pt")
    rows = [ONE, TWO]
    features = [{"input_ids": made.expand(row), "labels": made.expand(row)} for row in rows]
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        with pytest.raises(ValueError, match="sample 0 packs 2 documents in one row"):
            forward(
                model, dict(collate(features)) | {"pixel_values": made.inputs(rows)["pixel_values"]}, use_cache=False
            )
        one = forward(
            model, dict(collate(features[:1])) | {"pixel_values": made.inputs([ONE])["pixel_values"]}, use_cache=False
        )
        labels = torch.tensor([made.expand(ONE)])
        torch.testing.assert_close(
            one.loss, forward(model, made.inputs([ONE]), labels=labels.masked_fill(labels.cumsum(1) == 1, -100)).loss
        )


@matrix("duet", "fastv", attention=("sdpa", "eager"))
def test_prepared_masks_of_one_document_are_not_packed(case: Case) -> None:
    """Padding and causality in four dimensions: the rows, and the tokens that are left, are those of the 2-D mask."""
    made, model = FAMILIES[case.family], case.model()
    if (
        made.mrope
        or SLIDING in adapter_for(model).layer_types
        or getattr(model, "_is_stateful", False)
        or case.family == "paligemma"
    ):
        return  # families that make masks of a 2-D one themselves
    for side in ("left", "right"):
        inputs = made.inputs([ONE, TWO], side)
        valid = inputs["attention_mask"].bool()
        allowed = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril() & valid[:, None, None]
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        with case.attach() as handle:
            expected = forward(model, inputs | {"position_ids": positions}).logits
            trace, slots = handle.trace, handle.slots
            for mask in (additive, allowed) if case.attention == "sdpa" else (additive,):
                found = forward(model, inputs | {"attention_mask": mask, "position_ids": positions}).logits
                assert handle.trace == trace and torch.equal(handle.slots, slots)
                torch.testing.assert_close(found[slots >= 0], expected[slots >= 0], **CLOSE)
