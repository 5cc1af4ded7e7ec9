"""Answers of the full model and of reduced runs to questions. Every answer is on the disk before it counts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from duet_vlm import BudgetError
from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation.experiment import BASELINE, ExperimentCell
from duet_vlm.evaluation.journal import Journal
from duet_vlm.evaluation.run_sample import attached, inputs_of, sharing
from duet_vlm.evaluation.shared_vision import SharedVision
from duet_vlm.evaluation.tasks import Task, TaskQuestion, accepted
from duet_vlm.evaluation.tune.halving import AnswerScore

FULL = ExperimentCell(BASELINE, label="full model")


@dataclass
class AnswerSource:
    """Answers of a model to the questions of a task, each computed once.

    Attributes
    ----------
    loaded : LoadedModel
        The model.
    task : Task
        The task.
    seed : int
        Its stream of questions.
    batch : int
        Questions per batch.
    journal : Journal
        Record of every page, so that no question is answered twice.
    advance : callable
        Called with the number of new answers.
    """

    loaded: LoadedModel
    task: Task
    seed: int
    batch: int
    journal: Journal
    advance: Callable[[int], None] = lambda answers: None
    # by number, so that no picture is opened only to judge
    _accepted: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def full(self, count: int) -> dict[int, str]:
        """The full model's answers to the first ``count`` questions."""
        out: dict[int, str] = {}
        for numbers in self._batches(range(count)):
            page = self._page("full", numbers, [FULL])
            out |= dict(zip(numbers, page[FULL.id]["answers"], strict=True))
        return out

    def pace(self) -> float:
        """Seconds per answer of the full model, measured now or in an earlier call."""
        pages = [page for name, page in self.journal.batches.items() if name.startswith("full/")]
        whole = sum(page["runs"][FULL.id]["seconds"] * len(page["questions"]) for page in pages)
        return whole / sum(len(page["questions"]) for page in pages)

    def replies(
        self, runs: Sequence[ExperimentCell], numbers: Sequence[int], said: dict[int, str]
    ) -> dict[str, list[AnswerScore] | str]:
        """Scores of reduced runs on questions that the full model got right (``full_answers``: by number); the reason
        for a run that cannot answer."""
        out: dict[str, list[AnswerScore] | str] = {run.id: [] for run in runs}
        for some in self._batches(numbers):
            page = self._page("reduced", some, [run for run in runs if isinstance(out[run.id], list)])
            for run in runs:
                known, recorded = out[run.id], page.get(run.id)
                if isinstance(known, str) or recorded is None:
                    continue
                if recorded["message"] is not None:
                    out[run.id] = recorded["message"]
                    continue
                for number, answer, moved in zip(some, recorded["answers"], recorded["moved"], strict=True):
                    known.append(AnswerScore(not accepted(answer, self.accepted(number) or (said[number],)), moved))
        return out

    def said(self, run: ExperimentCell, number: int) -> str:
        """The answer of a run to a question."""
        return next(
            page["runs"][run.id]["answers"][page["questions"].index(number)]
            for page in self.journal.batches.values()
            # times are of some of the same questions
            if number in page["questions"] and "answers" in page["runs"].get(run.id, ())
        )

    def accepted(self, number: int) -> tuple[str, ...]:
        """The accepted answers of a question; none where the full model's own answer counts as right."""
        if number not in self._accepted:
            self.question(number)
        return self._accepted[number]

    def question(self, number: int) -> TaskQuestion:
        question = self.task.ask(self.seed, number)
        self._accepted[number] = question.answers
        return question

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(numbers), self.batch):
            yield numbers[start : start + self.batch]

    def _page(self, stage: str, numbers: Sequence[int], runs: Sequence[ExperimentCell]) -> dict[str, Any]:
        name = f"{stage}/{hashlib.sha256(repr(list(numbers)).encode()).hexdigest()[:16]}"
        known = self.journal.batches.get(name, {"runs": {}})["runs"]
        missing = [run for run in runs if run.id not in known]
        if missing:
            begun = time.perf_counter()
            made = answers(
                self.loaded, missing, [self.question(number) for number in numbers], self.task.max_new_tokens
            )
            seconds = (time.perf_counter() - begun) / (len(missing) * len(numbers))
            self.journal.add(
                name,
                {
                    "questions": list(numbers),
                    "runs": {key: reply | {"seconds": seconds} for key, reply in made.items()},
                },
            )
        self.advance(len(runs) * len(numbers))
        return self.journal.batches[name]["runs"]


def answers(
    loaded: LoadedModel, runs: Sequence[ExperimentCell], questions: Sequence[TaskQuestion], max_new_tokens: int
) -> dict[str, dict[str, Any]]:
    """By run: ``answers``, and ``moved``, the divergence of each first answer token from the full model's; or
    ``message``, the reason for none."""
    inputs, shared = inputs_of(loaded, questions), SharedVision(loaded.model)
    first = None
    if any(run.method != BASELINE for run in runs):
        with shared.reused(), torch.no_grad():
            first = _logits(loaded.model(**inputs, logits_to_keep=1).logits)
    out: dict[str, dict[str, Any]] = {}
    for run in runs:
        try:
            with attached(loaded, run, questions) as handle, sharing(shared, handle.reducer), torch.no_grad():
                made = loaded.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
        except BudgetError as error:
            out[run.id] = {"answers": [], "moved": [], "message": str(error)}
            continue
        text = loaded.processor.batch_decode(
            made.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        moved = [0.0] * len(questions) if first is None else divergence(first, _logits(made.logits[0])).tolist()
        out[run.id] = {"answers": [said.strip() for said in text], "moved": moved, "message": None}
    return out


def divergence(full: Tensor, reduced: Tensor) -> Tensor:
    """[B] Kullback-Leibler divergence in nats, of [B, V] log-probabilities: cross-entropy with the reduced model minus
    the full model's."""
    return (full.exp() * (full - reduced)).sum(-1).clamp(min=0)


def _logits(logits: Tensor) -> Tensor:
    """[B, V] log-probabilities of [B, V] or [B, 1, V] logits."""
    return logits.reshape(len(logits), -1, logits.shape[-1])[:, -1].float().log_softmax(-1).cpu()
