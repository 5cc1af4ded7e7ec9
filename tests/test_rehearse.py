"""A rehearsal for accelerators (``make rehearse``): families and methods on tensors that claim to be on one
(``accelerator.py``).

No operation mixes devices, and the answers are those of the host. In a prefill the host reads from the device once
(``usual``), in a decode step never; methods that read more are in ``MORE``, exactly: what is not there may not read
more, what is there may not read less. What the untouched model reads does not count. The host never waits until the
device has taken numbers that the library sends.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator import CUDA, Accelerator, OnDevice, Wait, move, on
from families import FAMILIES, HIDDEN, MIXED, Inputs, build, clips_for, generate, shared
from method_matrix import REDUCING, ROUNDING, TOO_EARLY
from test_llava_like import two_images
from test_tower import fitting, suits
from torch import Tensor, nn

import duet_vlm
from duet_vlm.models.lookup import adapter_for

TOWER: dict[str, dict[str, Any]] = {
    **{name: {"keep": 0.45} for name in ("checkerboard", "contrast", "evit", "key_norm", "motion", "random_patches")},
    "tome_tower": {"keep": 0.5},  # at most half leave in a block
    **{name: {} for name in ("pixelprune", "rlt")},
}
SETTINGS: dict[str, dict[str, Any]] = {"none": {}, **REDUCING, **TOWER}
INSIDE = ("key_norm", "tome_tower")  # reduce behind a block of the tower that works in windows

# What reads more: {function: how often}, for each encoder call or for the decoder, and why.
MORE: dict[str, tuple[str, str, int, str]] = {
    "prunesid": ("call", "principal", 1, "CUDA's eigh says whether it converged"),
    "sieve": ("prompt", "_ridge", len(REDUCING["sieve"]["schedule"]), "eigh, at each drop"),
    "tokencarve": ("prompt", "information", 1, "eigh"),
    "quecc": ("call", "question_state", 1, "the decoder reads questions by themselves, as long as the longest"),
    "pixelprune": ("call", "apply_selection", 1, "a threshold decides how many patches stay"),
    "rlt": ("call", "apply_selection", 1, "a threshold decides how many patches stay"),
}
WINDOWS = {
    "qwen2_5_vl": "which windows of the tower are empty: for each encoder call, and behind a block where patches leave there"
}

# their sisters run every method
ALIKE = ("glm4v_moe", "glm_ocr", "llava_gqa", "mistral3_windows", "qwen3_5_moe", "qwen3_vl_moe")
# and they these
SHAPES = (
    "none",
    "duet",
    "duet_plus",
    "fastv",
    "frames+visionzip+pyramiddrop",
    "key_norm",
    "prumerge",
    "quecc",
    "tokencarve",
)
# rows that are equal (padded cells of a crop, frames that repeat), between which rounding chooses: other kernels, other rows
EQUAL_ROWS = {
    ("idefics3", "images"): ("tome", "zoo_prune"),
    ("smolvlm", "images"): ("tome", "zoo_prune"),
    ("llava_onevision", "clips"): ("zoo_prune",),
}
DEFAULT_TIER = [
    ("llava", "images", ("none", "duet", "fastv", "divprune", "tokencarve", "contrast", "quecc", "resampler")),
    ("qwen2_5_vl", "clips", ("duet", "key_norm", "rlt")),
    ("llava_next", "images", ("duet",)),
]


def runs(family: str, method: str) -> bool:
    if family in ROUNDING.get(method, ()):
        return False
    if family in ALIKE and method not in SHAPES:
        return False
    return family not in TOO_EARLY.get(method, ()) and (method not in TOWER or suits(family, method))


def cells() -> list[Any]:
    found = []
    for family, known in FAMILIES.items():
        for content in ("images", "clips") if known.video else ("images",):
            here = {name for f, c, names in DEFAULT_TIER if (f, c) == (family, content) for name in names}
            for method in filter(functools.partial(runs, family), SETTINGS):
                if method in EQUAL_ROWS.get((family, content), ()):
                    continue
                marks = () if method in here else (pytest.mark.slow,)
                found.append(
                    pytest.param(
                        f"{family}-{content}-{method}".split("-"), id=f"{family}-{content}-{method}", marks=marks
                    )
                )
    return found


@functools.cache
def batch(family: str, content: str) -> Inputs:
    rows = MIXED if content == "images" else clips_for(family)
    return FAMILIES[family].inputs([fitting(family, row) for row in rows])


@functools.cache
def moved(family: str) -> nn.Module:
    """A family's model on the device."""
    with Accelerator():
        return move(build(family))


