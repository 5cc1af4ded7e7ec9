"""Run an experiment: questions in batches, every run on each batch, batches shared among processes; then the
statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import duet_vlm
from duet_vlm import BudgetError
from duet_vlm.api.loading import LoadedModel, load
from duet_vlm.evaluation.experiment import ORACLE, Experiment, ExperimentCell
from duet_vlm.evaluation.journal import CONTENTS, Journal, Page
from duet_vlm.evaluation.ranks import ALONE, WorkerRank, gpus, lacking, recorded, start
from duet_vlm.evaluation.results import FORMAT, environment, pack, versions
from duet_vlm.evaluation.run_sample import Outcome, answer, attached
from duet_vlm.evaluation.source import Source, source
from duet_vlm.evaluation.summary import summarize
from duet_vlm.evaluation.tasks import Task, TaskQuestion, task
from duet_vlm.evaluation.timing import prefill_times
from duet_vlm.models.lookup import adapter_for

TIMED_QUESTIONS = 8


@dataclass(frozen=True)
class QuestionBatch:
    """Questions ``first`` to ``last`` - 1 of a seed."""

    seed: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.seed}/{self.first}-{self.last}"

    def questions(self, chosen_task: Task) -> list[TaskQuestion]:
        return [chosen_task.ask(self.seed, index) for index in range(self.first, self.last)]


def batches(experiment: Experiment, chosen_task: Task) -> list[QuestionBatch]:
    """The batches of an experiment: the same however many processes there are and wherever a run was interrupted."""
    count, size = chosen_task.count(experiment.limit), experiment.batch
    return [
        QuestionBatch(seed, first, min(first + size, count))
        for seed in experiment.seeds
        for first in range(0, count, size)
    ]


@dataclass(frozen=True)
class RunAnswers:
    """All answers of an experiment, with the model that is to be timed.

    Attributes
    ----------
    experiment : Experiment
        The experiment.
    loaded : LoadedModel
        Its model.
    pages : list of Page
        Pages of all batches in their order.
    infeasible : dict of str to Outcome
        The runs whose budget was infeasible.
    code : Source
        The code that answered.
    processes : int
        Number of processes that answered.
    contents : str or None
        Digest of the questions.
    """

    experiment: Experiment
    loaded: LoadedModel
    pages: list[Page]
    infeasible: dict[str, Outcome]
    code: Source
    processes: int
    contents: str | None = None

    def result(self, name: str, timing_rounds: int) -> dict[str, Any]:
        """The content of a result file (see :mod:`duet_vlm.evaluation.results`); ``timing_rounds`` as of
        :func:`run_experiment`."""
        experiment, loaded = self.experiment, self.loaded
        chosen_task, runs = task(experiment.task), experiment.runs()
        possible = [run for run in runs if run.id not in self.infeasible]
        outcomes = {run.id: [Outcome(**page["runs"][run.id]) for page in self.pages] for run in possible}
        outcomes |= {key: [value] for key, value in self.infeasible.items()}
        times = {}
        if timing_rounds:
            measured = [run for run in possible if all(part.message is None for part in outcomes[run.id])]
            times = prefill_times(
                loaded,
                measured,
                batches(experiment, chosen_task)[0].questions(chosen_task)[:TIMED_QUESTIONS],
                timing_rounds,
            )
        asked_for = [
            TaskQuestion(q["id"], (), q["text"], tuple(q["answers"]), q["kind"])
            for page in self.pages
            for q in page["questions"]
        ]
        rows, predictions = summarize(experiment, runs, asked_for, outcomes, times, _solver(loaded))
        kinds = [q.kind for q in asked_for]
        parameter = next(loaded.model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        return {
            "format": FORMAT,
            "name": name,
            "task": chosen_task.name,
            "experiment": experiment.to_json(),
            "environment": environment(str(parameter.device), dtype, self.processes, self.code.until(source())),
            "model": model_facts(loaded) | {"layers": len(adapter_for(loaded.model).layers)},
            "questions": {
                "count": len(asked_for),
                "unlabelled": sum(not q.answers for q in asked_for),
                "per_seed": chosen_task.count(experiment.limit),
                "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
                **({} if self.contents is None else {"contents": self.contents}),
            },
            "runs": rows,
            "predictions": pack(predictions),
        }


def run_experiment(
    experiment: Experiment,
    name: str,
    journals: Path,
    *,
    device: str | None = None,
    workers: int = 1,
    timing_rounds: int = 20,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure, and return the result (see :mod:`duet_vlm.evaluation.results`).

    Parameters
    ----------
    name : str
        Name of the result.
    timing_rounds : int
        Rounds of the prefill timing; 0 omits it.

    The other parameters and the errors are those of :func:`gather`.
    """
    answers = gather(experiment, journals, device=device, workers=workers, advance=advance)
    assert answers is not None  # the share of a process that is alone is everything
    return answers.result(name, timing_rounds)


