"""Salient words travel as ``salient_mask``: the processor adds it to its inputs, generate() lets it pass, the handle takes it out again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from duet_vlm.text import salient_mask

SALIENT = "salient_mask"


class SalientProcessor:
    """Gives one processor instance a call that adds ``salient_mask`` [B, S]; ``remove`` undoes it.

    Python looks ``processor(...)`` up on the class, so the instance gets a private subclass of its own class, same name.
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor, self.plain = processor, type(processor)
        plain = self.plain

        @functools.wraps(plain.__call__)
        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            output = plain.__call__(this, *args, **kwargs)
            text = inspect.signature(plain.__call__).bind_partial(this, *args, **kwargs).arguments.get("text")
            if text is not None and "input_ids" in output:
                output[SALIENT] = salient_mask(this.tokenizer, text, output["input_ids"], image_token_id)
            return output

        names = {"__call__": call, "__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        processor.__class__ = type(plain.__name__, (plain,), names)

    def remove(self) -> None:
        self.processor.__class__ = self.plain


def accept_salient(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_inputs_for_generation`` with ``salient_mask`` in its signature: generate() refuses arguments that no signature names."""

    @functools.wraps(prepare)
    def prepare_with_mask(*args: Any, **kwargs: Any) -> Any:
        return prepare(*args, **kwargs)

    signature = inspect.signature(prepare)
    *named, last = signature.parameters.values()
    extra = inspect.Parameter(SALIENT, inspect.Parameter.KEYWORD_ONLY, default=None)
    tail = [extra, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [last, extra]
    prepare_with_mask.__signature__ = signature.replace(parameters=[*named, *tail])  # type: ignore[attr-defined]
    return prepare_with_mask