def asked(device: Accelerator, model: nn.Module, inputs: Inputs) -> tuple[Any, list[list[Wait]]]:
    """What generate() makes, and what the host waited for up to the first token and in each step behind it."""
    device.waits, begins = [], []
    hook = model.register_forward_pre_hook(lambda *_: begins.append(len(device.waits)))
    try:
        output = generate(model, inputs, 2)
    finally:
        hook.remove()
    cuts = [0, *begins[1:], len(device.waits)]
    return output, [device.waits[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


@functools.cache
def stock(family: str, content: str) -> list[Counter[tuple[str, str]]]:
    """What the untouched model waits for."""
    with Accelerator() as device:
        _, phases = asked(device, moved(family), on(batch(family, content)))
    return [Counter((wait.why, wait.line) for wait in phase) for phase in phases]


def added(mine: list[Wait], plain: Counter[tuple[str, str]]) -> list[Wait]:
    """What a run waits for and the untouched model does not."""
    left, found = Counter(plain), []
    for wait in mine:
        if wait.stock and left[wait.why, wait.line]:
            left[wait.why, wait.line] -= 1
        else:
            found.append(wait)
    return found


def function(wait: Wait) -> str:
    return (wait.ours or wait.line).rpartition(" ")[2]


@functools.cache
def reads_of_a_stack(family: str) -> int:
    """What the untouched decoder reads of rows that are no prompt: some families look whether their positions pack
    several prompts."""
    with Accelerator() as device, torch.no_grad():
        FAMILIES[family].text(moved(family))(inputs_embeds=OnDevice(torch.rand(2, 5, HIDDEN)), use_cache=False)
    return len([wait for wait in device.waits if wait.why == "read"])


def reads_of(family: str, content: str, method: str) -> Counter[str]:
    """By function, what the prefill of a cell reads."""
    inputs, streams = batch(family, content), adapter_for(shared(family)).modalities
    calls = [stream for stream in streams if stream.pixels in inputs]
    reads = Counter(
        {
            "read_layout": 1,
            "encoding": sum(stream.sizes is not None for stream in calls),
            "spans_of": int(len(calls) > 1),
        }
    )
    if method in MORE:
        per, where, count, _ = MORE[method]
        reads[where] += count * (len(calls) if per == "call" else 1)
    if method == "zoo_prune" and family.startswith("mistral3"):  # whose projector is given the sizes of the pictures
        reads["_sizes_on_host"] += len(calls)
    if method == "quecc":
        reads["question_state"] += len(calls) * reads_of_a_stack(family)
    if family in WINDOWS and method in TOWER and method not in MORE:
        reads["tables"] += len(calls)
        reads["kept_ends"] += len(calls) * (method in INSIDE)
    return +reads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", cells())
def test_a_prefill_reads_what_it_must_and_a_step_nothing(cell: list[str]) -> None:
    family, content, method = cell
    inputs, plain = batch(family, content), stock(family, content)
    with duet_vlm.attach(shared(family), method, **SETTINGS[method]) as handle:
        expected, trace, report = generate(shared(family), inputs, 2), handle.trace, str(handle.report())
    with Accelerator() as device, duet_vlm.attach(moved(family), method, **SETTINGS[method]) as handle:
        output, phases = asked(device, moved(family), on(inputs))
        assert (handle.trace, str(handle.report())) == (trace, report)
    for mine, theirs in zip(output.logits, expected.logits, strict=True):
        assert mine.device == CUDA and torch.allclose(mine.held, theirs, atol=1e-3)
    prefill, *steps = [added(mine, known) for mine, known in zip(phases, plain, strict=True)]
    sent = [str(wait) for wait in (*prefill, *sum(steps, [])) if wait.why == "upload" and not wait.stock]
    assert not sent, "use ops.ragged.upload"
    assert not [str(wait) for wait in sum(steps, [])]
    reads = [wait for wait in prefill if wait.why == "read"]
    assert Counter(map(function, reads)) == reads_of(family, content, method), "\n".join(map(str, reads))


def test_the_list_of_reasons_names_methods_that_there_are() -> None:
    assert MORE.keys() < SETTINGS.keys() and WINDOWS.keys() < FAMILIES.keys()
    assert {*duet_vlm.list_methods()} <= {*SETTINGS}


# ---- a training step

TRAINED = [
    ("llava", "duet"),
    ("llava", "resampler"),
    ("qwen2_5_vl", "duet"),
    ("llava", "pyramiddrop"),
    ("qwen2_5_vl", "contrast"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*cell, marks=() if cell in TRAINED[:1] else pytest.mark.slow) for cell in TRAINED],
)
def test_a_training_step_reads_what_a_prefill_reads(family: str, method: str) -> None:
    """Nothing more in the way back; gradients are those of the host."""
    inputs = batch(family, "images")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def step(model: nn.Module, place: Callable[[Inputs], Inputs]) -> dict[str, Tensor]:
        model.zero_grad()
        model(**place(inputs | {"labels": labels})).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    host = build(family)
    with duet_vlm.attach(host, method, **SETTINGS[method]):
        expected = step(host, dict)
    with Accelerator() as device:
        step(moved(family), on)
        plain = Counter((wait.why, wait.line) for wait in device.waits)
        with duet_vlm.attach(moved(family), method, **SETTINGS[method]):
            device.waits = []
            found = step(moved(family), on)
            new = added(device.waits, plain)
        moved(family).zero_grad()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(grad.held, expected[name], rtol=1e-2, atol=1e-4) for name, grad in found.items())  # type: ignore[attr-defined]
    assert Counter(function(wait) for wait in new if wait.why == "read") == reads_of(family, "images", method), (
        "\n".join(map(str, new))
    )
    assert not [str(wait) for wait in new if wait.why == "upload" and not wait.stock]


