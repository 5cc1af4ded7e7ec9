"""Salient words travel as ``salient_mask``.

The processor adds it to its inputs, generate() lets it pass, the handle takes it out again.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duet_vlm.inputs.text_queries import salient_mask

SALIENT = "salient_mask"
USERS = "_duet_vlm_users"  # of a marking class: the handles that want the mask

_changes = threading.Lock()


class SalientProcessor:
    """Makes a processor's calls add ``salient_mask`` [B, S] for one handle, until ``remove``.

    Python looks ``processor(...)`` up on the class, so the instance gets a private subclass of its own class, same
    name, as long as a handle uses the mask. Copies and pickles of the instance are of its own class.
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor, self.image = processor, image_token_id
        with _changes:
            known = [cls for cls in type(processor).__mro__ if USERS in vars(cls)]
            if not known:
                processor.__class__ = _marking(type(processor))
            self.marking = known[0] if known else type(processor)
            self.users: list[SalientProcessor] = vars(self.marking)[USERS]
            self.users.append(self)

    def remove(self) -> str | None:
        """The last one gives the instance its class back, or names the subclass that somebody else has made of ours
        since."""
        with _changes:
            now = type(self.processor)
            self.users.remove(self)
            if _of(self.users, self.processor) or self.marking not in now.__mro__:
                return None
            if now is not self.marking:
                return f"the processor's class {now.__qualname__}"
            self.processor.__class__ = self.marking.__base__
            return None


def _of(users: list[SalientProcessor], processor: Any) -> list[SalientProcessor]:
    return [user for user in users if user.processor is processor]


def _marking(plain: Any) -> Any:
    """A subclass of a processor's class whose calls add the mask on instances that have users."""
    users: list[SalientProcessor] = []

    @functools.wraps(plain.__call__)
    def call(this: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain.__call__(this, *args, **kwargs)
        text = inspect.signature(plain.__call__).bind_partial(this, *args, **kwargs).arguments.get("text")
        wanted = _of(users, this)
        if wanted and text is not None and "input_ids" in output:
            output[SALIENT] = _mask(this.tokenizer, text, output["input_ids"], wanted[-1].image)
        return output

    def reduce(this: Any, protocol: Any) -> Any:
        made, parts, *rest = plain.__reduce_ex__(this, 1)  # later protocols insist on the instance's own class
        return made, tuple(plain if part is marking else part for part in parts), *rest

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    marking = type(plain.__name__, (plain,), names | {"__call__": call, "__reduce_ex__": reduce, USERS: users})
    return marking


def _mask(tokenizer: Any, text: Any, ids: Any, image: int) -> Any:
    """The mask in the form of the ids: a tensor, an array, or rows of any lengths as lists (one row alone for one
    text)."""
    if isinstance(ids, Tensor):
        return salient_mask(tokenizer, text, ids, image)
    if isinstance(ids, np.ndarray):
        return salient_mask(tokenizer, text, torch.from_numpy(ids), image).numpy()
    if isinstance(text, str) and not (ids and isinstance(ids[0], list)):
        return _mask(tokenizer, [text], [ids], image)[0]
    texts = [text] if isinstance(text, str) else list(text)
    rows = [torch.tensor([row], device="cpu") for row in ids]
    if len(texts) != len(rows):
        raise ValueError(f"{len(texts)} texts for {len(rows)} rows of input_ids")
    return [salient_mask(tokenizer, one, row, image)[0].tolist() for one, row in zip(texts, rows, strict=True)]


def accept_salient(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_inputs_for_generation`` with ``salient_mask`` in its signature.

    Generate() refuses arguments that no signature names.
    """

    @functools.wraps(prepare)
    def prepare_with_mask(*args: Any, **kwargs: Any) -> Any:
        return prepare(*args, **kwargs)

    signature = inspect.signature(prepare)
    *named, last = signature.parameters.values()
    extra = inspect.Parameter(SALIENT, inspect.Parameter.KEYWORD_ONLY, default=None)
    tail = [extra, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [last, extra]
    prepare_with_mask.__signature__ = signature.replace(parameters=[*named, *tail])  # type: ignore[attr-defined]
    return prepare_with_mask
