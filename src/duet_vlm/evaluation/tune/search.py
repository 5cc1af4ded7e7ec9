"""The search from questions and candidates to the cheapest setting that holds: the full model, times, halving, the
result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation.experiment import BASELINE, ExperimentCell
from duet_vlm.evaluation.planned_prompt import equal_parts, plan_prompt
from duet_vlm.evaluation.results import environment
from duet_vlm.evaluation.run import model_facts
from duet_vlm.evaluation.run_sample import attached, inputs_of
from duet_vlm.evaluation.source import source
from duet_vlm.evaluation.tasks import TaskQuestion, accepted
from duet_vlm.evaluation.timing import prefill_times
from duet_vlm.evaluation.tune.answers import FULL, AnswerSource
from duet_vlm.evaluation.tune.binomial import QuestionSplit, split
from duet_vlm.evaluation.tune.goal import Goal
from duet_vlm.evaluation.tune.halving import RUNGS, Candidate, choose, confirm
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.memory import request_bytes

FORMAT = 1
TIMED = 8  # questions of the prompt that is timed
EXAMPLES = 5  # of lost answers, in the result


@dataclass(frozen=True)
class Preview:
    """Estimated cost of the search, known before it begins: at most so many ``answers``, and ``seconds`` at the full
    model's pace."""

    answers: int
    seconds: float


