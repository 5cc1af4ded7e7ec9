"""Measured prefill time of every run, in turns on one batch: the same minutes, the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation.experiment import BASELINE, ExperimentCell
from duet_vlm.evaluation.run_sample import attached, inputs_of
from duet_vlm.evaluation.tasks import TaskQuestion
from duet_vlm.profiling.timing import ratio, time_paired


def prefill_times(
    loaded: LoadedModel, runs: Sequence[ExperimentCell], questions: Sequence[TaskQuestion], rounds: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds per question from pixels and token ids to the first answer token (vision tower included), by run.

    ``ratio`` is the time over the untouched model's, round by round, with the 95 % interval of its median. Attaching is
    not timed.
    """
    inputs = inputs_of(loaded, questions)

    def timed(run: ExperimentCell) -> tuple[Callable[[], Any], Callable[[], contextlib.AbstractContextManager[Any]]]:
        @contextlib.contextmanager
        def around() -> Iterator[None]:
            with (
                contextlib.nullcontext() if run.method == BASELINE else attached(loaded, run, questions),
                torch.no_grad(),
            ):
                yield

        return lambda: loaded.model(**inputs, use_cache=True, logits_to_keep=1), around

    pairs = {run.id: timed(run) for run in runs}
    times = time_paired(
        {name: function for name, (function, _) in pairs.items()},
        repeats=rounds,
        around={name: a for name, (_, a) in pairs.items()},
    )
    each = 1000 / len(questions)
    out: dict[str, dict[str, Any]] = {}
    for name, timing in times.items():
        low, high = timing.quartiles
        relative = ratio(timing, times[BASELINE])
        out[name] = {"ms": each * timing.median, "low": each * low, "high": each * high, "ratio": relative.median}
        out[name] |= {"ratio_interval": [relative.low, relative.high], "rounds": rounds, "batch": len(questions)}
    return out
