"""One batch of questions through every run of an experiment: answers, and their cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import duet_vlm
from duet_vlm import BudgetError, EncoderReducer, Reducer, SpanTrace
from duet_vlm.api.loading import LoadedModel, chat_text
from duet_vlm.evaluation.experiment import ORACLE, ExperimentCell
from duet_vlm.evaluation.shared_vision import SharedVision
from duet_vlm.evaluation.tasks import TaskQuestion
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS


@dataclass(frozen=True)
class Outcome:
    """Result of one run on one batch: sums over its questions, except ``answers``.

    Attributes
    ----------
    answers : tuple of str
        One answer per question.
    spans : int
        Number of images and videos.
    unreduced, nominal, measured : float
        Visual tokens: before any reduction, as planned, and as measured.
    flops, full_flops, kv_bytes, full_kv_bytes : float
        Cost of the run, and of the full model.
    recalls : (float, float, float, float) or None
        Number of questions with known needed tokens, and sums of the shares of these tokens that are kept at the
        decoder's entry, kept or merged there, and kept in the middle of the decoder.
    floor : float or None
        The method's smallest mean token count, where the budget was infeasible.
    message : str or None
        The error of an infeasible run.
    """

    answers: tuple[str, ...] = ()
    spans: int = 0
    unreduced: float = 0.0
    nominal: float = 0.0
    measured: float = 0.0
    flops: float = 0.0
    full_flops: float = 0.0
    kv_bytes: float = 0.0
    full_kv_bytes: float = 0.0
    recalls: tuple[float, float, float, float] | None = None
    floor: float | None = None
    message: str | None = None


def method_of(run: ExperimentCell) -> Reducer:
    """The method whose settings a run sets: a preset or a method of the registry."""
    if run.preset:
        return duet_vlm.preset(run.preset)
    return duet_vlm.make_method(run.method)


@contextlib.contextmanager
def attached(loaded: LoadedModel, run: ExperimentCell, questions: Sequence[TaskQuestion]) -> Iterator[duet_vlm.Handle]:
    """The model with a run's method attached; the oracle receives the needed tokens of these questions."""
    told: dict[str, Any] = (
        {"needed": tuple(part for q in questions for part in needed_parts(q))} if run.method == ORACLE else {}
    )
    with duet_vlm.attach(
        loaded.model, method_of(run), budget=run.budget, processor=loaded.processor, **run.settings | run.pieces, **told
    ) as handle:
        yield handle


def inputs_of(loaded: LoadedModel, questions: Sequence[TaskQuestion]) -> Any:
    """Model inputs of a batch, padded on the left."""
    text = [chat_text(loaded.processor, q.text, len(q.images), len(q.videos)) for q in questions]
    given = {
        "images": [image for q in questions for image in q.images],
        "videos": [clip for q in questions for clip in q.videos],
    }
    pictures = {name: items for name, items in given.items() if items}
    made = loaded.processor(text=text, **pictures, return_tensors="pt", padding=True, padding_side="left")
    return made.to(loaded.model.device, loaded.model.dtype)


def answer(
    loaded: LoadedModel, runs: Sequence[ExperimentCell], questions: Sequence[TaskQuestion], max_new_tokens: int
) -> dict[str, Outcome]:
    """Answers of every run to one batch.

    Inputs are made once; so are the lower vision layers, except for videos, which may pass through the tower in chunks.
    """
    inputs, shared = (
        inputs_of(loaded, questions),
        None if any(q.videos for q in questions) else SharedVision(loaded.model),
    )
    out = {}
    for run in runs:
        try:
            with attached(loaded, run, questions) as handle, sharing(shared, handle.reducer), torch.no_grad():
                made = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
                said = loaded.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                out[run.id] = _outcome(handle, said, questions)
        except BudgetError as error:
            out[run.id] = Outcome(floor=error.floor, message=str(error))
    return out


def sharing(shared: SharedVision | None, reducer: Reducer) -> contextlib.AbstractContextManager[None]:
    """Share the lower vision layers with a method that neither takes signals from them nor runs them on fewer
    patches."""
    return contextlib.nullcontext() if shared is None or reads_elsewhere(reducer) else shared.reused()


def reads_elsewhere(reducer: Reducer) -> bool:
    """True if a method takes signals from other vision layers than the default ones, or runs layers on fewer
    patches."""
    if not isinstance(reducer, EncoderReducer):
        return False
    return reducer.reduces_in_tower or (
        bool(reducer.requires & VISION_LAYER_INPUTS) and set(reducer.signal_layers) != {None}
    )


def _outcome(handle: duet_vlm.Handle, said: list[str], questions: Sequence[TaskQuestion]) -> Outcome:
    report = handle.report()
    return Outcome(
        answers=tuple(text.strip() for text in said),
        spans=sum(len(q.images) + len(q.videos) for q in questions),
        unreduced=report.tokens,
        nominal=report.nominal_mean * report.batch,
        measured=report.measured_mean * report.batch,
        flops=report.observed.flops,
        full_flops=report.full.flops,
        kv_bytes=report.observed.kv_bytes or 0,
        full_kv_bytes=report.full.kv_bytes or 0,
        recalls=_recalls(handle, questions),
    )


def needed_parts(question: TaskQuestion) -> list[Any]:
    """Needed tokens of each image or video of a question, which are of one size; None where they are unknown."""
    if question.needed is None:
        return [None]
    return np.split(np.asarray(question.needed), len(question.images) + len(question.videos))


def _recalls(handle: duet_vlm.Handle, questions: Sequence[TaskQuestion]) -> tuple[float, float, float, float] | None:
    if any(q.needed is None for q in questions):
        return None
    middle = len(handle.report().measured) // 2
    sums = np.zeros(4)
    for q, spans in zip(questions, handle.trace, strict=True):
        kept, total = np.zeros(3), 0
        for part, span in zip(needed_parts(q), spans, strict=True):
            needed = set(np.flatnonzero(part).tolist())
            entry = needed & alive(span, 0)
            merged = needed & {token for members in span.merged.values() for token in members}
            kept += (len(entry), len(entry | merged), len(needed & alive(span, middle)))
            total += len(needed)
        if total:
            sums += (1, *kept / total)
    return tuple(sums.tolist())


def alive(span: SpanTrace, layer: int) -> set[int]:
    """Tokens of a span at the input of decoder layer ``layer``."""
    return set([stage for stage in span.stages if stage.layer <= layer][-1].kept)
