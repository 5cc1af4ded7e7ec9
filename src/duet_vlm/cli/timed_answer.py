"""A greedy answer, written while it is decoded, and timed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from duet_vlm.api.loading import LoadedModel


@dataclass(frozen=True)
class TimedAnswer:
    """The text of an answer, its ``tokens``, and the seconds to the first and to the last of them."""

    text: str
    tokens: int
    first_token: float
    seconds: float

    def timing(self) -> str:
        return f"{self.first_token:.3g} s to the first token, {self.seconds:.3g} s to the last of {self.tokens}"


def timed_answer(loaded: LoadedModel, inputs: Any, max_new_tokens: int, show: bool) -> TimedAnswer:
    """Greedy answer of the model in its current state, to token ids or to embeddings; with ``show`` it is written to
    stdout while it is decoded."""
    from transformers import TextStreamer

    class Screen(TextStreamer):
        first: float | None = None

        def put(self, value: Any) -> None:
            # the prompt comes first; tokens arrive on the host
            if not self.next_tokens_are_prompt and self.first is None:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if show:
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

    streamer = Screen(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()
    end = time.perf_counter()
    text = str(loaded.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
    return TimedAnswer(text, len(new), (streamer.first or end) - start, end - start)
