"""What the library may cost: no attention maps, one device read per prompt and none per decode step, memory linear in
the prompt."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES, FIRST, MIXED, ONE, TEXT, TWO, any_res_crops, build, forward, shared
from method_matrix import REDUCING, Case, matrix, pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import duet_vlm
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops import score

HERE = str(Path(duet_vlm.__file__).parent)
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


def called_from(function: str) -> bool:
    """Whether a function of the library is on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_code.co_filename.startswith(HERE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def called_by_stock(file: str) -> bool:
    """Whether the innermost caller outside torch and this file is that file of transformers."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/site-packages/torch/" in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_filename.endswith(f"/transformers/{file}")


class Reads(TorchDispatchMode):
    """Counts operations whose result the host waits for; checks that run on the CPU only are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def note(self) -> None:
        # given a copy that was read before
        copied = called_from("importance_and_keys") and called_by_stock("vision_utils.py")
        # tensors that are made there
        on_the_host = copied or called_from("num_separator_rows") or called_from("real_patches")
        self.count += not (called_from("check_finite") or called_from("_raise_at_once") or on_the_host)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            self.note()
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[Reads]:
    plain = Tensor.tolist
    reads = Reads()

    def tolist(self: Tensor) -> Any:
        reads.note()
        return plain(self)

    with mock.patch.object(Tensor, "tolist", tolist), reads:
        yield reads


def reads_of(model: Any, inputs: Any, **options: Any) -> tuple[int, Any]:
    with counted_reads() as reads:
        output = forward(model, inputs, **options)
    return reads.count, output


def test_the_counter_counts() -> None:
    with counted_reads() as reads:
        x = torch.ones(3)
        x.tolist()
        x.sum().item()
        bool(x.all())
        int(x[0])
        x.nonzero()
        torch.equal(x, x)
    assert reads.count == 6


def allowed_reads(case: Case) -> int:
    """One where the prompt enters the decoder; where images differ in size, one more for the sizes of an encoder call,
    which the stock code reads several times over; and where the decoder reads the question by itself, its length, and
    what the stock code reads of a mask."""
    requires = duet_vlm.get_method(case.method.split("+")[0])().requires
    return (
        1
        + 2 * (duet_vlm.Input.QUESTION_STATE in requires)
        + any(stream.sizes for stream in adapter_for(case.model()).modalities)
    )


def reads_on_the_way(family: str, attention: str) -> tuple[int, list[int]]:
    """Of a shared model, as it is now: for a prompt that it has seen before, and for each of two steps behind it."""
    model, inputs = shared(family, attention), FAMILIES[family].inputs(MIXED)
    mask = inputs["attention_mask"]
    steps = [
        {"input_ids": torch.full((3, 1), 33), "attention_mask": torch.cat([mask, mask.new_ones(3, n)], 1)}
        for n in (1, 2)
    ]
    if FAMILIES[family].mrope:  # as generate() passes them
        steps = [step | {"position_ids": torch.full((3, 3, 1), 70 + n)} for n, step in enumerate(steps)]
    forward(model, inputs)
    prompt, output = reads_of(model, inputs, use_cache=True)
    return prompt, [reads_of(model, step, past_key_values=output.past_key_values, use_cache=True)[0] for step in steps]


@functools.cache
def stock_reads(family: str, attention: str) -> tuple[int, list[int]]:
    return reads_on_the_way(family, attention)


@matrix(parts=1, beyond=False)  # on further families some methods read more often
def test_one_device_read_per_prompt_and_none_per_step(case: Case) -> None:
    plain, plain_steps = stock_reads(case.family, case.attention)
    with case.attach():
        reduced, reduced_steps = reads_on_the_way(case.family, case.attention)
    assert reduced - plain <= allowed_reads(case)
    assert reduced_steps == plain_steps


@matrix("duet", "fastv", attention=("sdpa",))
def test_training_reads_no_more(case: Case) -> None:
    inputs, model = FAMILIES[case.family].inputs(MIXED), case.model()
    plain, _ = reads_of(model, inputs, labels=inputs["input_ids"])
    with case.attach():
        reduced, _ = reads_of(model, inputs, labels=inputs["input_ids"])
    assert reduced - plain <= allowed_reads(case)


class Sizes(TorchDispatchMode):
    """The largest tensor made by operations of the library (stock modules that it calls, and those it runs inside of,
    left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame is not None and "/site-packages/torch/" in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and frame.f_code.co_filename.startswith(HERE):
            tensors = output if isinstance(output, list | tuple) else [output]
            # an expanded view makes nothing
            storages = (t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))
            self.largest = max(self.largest, *storages, 0)
        return output


@pairs(families=FIRST)
def test_no_map_of_prompt_by_prompt(family: str, method: str) -> None:
    """Twice the text must not make four times the largest tensor: the model itself runs under sdpa, which needs no mask
    here."""
    model, largest = shared(family), []
    for length in (300, 1200):
        row = (*ONE, *[20 + i % 60 for i in range(length)])
        with duet_vlm.attach(model, method, **REDUCING[method]), Sizes() as sizes:
            forward(model, FAMILIES[family].inputs([row]))
        largest.append(sizes.largest)
    assert 0 < largest[1] <= 4.4 * largest[0]


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_column_scores_work_in_blocks(tokens: int) -> None:
    query, key = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
    with Sizes() as sizes:
        score.column_attention(query, key, 0.3)
    assert sizes.largest <= 4 * 2 * score.QUERY_BLOCK * tokens


@matrix(parts=1)
def test_attention_maps_are_never_asked_for(case: Case) -> None:
    """No call inside the model is given output_attentions, and no map comes back."""
    model, asked = case.model(), []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        asked.append(kwargs.get("output_attentions"))

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in model.modules()]
    with case.attach():
        output = forward(model, FAMILIES[case.family].inputs([TWO, TEXT]))
    for handle in handles:
        handle.remove()
    assert output.attentions is None and len(asked) > 50 and not any(asked)


@pytest.mark.parametrize("family", FIRST)
def test_a_stage_that_keeps_none_or_all_does_not_score(family: str) -> None:
    """Ranking costs a key projection of every row; there is nothing to rank where all or none stay."""
    model, calls = shared(family), []
    projections = [layer.self_attn.k_proj for layer in model.model.language_model.layers]
    hooks = [p.register_forward_pre_hook(lambda module, args, i=i: calls.append(i)) for i, p in enumerate(projections)]
    with duet_vlm.attach(model, "duet", schedule=((2, 1.0), (4, 0.5), (6, 0.0))) as handle:
        forward(model, FAMILIES[family].inputs(MIXED))
        ranking = handle.report().observed.ranking_flops
    twice = [i for i in range(8) if calls.count(i) == 2]
    calls.clear()
    with duet_vlm.attach(model, "duet", schedule=((4, 0.5),)) as handle:
        forward(model, FAMILIES[family].inputs(MIXED))
        assert handle.report().observed.ranking_flops == ranking
    for hook in hooks:
        hook.remove()
    assert twice == [4]


@pytest.mark.parametrize(("method", "layer"), [("duet", 3), ("pyramiddrop", 2), ("fastv", 1)])
@pytest.mark.parametrize("family", FIRST)
def test_ranking_flops_are_of_the_rows_that_were_projected(family: str, method: str, layer: int) -> None:
    """A ranking reads the rows in front of its drop; counted on the projections of the first ranked layer."""
    model, seen = shared(family), {"q_proj": [], "k_proj": []}  # type: ignore[var-annotated]
    attention = model.model.language_model.layers[layer].self_attn
    hooks = [
        getattr(attention, name).register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0].shape[1])
        )
        for name, rows in seen.items()
    ]
    settings = REDUCING[method] if method == "fastv" else REDUCING[method] | {"schedule": ((layer, 0.5),)}
    with duet_vlm.attach(model, method, **settings) as handle:
        forward(model, FAMILIES[family].inputs([ONE]))
        ranking = handle.report().observed.ranking_flops
        shape = handle.adapter.decoder_dims()
    for hook in hooks:
        hook.remove()
    # keys are made once, and the layer takes over those it needs
    (rows, handed_over), queries = seen["k_proj"], seen["q_proj"][0]
    assert rows > queries and rows >= handed_over
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    assert (
        ranking
        == 2 * (rows - handed_over) * shape.hidden * narrow
        + 2 * queries * shape.hidden * wide
        + 2 * queries * rows * wide
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_takes_over_what_ranking_made(family: str) -> None:
    """The norm of the rows that are left, bit for bit what the layer would have made; nothing is run twice."""
    model, calls, runs = build(family), [], []
    layer = FAMILIES[family].text(model).layers[FAMILIES[family].ranking(4)]
    norm = layer.input_layernorm
    plain = norm.forward

    def counted(hidden: Tensor) -> Tensor:
        runs.append(hidden.shape[1])
        return plain(hidden)

    norm.forward = counted
    norm.register_forward_hook(lambda module, args, made: calls.append((args[0], made)))
    with duet_vlm.attach(model, "duet", schedule=((4, 0.5),)):
        forward(model, FAMILIES[family].inputs([ONE]))
    (all_rows, _), (left, taken_over) = calls
    assert runs == [all_rows.shape[1]] and left.shape[1] <= all_rows.shape[1]
    assert torch.equal(taken_over, plain(left))


@pytest.mark.parametrize("family", FIRST)
def test_only_survivors_are_projected(family: str) -> None:
    """LLaVA's projector runs on the rows that enter the decoder, merged ones included; a grid merger on every patch,
    and so does the projector of LLaVA-NeXT, which packs and cuts what comes out of it."""
    model, rows = shared(family), []
    projector = getattr(model.model, "multi_modal_projector", None) or model.model.visual.merger
    inner = projector.linear_1 if hasattr(projector, "linear_1") else projector
    hook = inner.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]) as handle:
        forward(model, FAMILIES[family].inputs([ONE]))
        picture: Any = ONE[2]
        plan = handle.plan(FAMILIES[family].tokens(picture))
    hook.remove()
    if family == "llava_next":
        assert rows == [16 * (1 + math.prod(any_res_crops(picture)))]
    else:
        assert rows == [4 * plan.tokens if FAMILIES[family].mrope else plan.entry]
