"""One question to the full model and to reduced ones, whose answers are written side by side.

Each side answers on a copy of the model's modules that shares its weights, so that no state of a question, or of a
user, affects another. Prompts are run one after the other, so that each time to the first token is its own; all sides
decode together.
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
    """The answer of a side so far.

    Attributes
    ----------
    name, text : str
        Name of the side, and its text.
    tokens : int
        Tokens of the answer.
    first : float or None
        Seconds to the first token.
    done : bool
        The answer is complete.
    error : str
        The error that ended it.
    """

    name: str
    text: str = ""
    tokens: int = 0
    first: float | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class RunRecord:
    """The spans of the prompt under a reduced side.

    Attributes
    ----------
    traces : list of SpanTrace
        Their traces.
    scores : list
        The scores that decided, by stage.
    report : str
        The report.
    mean, tokens : float, int
        Visual tokens per layer, and unreduced.
    depth : int
        Layers of the decoder.
    """

    traces: list[SpanTrace]
    scores: list[list[dict[int, float] | None]]
    report: str
    mean: float
    tokens: int
    depth: int


def same_weights(model: nn.Module) -> Any:
    """A copy of the modules of ``model`` that shares its weights: hooks on the one are not on the other."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class AppSide:
    """One side of the page: the full model (``chosen`` None), or a reduced one.

    Raises
    ------
    ValueError, TypeError
        A method that cannot be attached to this model; the message begins with its name.
    """

    def __init__(self, loaded: LoadedModel, chosen: ChosenMethod | None, uploads: Uploads, question: str) -> None:
        self.name = FULL if chosen is None else chosen.label
        self.loaded, self.shown, self.question = loaded, uploads, question
        self.model = same_weights(loaded.model)
        self.handle = None if chosen is None else _attached(self.model, loaded, chosen.method, chosen)
        self.inputs = loaded.inputs(uploads.pictures, question, uploads.clips)
        if self.handle is None or getattr(self.handle.reducer, "text_query", None) != "salient":
            self.inputs.pop("salient_mask", None)

    def record(self) -> RunRecord:
        """The kept tokens of the last answer, and, from a second pass over the prompt, the scores that decided. Nothing
        for a full model."""
        from duet_vlm.viz import ScoreRecorder

        assert self.handle is not None
        report, (traces,), depth = self.handle.report(), self.handle.trace, len(self.handle.adapter.layers)
        watched = ScoreRecorder(self.handle.reducer)
        again = same_weights(self.loaded.model)
        with _attached(again, self.loaded, watched.reducer, ChosenMethod(self.name, self.handle.budget, {})):
            again.generate(**self.inputs, max_new_tokens=1, do_sample=False)
            scores = [watched.of(trace, number) for number, trace in enumerate(traces)]
        return RunRecord(traces, scores, str(report), report.measured_mean, report.tokens, depth)

    def close(self) -> None:
        if self.handle is not None:
            self.handle.detach()


def _attached(model: nn.Module, loaded: LoadedModel, method: Any, chosen: ChosenMethod) -> Handle:
    from duet_vlm import attach

    query = chosen.settings.get("text_query", getattr(method, "text_query", None))
    processor = loaded.processor if query == "salient" else None
    try:
        return attach(model, method, budget=chosen.budget, processor=processor, **chosen.settings)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(chosen.method) else f"{chosen.method}: {text}") from error


def answers(sides: Sequence[AppSide], longest: int) -> Iterator[list[StreamedText]]:
    """The answers of all sides so far, again and again until all are complete; at most ``longest`` tokens each. Ending
    the iteration ends the answers."""
    stop = threading.Event()
    begun = [threading.Event() for _ in sides]  # the first token has come, or never will
    writers = [_Writer(side, longest, begun, number, stop) for number, side in enumerate(sides)]
    for writer in writers:
        writer.start()
    try:
        before: list[StreamedText] = []
        while not all(text.done for text in before) or not before:
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
    """Writes one side's answer in a thread: waits for the first tokens of the sides before it, and after its own for
    those of all."""

    def __init__(self, side: AppSide, longest: int, begun: Sequence[threading.Event], number: int, stop: threading.Event) -> None:
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
                **self._side.inputs, max_new_tokens=self._longest, do_sample=False, streamer=self._streamer, stopping_criteria=[self._stopped]
            )
            new = out[0, self._side.inputs["input_ids"].shape[1] :].tolist()
            text = str(self._side.loaded.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
            self._last = StreamedText(self._side.name, text, len(new), self._first, True)
        except Exception as error:  # any error belongs on the page, and the other sides continue
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
