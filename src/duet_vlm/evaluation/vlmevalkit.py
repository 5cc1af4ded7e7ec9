"""VLMEvalKit: a model for its table ``supported_VLM``. It needs nothing of the kit, and the kit needs only ``generate``
of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duet_vlm.evaluation.lmms.arguments import parse_arguments
from duet_vlm.evaluation.lmms.engine import Engine
from duet_vlm.inputs.images import open_image


class VLMEvalKitModel:
    """Any supported checkpoint with a method attached, one question at a time (the kit asks one by one).

    ``supported_VLM["llava-duet-64"] = functools.partial(Model, "llava-hf/llava-1.5-7b-hf", preset="duet-64")`` in a
    script that then runs the kit's ``run.py``; see docs/evaluate-with-lmms.md.

    Parameters
    ----------
    pretrained, method, budget, preset, settings
        As in ``duet_vlm.evaluation.lmms.run``.
    max_new_tokens : int
    measured : path, optional
        JSON file for tokens, FLOPs and cache bytes, written anew after every answer.
    **loading
        See ``Engine``: dtype, device, attn_implementation, ...
    """

    is_api = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        budget: int | float | None = None,
        preset: str | None = None,
        settings: Mapping[str, Any] | None = None,
        max_new_tokens: int = 1024,
        measured: Path | str | None = None,
        **loading: Any,
    ) -> None:
        self.engine = Engine(pretrained, parse_arguments(method, budget, preset, settings or {}), **loading)
        self.max_new_tokens, self.measured = max_new_tokens, measured

    def set_dump_image(self, dump_image: Callable[[Any], Any]) -> None:
        """The kit offers its image writer here; its own prompts, which this model takes, do not need it."""

    def generate(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to one message of ``{"type": "image" or "text", "value": path or text}`` parts.

        Raises
        ------
        ValueError
            For parts that are neither.
        """
        conversation = [{"role": "user", "content": [_part(part["type"], part["value"]) for part in message]}]
        (answer,) = self.engine.answer(dataset or "questions", [conversation], {"max_new_tokens": self.max_new_tokens})
        if self.measured is not None:
            self.engine.write(Path(self.measured))
        return answer


def _part(kind: str, value: str) -> dict[str, Any]:
    if kind == "image":
        return {"type": "image", "image": open_image(Path(value))}
    return {"type": kind, "text": value}
