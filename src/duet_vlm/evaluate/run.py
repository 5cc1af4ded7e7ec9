"""Run an experiment: questions in batches, every run on each batch, batches shared among processes; then the statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import duet_vlm
from duet_vlm import BudgetError
from duet_vlm.evaluate.answer import Outcome, answer, attached
from duet_vlm.evaluate.experiment import ORACLE, Experiment, Run
from duet_vlm.evaluate.journal import Journal
from duet_vlm.evaluate.results import FORMAT, environment, pack
from duet_vlm.evaluate.source import source
from duet_vlm.evaluate.summary import summarize
from duet_vlm.evaluate.tasks import Question, Task, task
from duet_vlm.evaluate.timing import prefill_times
from duet_vlm.loading import Loaded, load
from duet_vlm.models.find import adapter_for

TIMED_QUESTIONS = 8

Page = dict[str, Any]  # of the journal: the questions of a batch, and what every run made of them


@dataclass(frozen=True)
class Batch:
    """Questions ``first`` to ``last`` - 1 of a seed."""

    seed: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.seed}/{self.first}-{self.last}"

    def questions(self, asked: Task) -> list[Question]:
        return [asked.ask(self.seed, index) for index in range(self.first, self.last)]


@dataclass(frozen=True)
class Job:
    """Runs that a batch still lacks."""

    batch: Batch
    runs: list[Run]


def batches(experiment: Experiment, asked: Task) -> list[Batch]:
    """The same batches however many processes there are and wherever a run was interrupted."""
    count, size = asked.count(experiment.limit), experiment.batch
    return [Batch(seed, first, min(first + size, count)) for seed in experiment.seeds for first in range(0, count, size)]


def run_experiment(
    experiment: Experiment,
    name: str,
    journal: Path,
    *,
    device: str | None = None,
    workers: int = 1,
    timing_rounds: int = 20,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure, and return the result (see :mod:`duet_vlm.evaluate.results`).

    Parameters
    ----------
    name : str
        What the result is called.
    journal : Path
        Record of finished batches; a second call goes on from it, also with other runs on the same questions. One process writes to it at
        a time: hold ``journal.alone`` where another may start.
    device : str, optional
        cuda where there is one, unless given.
    workers : int
        Processes that answer questions, each with one thread and its own copy of the model, on the GPUs of the machine in turn; 1 works in
        this process.
    timing_rounds : int
        Rounds of the prefill timing; 0 leaves it out.
    advance : callable
        Told (finished batches, all batches) now and then.

    Raises
    ------
    ValueError
        Unknown task, method or setting, or a journal that belongs to another measurement or was begun by other code.
    """
    if importlib.util.find_spec("scipy") is None:  # said now, not after hours
        raise ImportError('the statistics of an evaluation need scipy: pip install ".[eval]" in your clone of duet-vlm')
    code = source()
    asked, runs = task(experiment.task), experiment.runs()
    todo = batches(experiment, asked)
    loaded = load(experiment.model, device)
    if experiment.pieces and not asked.clips:
        raise ValueError(f"{' and '.join(experiment.pieces)}: task {asked.name!r} shows no clips; leave it out")
    if asked.clips and not loaded.takes_clips:
        raise ValueError(f"task {asked.name!r} shows clips, and --model {loaded.name} takes pictures only; 'duet-vlm models' says who takes clips")
    facts = model_facts(loaded)
    infeasible = preflight(loaded, runs, todo[0].questions(asked)[:1])
    possible = [run for run in runs if run.id not in infeasible]
    versions = {"duet_vlm": duet_vlm.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "format": FORMAT}
    questions = {key: value for key, value in experiment.to_json().items() if key not in ("cells", "against")}
    diary = Journal(journal, {"questions": questions, "model": facts, "versions": versions, "source code": code.files})
    jobs = [Job(batch, missing) for batch in todo if (missing := _missing(possible, diary.batches.get(batch.name)))]
    advance(len(todo) - len(jobs), len(todo))
    for done, (batch, page) in enumerate(_answered(experiment, jobs, asked, loaded, device, workers), 1):
        diary.add(batch.name, page)
        advance(len(todo) - len(jobs) + done, len(todo))
    pages = [diary.batches[batch.name] for batch in todo]
    outcomes = {run.id: [Outcome(**page["runs"][run.id]) for page in pages] for run in possible}
    outcomes |= {key: [value] for key, value in infeasible.items()}
    times = {}
    if timing_rounds:
        measured = [run for run in possible if all(part.message is None for part in outcomes[run.id])]
        times = prefill_times(loaded, measured, todo[0].questions(asked)[:TIMED_QUESTIONS], timing_rounds)
    asked_for = [Question(q["id"], (), q["text"], tuple(q["answers"]), q["kind"]) for page in pages for q in page["questions"]]
    rows, predictions = summarize(experiment, runs, asked_for, outcomes, times, _solver(loaded))
    kinds = [q.kind for q in asked_for]
    parameter = next(loaded.model.parameters())
    return {
        "format": FORMAT,
        "name": name,
        "task": asked.name,
        "experiment": experiment.to_json(),
        "environment": environment(str(parameter.device), str(parameter.dtype).removeprefix("torch."), workers, code.until(source())),
        "model": facts | {"layers": len(adapter_for(loaded.model).layers)},
        "questions": {
            "count": len(asked_for),
            "unlabelled": sum(not q.answers for q in asked_for),
            "per_seed": asked.count(experiment.limit),
            "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        },
        "runs": rows,
        "predictions": pack(predictions),
    }


def _missing(runs: list[Run], page: Page | None) -> list[Run]:
    return [run for run in runs if page is None or run.id not in page["runs"]]


def preflight(loaded: Loaded, runs: list[Run], first: list[Question]) -> dict[str, Outcome]:
    """Attach every run once before anything long begins: what is infeasible is noted, any other error ends the experiment here.

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


def model_facts(loaded: Loaded) -> dict[str, Any]:
    """Name, family, size and a fingerprint of the weights (the beginning of every parameter)."""
    digest, count = hashlib.sha256(), 0
    for name, parameter in loaded.model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
        count += parameter.numel()
    return {"name": loaded.name, "family": loaded.model.config.model_type, "parameters": count, "weights": digest.hexdigest()[:16]}


def _solver(loaded: Loaded) -> Callable[[Run, int], duet_vlm.SpanPlan]:
    def solve(run: Run, tokens: int) -> duet_vlm.SpanPlan:
        with attached(loaded, run, []) as handle:
            return handle.plan(tokens)

    return solve


# ---- one process or several

_here: dict[str, Any] = {}  # of a worker process


def _answered(
    experiment: Experiment, jobs: list[Job], asked: Task, loaded: Loaded, device: str | None, workers: int
) -> Iterator[tuple[Batch, Page]]:
    if workers < 2 or len(jobs) < 2:
        for job in jobs:
            yield job.batch, _page(loaded, job, asked)
        return
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    places = context.SimpleQueue()
    for place in devices_of(device, min(workers, len(jobs)), torch.cuda.device_count()):
        places.put(place)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (experiment.task, experiment.model, places)) as pool:
        with _without_interrupts():
            futures = {pool.submit(_work, job): job.batch for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                if worker not in others:  # a batch takes long, and nobody waits for it any more
                    worker.terminate()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise RuntimeError("a worker process died (out of memory?); run the same command again to go on, perhaps with fewer --workers") from error


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside do not hear Ctrl-C, which a terminal sends to all of them: this one does, and ends them. Blocked and
    not ignored: what comes in the meantime is heard at the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def devices_of(device: str | None, workers: int, gpus: int) -> list[str | None]:
    """Where each worker runs: on the ``gpus`` of the machine in turn, if GPUs are meant without a number."""
    return [f"cuda:{number % gpus}" if device in (None, "cuda") and gpus else device for number in range(workers)]


def _start(name: str, model: str, places: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _here.update(asked=task(name), loaded=load(model, places.get()))


def _end_with_parent() -> None:
    """A worker whose parent was killed has nobody to work for."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _work(job: Job) -> Page:
    return _page(_here["loaded"], job, _here["asked"])


def _page(loaded: Loaded, job: Job, asked: Task) -> Page:
    questions = job.batch.questions(asked)
    outcomes = answer(loaded, job.runs, questions, asked.max_new_tokens)
    plain = [{"id": q.id, "text": q.text, "answers": list(q.answers), "kind": q.kind} for q in questions]
    return {"questions": plain, "runs": {key: dataclasses.asdict(value) for key, value in outcomes.items()}}