def search(
    asker: AnswerSource,
    count: int,
    runs: Sequence[ExperimentCell],
    goal: Goal,
    rounds: int = 7,
    preview: Callable[[Preview], bool] = lambda cost: True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Find the cheapest of ``runs`` that meets the goal on the first ``count`` questions.

    Parameters
    ----------
    rounds : int
        Of the timing, every candidate once in each.
    preview : callable
        Called with the estimated cost, after the first batch; False ends the search (the result is None).
    say : callable
        Called with a sentence when a stage begins.

    Returns
    -------
    dict
        The result, plain values: goal, chosen candidate or None, all candidates with their measurements and the reasons
        for dropping them, examples of losses.

    Raises
    ------
    ValueError
        Too few questions, labels that the full model never meets, a model that answers nothing.
    """
    code, loaded = source(), asker.loaded
    split(count, goal.keep)  # too few however the full model does
    said = asker.full(min(asker.batch, count))
    if not preview(_cost(count, len(runs), goal, asker.pace())):
        return None
    say(f"the full model answers {count} questions")
    said |= asker.full(count)
    usable = _usable(asker, said)
    spent = split(len(usable), goal.keep)
    candidates = [Candidate(run) for run in runs]
    timed = usable[: min(TIMED, asker.batch)]
    questions = [asker.question(number) for number in timed]
    say(f"{len(candidates)} candidates: time to the first token")
    times = _times(asker, candidates, timed, questions, rounds)
    _check_costs(loaded, candidates, times, questions[0], goal, asker.task.max_new_tokens)
    say(f"choosing among {sum(not c.reason for c in candidates)} on {spent.choosing} questions")

    def ask(runs_to_ask: Sequence[ExperimentCell], numbers: Sequence[int]) -> Any:
        """Scores of the runs, given the full model's answers."""
        return asker.replies(runs_to_ask, numbers, said)

    testing = usable[spent.choosing : spent.choosing + spent.testing]
    ladder = choose(candidates, usable[: spent.choosing], goal.keep, ask)
    say(f"testing {', '.join(c.name for c in ladder) or 'nothing: no candidate is left'}")
    chosen = confirm(ladder, testing, spent.losses, ask, asker.batch) if ladder else None
    device, kind = next((str(p.device), str(p.dtype).removeprefix("torch.")) for p in loaded.model.parameters())
    return _result(asker, goal, candidates, chosen, times, said, usable, spent) | {
        "environment": environment(device, kind, 1, code.until(source()))
    }


def _cost(count: int, candidates: int, goal: Goal, pace: float) -> Preview:
    spent = split(count, goal.keep)
    halved = spent.choosing * (candidates / 4 + max(RUNGS, candidates / 2) / 4 + max(RUNGS, candidates / 4) / 2)
    answers = count + round(halved) + spent.testing * (RUNGS if goal.keep is not None else 1)
    return Preview(answers, answers * pace)


def _usable(asker: AnswerSource, said: dict[int, str]) -> list[int]:
    """Numbers of the questions that the full model answers, and answers right where that is known."""
    if not any(said.values()):
        raise ValueError(
            f"the full model answers nothing to any of {len(said)} questions: there is nothing to keep; ask something that it answers"
        )
    judged = {number: asker.accepted(number) for number in said}
    usable = [
        number for number, text in said.items() if text and (not judged[number] or accepted(text, judged[number]))
    ]
    if not usable:
        number = next(number for number, labels in judged.items() if labels)
        raise ValueError(
            f"the full model's answer is never one of the labels: to {asker.question(number).text!r} it says {said[number]!r}, the label is "
            f"{judged[number][0]!r}; change the prompt so that it answers in the labels' form, or leave the labels out"
        )
    return usable


def _times(
    asker: AnswerSource,
    candidates: Sequence[Candidate],
    numbers: Sequence[int],
    questions: Sequence[TaskQuestion],
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Time to the first token of all candidates that can run, and of the full model; the others get a reason.

    All are timed in turns, so a single new candidate means timing all again.
    """
    known = asker.journal.batches.get("times")
    if known is None or not {c.name for c in candidates} <= set(known["runs"]):
        refused = {c.name: why for c in candidates if (why := _refusal(asker.loaded, c.run, questions))}
        runs = [FULL, *(c.run for c in candidates if c.name not in refused)]
        measured = prefill_times(asker.loaded, runs, questions, rounds) if len(runs) > 1 else {}
        page = {name: {"message": why} for name, why in refused.items()} | measured
        asker.journal.add("times", {"questions": list(numbers), "runs": page})
        known = asker.journal.batches["times"]
    times = known["runs"]
    for c in candidates:
        c.reason = times[c.name].get("message", "")
        c.ms = times[c.name].get("ms", 0.0)
    if all(c.reason for c in candidates):
        raise ValueError(
            f"none of the {len(candidates)} candidates can run: {candidates[0].name}: {candidates[0].reason}"
        )
    return times


def _refusal(loaded: LoadedModel, run: ExperimentCell, questions: Sequence[TaskQuestion]) -> str:
    """Reason for which a run cannot take these questions; empty if it can."""
    try:
        with attached(loaded, run, questions), torch.no_grad():
            loaded.model(**inputs_of(loaded, questions), logits_to_keep=1)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return ""


def _check_costs(
    loaded: LoadedModel,
    candidates: Sequence[Candidate],
    times: dict[str, dict[str, Any]],
    question: TaskQuestion,
    goal: Goal,
    new: int,
) -> None:
    """Give a reason to the candidates that are ruled out by cost alone."""
    for c in candidates:
        if c.reason:
            continue
        ratio, (_, high) = times[c.name]["ratio"], times[c.name]["ratio_interval"]
        if goal.speedup is not None and 1 / high < goal.speedup:
            c.reason = f"{1 / ratio:.2f} times faster, at least {1 / high:.2f} with 95 %; {goal.speedup:g} asked"
        elif ratio >= 1:
            c.reason = f"no faster than the full model: {ratio:.2f} of its time to the first token"
        elif goal.memory is not None and (bytes_ := _memory(loaded, c.run, question, new)) > goal.memory:
            c.reason = f"{bytes_ / 1e9:.4g} GB predicted for one prompt, {goal.memory / 1e9:.4g} asked"


def _memory(loaded: LoadedModel, run: ExperimentCell, question: TaskQuestion, new: int) -> float:
    """Predicted bytes of weights and of one prompt at its peak."""
    parameters = list(loaded.model.parameters())
    with attached(loaded, run, [question]) as handle, torch.no_grad():
        inputs = inputs_of(loaded, [question])
        loaded.model(**inputs, logits_to_keep=1)
        tokens, adapter = handle.report().tokens, handle.adapter
        passes = equal_parts(adapter, tokens, len(question.images) + len(question.videos))
        sample = plan_prompt(handle, passes, inputs["input_ids"].shape[1] - tokens).sample
        return request_bytes(
            adapter.decoder_dims(), adapter.vision_dims(), sum(p.numel() for p in parameters), sample, new,
            parameters[0].element_size(), cut=handle.reducer.options.trim_kv_cache,
        )  # fmt: skip


def setting(run: ExperimentCell) -> dict[str, Any]:
    """Content of ``duet.json``: method, budget, and the settings other than the method's defaults."""
    return {"method": run.method, "budget": run.budget, "settings": dict(run.settings)}


def _result(
    asker: AnswerSource,
    goal: Goal,
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    times: dict[str, dict[str, Any]],
    said: dict[int, str],
    usable: Sequence[int],
    spent: QuestionSplit,
) -> dict[str, Any]:
    rows = [
        setting(c.run)
        | {
            "id": c.name, "label": c.run.label, "ms": c.ms or None, "speedup": 1 / times[c.name]["ratio"] if c.ms else None,
            "speedup_interval": [1 / edge for edge in reversed(times[c.name]["ratio_interval"])] if c.ms else None,
            "kept": c.kept, "bound": c.bound, "divergence": c.divergence if c.kept is not None else None, "reason": c.reason,
            "choosing": {"asked": c.asked, "lost": c.lost}, "testing": {"asked": c.tested, "lost": c.tested_lost},
        }
        for c in candidates
    ]  # fmt: skip
    example = [] if chosen is None else [_example(asker, chosen, number, said) for number in chosen.losses[:EXAMPLES]]
    labelled = sum(bool(asker.accepted(number)) for number in said)
    return {
        "format": FORMAT,
        "task": asker.task.name,
        "model": model_facts(asker.loaded) | {"layers": len(adapter_for(asker.loaded.model).layers)},
        "goal": dataclasses.asdict(goal) | {"words": goal.words()},
        "questions": {
            "seed": asker.seed,
            "asked": len(said),
            "labelled": labelled,
            "usable": len(usable),
            **dataclasses.asdict(spent),
        },
        "full_ms": times[BASELINE]["ms"],
        "chosen": None if chosen is None else chosen.name,
        "candidates": rows,
        "lost": example,
    }


def _example(asker: AnswerSource, chosen: Candidate, number: int, said: dict[int, str]) -> dict[str, str]:
    question = asker.question(number)
    return {
        "id": question.id,
        "question": question.text,
        "full": said[number],
        "reduced": asker.said(chosen.run, number),
    }
