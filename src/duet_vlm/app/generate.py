"""One question to the full model and to reduced ones, whose answers are written side by side.

Each side answers on a copy of the model's modules that shares its weights, so that nothing of one question, or of one
user, is in the way of another. Prompts are read one after the other, which keeps each time to the first token its own;
what follows is written by all sides together.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duet_vlm.api.loading import LoadedModel
from duet_vlm.app.controls import ChosenMethod
from duet_vlm.app.errors import sentence
from duet_vlm.app.files import Uploads

if TYPE_CHECKING:
    from torch import nn

    from duet_vlm import Handle, SpanTrace

PAUSE = 0.03  # seconds between two looks at what has been written
FULL = "full model"


@dataclass(frozen=True)
class StreamedText:
    """The answer of a side so far: ``tokens`` of answer, seconds to the ``first`` of them; ``error`` where it could not
    go on."""

    name: str
    text: str = ""
    tokens: int = 0
    first: float | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A reduced side's treatment of the spans of the prompt: its trace, the scores that decided by stage, the report,
    layers of the decoder, and by how much its prefill is faster if time follows FLOPs (``bound``)."""

    traces: list[SpanTrace]
    scores: list[list[dict[int, float] | None]]
    report: str
    mean: float
    tokens: int
    depth: int
    bound: float


def same_weights(model: nn.Module) -> Any:
    """Modules of their own over the weights of ``model``, which are not copied: hooks on the one are not on the other."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class AppSide:
    """One answer in the making: the full model's (``asked`` None), or a reduced one's.

    Raises
    ------
    ValueError, TypeError
        What cannot be attached to this model; the method is named in front.
    """

    def __init__(self, loaded: LoadedModel, chosen: ChosenMethod | None, shown: Uploads, question: str) -> None:
        self.name = FULL if chosen is None else chosen.label
        self.loaded, self.shown, self.question = loaded, shown, question
        self.model = same_weights(loaded.model)
        self.handle = None if chosen is None else _attached(self.model, loaded, chosen.method, chosen)
        self.inputs = loaded.inputs(shown.pictures, question, shown.clips)

    def seen(self) -> RunRecord:
        """Tokens that the last answer kept, and, from a second look at the prompt, the scores that decided. A full
        model has nothing to show."""
        from duet_vlm.viz import ScoreRecorder

        assert self.handle is not None
        report, (traces,), depth = self.handle.report(), self.handle.trace, len(self.handle.adapter.layers)
        watched = ScoreRecorder(self.handle.reducer)
        again = same_weights(self.loaded.model)
        with _attached(again, self.loaded, watched.reducer, ChosenMethod(self.name, self.handle.budget, {})):
            again.generate(**self.inputs, max_new_tokens=1, do_sample=False)
            scores = [watched.of(trace, number) for number, trace in enumerate(traces)]
        return RunRecord(traces, scores, str(report), report.measured_mean, report.tokens, depth, report.flops_bound)

    def close(self) -> None:
        if self.handle is not None:
            self.handle.detach()


def _attached(model: nn.Module, loaded: LoadedModel, method: Any, chosen: ChosenMethod) -> Handle:
    from duet_vlm import attach

    try:
        return attach(model, method, budget=chosen.budget, processor=loaded.processor, **chosen.settings)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(chosen.method) else f"{chosen.method}: {text}") from error


def answers(sides: Sequence[AppSide], longest: int) -> Iterator[list[StreamedText]]:
    """Yield the answers of every side, again and again until all have ended; at most ``longest`` tokens each. Ending
    the iteration ends the answers."""
    stop = threading.Event()
    begun = [threading.Event() for _ in sides]  # the first token is there, or never comes
    writers = [_Writer(side, longest, begun, number, stop) for number, side in enumerate(sides)]
    for writer in writers:
        writer.start()
    try:
        before: list[StreamedText] = []
        while not all(said.done for said in before) or not before:
            now = [writer.said() for writer in writers]
            if now != before:
                yield now
            before = now
            time.sleep(PAUSE)
    finally:
        stop.set()
        for writer in writers:
            writer.join()


class _Writer(threading.Thread):
    """Answers for one side: waits until the sides before it have begun, and behind its first token until all have."""

    def __init__(
        self, side: AppSide, longest: int, begun: Sequence[threading.Event], number: int, stop: threading.Event
    ) -> None:
        from transformers import TextIteratorStreamer

        super().__init__(daemon=True)
        self._side, self._longest, self._begun, self._number, self._stop_asked = side, longest, begun, number, stop
        self._text, self._tokens = "", 0
        self._first: float | None = None
        self._last: StreamedText | None = None
        writer = self

        class Streamer(TextIteratorStreamer):
            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:  # tokens arrive on the host
                    writer._arrived()
                super().put(value)

        self._streamer = Streamer(side.loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._start = 0.0

    def run(self) -> None:
        try:
            self._wait(self._begun[: self._number])
            if self._stop_asked.is_set():
                return
            self._start = time.perf_counter()
            out = self._side.model.generate(
                **self._side.inputs,
                max_new_tokens=self._longest,
                do_sample=False,
                streamer=self._streamer,
                stopping_criteria=[self._stopped],
            )
            new = out[0, self._side.inputs["input_ids"].shape[1] :].tolist()
            text = str(self._side.loaded.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
            self._last = StreamedText(self._side.name, text, len(new), self._first, True)
        except Exception as error:  # whatever it is, it belongs on the page, and the other sides go on
            self._last = StreamedText(self._side.name, self._text, self._tokens, self._first, True, sentence(error))
        finally:
            self._begun[self._number].set()

    def said(self) -> StreamedText:
        if self._last is None:
            self._drain()
            return StreamedText(self._side.name, self._text, self._tokens, self._first)
        return self._last

    def _arrived(self) -> None:
        self._tokens += 1
        if self._first is None:
            self._first = time.perf_counter() - self._start
            self._begun[self._number].set()
            self._wait(self._begun)

    def _wait(self, for_: Sequence[threading.Event]) -> None:
        for event in for_:
            while not event.wait(0.1):
                if self._stop_asked.is_set():
                    return

    def _stopped(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), self._stop_asked.is_set(), device=ids.device)

    def _drain(self) -> None:
        queue = self._streamer.text_queue
        while not queue.empty():
            piece = queue.get()
            if isinstance(piece, str):  # the end is marked by something else
                self._text += piece
