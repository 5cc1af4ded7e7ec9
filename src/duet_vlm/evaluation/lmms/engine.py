"""A checkpoint with a method attached that answers batches of conversations and counts their cost. Needs no harness."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.lmms.arguments import ModelArguments, cut, generation_of
from duet_vlm.evaluation.lmms.costs import PromptCosts
from duet_vlm.inputs.images import rgb

Conversation = Sequence[Mapping[str, Any]]


class Engine:
    """Stock model and processor, prompts through the chat template, one handle for the whole run.

    Parameters
    ----------
    pretrained : str
        Hub id, folder, or "tiny" for the embedded model.
    chosen : ModelArguments
        The method.
    device, device_map, dtype, attn_implementation : str, optional
        As transformers takes them. Default: cuda if there is one, the checkpoint's own dtype (float32 for "tiny").
    min_pixels, max_pixels : int, optional
        For processors that scale images by these.

    Raises
    ------
    ValueError
        A checkpoint without chat template, or a method that ``duet_vlm.attach`` refuses.
    """

    def __init__(
        self,
        pretrained: str,
        chosen: ModelArguments,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        embedded = pretrained == "tiny"
        path = str(tiny.path()) if embedded else pretrained
        precision = dtype or ("float32" if embedded else "auto")
        loading = _given(attn_implementation=attn_implementation, device_map=device_map)
        self.pretrained, self.chosen = pretrained, chosen
        self.processor = AutoProcessor.from_pretrained(path, **_given(min_pixels=min_pixels, max_pixels=max_pixels))
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"pretrained={pretrained}: its processor has no chat template, so a conversation cannot become a prompt"
            )
        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=precision, use_safetensors=True, **loading
        ).eval()
        if device_map is None:
            self.model.to(device or own_device())
        self.handle = duet_vlm.attach(
            self.model,
            chosen.method,
            budget=chosen.budget,
            processor=self.processor,
            **chosen.fields,
        )
        self.costs: dict[str, PromptCosts] = {}

    def answer(self, task: str, conversations: Sequence[Conversation], generation: Mapping[str, Any]) -> list[str]:
        """Answers to a batch of conversations.

        Parameters
        ----------
        task : str
            What the costs are counted under.
        conversations : sequence
            Messages with ``role`` and ``content``, the latter ``{"type": "text", "text": ...}`` and ``{"type": "image",
            "image": ...}``.
        generation : mapping
            A task's generation settings, see ``generation_of``.

        Raises
        ------
        ValueError
            For content that is neither text nor image.
        """
        parts = [part for conversation in conversations for message in conversation for part in message["content"]]
        other = sorted({part["type"] for part in parts} - {"text", "image"})
        if other:
            raise ValueError(f"task {task} brings {', '.join(other)}: duet_vlm reduces images only")
        images = [rgb(part["image"]) for part in parts if part["type"] == "image"]
        text = [
            self.processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
        ]
        inputs = self.processor(
            images=images or None, text=text, return_tensors="pt", padding=True, padding_side="left"
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        wanted, stops, _ = generation_of(generation)
        out = self.model.generate(**inputs, **wanted)
        costs = self.costs.setdefault(task, PromptCosts())
        if images:
            costs.add(self.handle.report(), len(images))
        said = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [cut(answer, stops) for answer in said]

    def write(self, file: Path) -> None:
        """Write the cost of the run so far, as JSON."""
        reducer = self.handle.reducer
        record = {
            "model": self.pretrained,
            "label": self.chosen.label,
            "method": reducer.name,
            "budget": self.handle.budget,
            "settings": reducer.settings(),
            "tasks": {task: costs.to_json() for task, costs in self.costs.items()},
            "versions": {
                "duet_vlm": duet_vlm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")


def own_device() -> str:
    """This process's accelerator, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