def test_how_many_images_a_sample_has_is_read_once() -> None:
    """LLaVA-OneVision's processor says it, and where there is more than one the model cuts none of them."""
    inputs = two_images()
    with Accelerator() as device:
        _, (plain, _) = asked(device, moved("llava_onevision"), on(inputs))
        with duet_vlm.attach(moved("llava_onevision"), "duet", **SETTINGS["duet"]):
            _, (mine, _) = asked(device, moved("llava_onevision"), on(inputs))
    reads = [wait for wait in added(mine, Counter((wait.why, wait.line) for wait in plain)) if wait.why == "read"]
    assert Counter(map(function, reads)) == {"read_layout": 1, "encoding": 1, "numbers": 1}, "\n".join(map(str, reads))


# ---- the device itself

HOST, ROWS, NUMBER, INDEX = torch.arange(6.0).view(2, 3), torch.ones(2, 3), torch.tensor(2.0), torch.tensor([1, 0])


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + ROWS, lambda x: ROWS + x, lambda x: torch.cat([x, ROWS]), lambda x: x @ ROWS.T, lambda x: x.index_select(0, INDEX),
        lambda x: torch.where(x > 0, x, ROWS), lambda x: ROWS.add_(x), lambda x: ROWS[x[0].long()], lambda x: torch.stack([x[0, 0], NUMBER]),
        lambda x: x.gather(1, INDEX[:, None]), lambda x: NUMBER.add_(x[0, 0]), lambda x: torch.nn.functional.embedding(INDEX, x),
        lambda x: torch.rand(2, generator=torch.Generator(), device=x.device), lambda x: x.masked_fill(ROWS > 0, 0.0),
    ],
)  # fmt: skip
def test_what_cuda_does_not_mix_is_refused(operation: Callable[[Tensor], Any]) -> None:
    with Accelerator(), pytest.raises(RuntimeError, match="device"):
        operation(OnDevice(HOST))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x * NUMBER, lambda x: NUMBER - x, lambda x: torch.where(x > 0, x, NUMBER), lambda x: x[INDEX],
        lambda x: x.masked_fill(x > 1, NUMBER), lambda x: x.view(3, 2).t() @ x.t(), lambda x: torch.arange(3, device=x.device) + x,
        lambda x: torch.zeros_like(x).copy_(x), lambda x: x[:, 1:],
        lambda x: x.cumsum(1).sort(descending=True).indices, lambda x: torch.nn.functional.softmax(x, -1).bfloat16(), lambda x: x.clone().relu_(),
    ],
)  # fmt: skip
def test_the_rest_is_what_it_is_on_the_host(operation: Callable[[Tensor], Tensor]) -> None:
    with Accelerator() as device:
        made = operation(OnDevice(HOST))
        assert made.device == CUDA and made.is_cuda and not [wait for wait in device.waits if wait.why == "read"]
    assert torch.equal(made.held, operation(HOST))  # type: ignore[attr-defined]