def gather(
    experiment: Experiment,
    journals: Path,
    *,
    device: str | None = None,
    workers: int = 1,
    worker: WorkerRank = ALONE,
    advance: Callable[[int, int], None] = lambda done, total: None,
    over: Callable[[], bool] = lambda: False,
) -> RunAnswers | None:
    """Answer this process's share of the questions; return all answers, or None as long as other processes have not
    answered theirs.

    Parameters
    ----------
    journals : Path
        Folder with the record of finished batches, a file for each ``worker``; a second call continues from it, also
        with other runs on the same questions. One process writes to a file at a time: hold ``journal.alone`` where
        another may start.
    device : str, optional
        cuda where there is one, unless given.
    workers : int
        Processes that answer questions, each with one thread, its own copy of the model and a journal of its own, on the
        GPUs of the machine in turn; 1 works in this process.
    worker : WorkerRank
        The rank of this process among those that share the questions.
    advance : callable
        Called with (finished batches, all batches) of this process's share now and then.
    over : callable
        Returns True if the result exists already, made by another process.

    Raises
    ------
    ValueError
        Unknown task, method or setting, or a journal that belongs to another measurement or was begun by other code.
    RuntimeError
        A worker process died, or could not answer.
    """
    if importlib.util.find_spec("scipy") is None:  # said now, not after hours
        raise ImportError('the statistics of an evaluation need scipy: pip install ".[eval]" in your clone of duet-vlm')
    code = source()
    chosen_task, runs = task(experiment.task), experiment.runs()
    todo = {batch.name: batch for batch in batches(experiment, chosen_task)}
    first = next(iter(todo.values())).questions(chosen_task)[:1]
    loaded = load(experiment.model, device)
    if experiment.pieces and not chosen_task.clips:
        raise ValueError(f"{' and '.join(experiment.pieces)}: task {chosen_task.name!r} shows no clips; leave it out")
    if chosen_task.clips and not loaded.takes_clips:
        raise ValueError(
            f"task {chosen_task.name!r} shows clips, and --model {loaded.name} takes pictures only; 'duet-vlm models' says who takes clips"
        )
    infeasible = preflight(loaded, runs, first)
    possible = {run.id: run for run in runs if run.id not in infeasible}
    questions = {key: value for key, value in experiment.to_json().items() if key not in ("cells", "against")}
    subject = {
        "questions": questions,
        "model": model_facts(loaded),
        "versions": versions() | {"format": FORMAT},
        "source code": code.files,
    }
    if (contents := chosen_task.digest(chosen_task.count(experiment.limit))) is not None:
        subject[CONTENTS] = contents
    journal = Journal(journals / f"{worker.rank}.jsonl", subject)

    def work(parts: dict[str, list[str]]) -> Generator[tuple[str, Page], None, None]:
        for name, missing in parts.items():
            yield name, _page(loaded, todo[name], [possible[run] for run in missing], chosen_task)

    def watch() -> None:
        advance(len(todo) - len(lacking(list(todo), list(possible), journal.together())), len(todo))

    left = lacking(list(todo), list(possible), journal.together()) if workers > 1 else {}
    if len(left) > 1:
        kept = f"finished answers are kept in {journals}: give the same command again to go on, with fewer --workers if memory was short"
        places = devices_of(device, min(workers, len(left)), gpus())
        with _aside(loaded):
            start(partial(_share, experiment, journals), places, kept, watch)
    pages = recorded(journal, worker, list(todo), list(possible), work, advance=advance, over=over)
    if pages is None:
        return None
    return RunAnswers(
        experiment, loaded, [pages[name] for name in todo], infeasible, code, max(workers, worker.world), contents
    )


def preflight(loaded: LoadedModel, runs: list[ExperimentCell], first: list[TaskQuestion]) -> dict[str, Outcome]:
    """Attach every run once before anything long begins: infeasible runs are noted, any other error ends the experiment
    here.

    Raises
    ------
    ValueError
        Naming the run.
    """
    out = {}
    for run in runs:
        if run.method == ORACLE and any(q.needed is None for q in first):
            raise ValueError(f"{run.id}: this task does not say which tokens its answers need; leave the oracle out")
        try:
            with attached(loaded, run, first):
                pass
        except (ValueError, TypeError) as error:
            if not isinstance(error, BudgetError) or error.floor is None:  # no budget at all, or a wrong setting
                raise ValueError(f"{run.id}: {error}") from error
            out[run.id] = Outcome(floor=error.floor, message=str(error))
    return out


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """Name, family, size and a fingerprint of the weights (the beginning of every parameter)."""
    digest, count = hashlib.sha256(), 0
    for name, parameter in loaded.model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
        count += parameter.numel()
    return {
        "name": loaded.name,
        "family": loaded.model.config.model_type,
        "parameters": count,
        "weights": digest.hexdigest()[:16],
    }


def _solver(loaded: LoadedModel) -> Callable[[ExperimentCell, int], duet_vlm.SpanPlan]:
    def solve(run: ExperimentCell, tokens: int) -> duet_vlm.SpanPlan:
        with attached(loaded, run, []) as handle:
            return handle.plan(tokens)

    return solve


# ---- one process or several


def devices_of(device: str | None, workers: int, gpus: int) -> list[str | None]:
    """Device of each worker: the ``gpus`` of the machine in turn, if GPUs are meant without a number."""
    return [f"cuda:{number % gpus}" if device in (None, "cuda") and gpus else device for number in range(workers)]


@contextlib.contextmanager
def _aside(loaded: LoadedModel) -> Iterator[None]:
    """Move this process's model off its GPU while workers answer; it is timed afterwards."""
    where = next(loaded.model.parameters()).device
    loaded.model.to("cpu")
    if where.type == "cuda":
        torch.cuda.empty_cache()
    yield
    loaded.model.to(where)


def _share(experiment: Experiment, journals: Path, rank: WorkerRank, device: str | None) -> None:
    """One of several processes of a machine."""
    torch.set_num_threads(1)
    gather(experiment, journals, device=device, worker=rank)


def _page(loaded: LoadedModel, batch: QuestionBatch, runs: list[ExperimentCell], chosen_task: Task) -> Page:
    questions = batch.questions(chosen_task)
    outcomes = answer(loaded, runs, questions, chosen_task.max_new_tokens)
    plain = [{"id": q.id, "text": q.text, "answers": list(q.answers), "kind": q.kind} for q in questions]
    return {"questions": plain, "runs": {key: dataclasses.asdict(value) for key, value in outcomes.items()}}