READING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(), "bool": lambda x: bool((x > 0).any()), "int": lambda x: int(x[0, 0]), "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(), "where": lambda x: torch.where(x > 1), "cpu": lambda x: x.cpu(), "to": lambda x: x.to("cpu"),
    "mask": lambda x: x[x > 1], "put": lambda x: x.clone().__setitem__(x > 1, 5.0), "select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(), "runs": lambda x: x.unique_consecutive(), "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.long, device=x.device), 0), "index": lambda x: x[x[0, 1].long()],
    "eigh": lambda x: torch.linalg.eigvalsh(x.T @ x), "tensor": lambda x: torch.tensor([x[0, 0]]), "down": lambda x: torch.empty(2, 3).copy_(x),
    "bincount": lambda x: x.flatten().long().bincount(), "range": lambda x: range(x[0, 2].long()), "format": lambda x: f"{x[0, 0]:.1f}",
}  # fmt: skip


@pytest.mark.parametrize("name", READING)
def test_every_read_is_written_down(name: str) -> None:
    with Accelerator() as device:
        READING[name](OnDevice(HOST))
    (wait,) = [wait for wait in device.waits if wait.why == "read"]
    assert wait.line.startswith("test_rehearse.py:") and not wait.ours


def test_uploads_wait_unless_told_not_to() -> None:
    with Accelerator() as device:
        x = torch.tensor([1, 2], device="cuda")
        ROWS.to("cuda"), x.new_tensor([3]), torch.as_tensor([1], device=x.device)
        assert [wait.why for wait in device.waits] == ["upload"] * 4
        (
            ROWS.to("cuda", non_blocking=True),
            torch.full((2,), 3, device="cuda"),
            x.new_zeros(3),
            duet_vlm.ops.ragged.upload([1], x.device),
        )
        x.repeat_interleave(x, output_size=3)
        assert len(device.waits) == 4


def test_numbers_cannot_be_had_behind_its_back() -> None:
    with Accelerator():
        for take in (lambda x: x.numpy(), lambda x: torch.rand(2).numpy() + x.__array__()):
            with pytest.raises(TypeError, match="copy the tensor to host memory"):
                take(OnDevice(HOST))


def test_gradients_come_back_on_the_device() -> None:
    with Accelerator():
        weight = nn.Parameter(OnDevice(HOST.clone()))
        (weight * weight).sum().backward()
        assert weight.grad is not None and weight.grad.device == CUDA
    assert torch.equal(weight.grad.held, 2 * HOST)  # type: ignore[attr-defined]
