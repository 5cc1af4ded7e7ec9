"""The model that lmms-eval runs. Only lmms-eval imports this file; it needs the extra ``lmms``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import duet_vlm
from duet_vlm import tiny
from duet_vlm.evaluate.lmms.costs import Costs
from duet_vlm.evaluate.lmms.settings import chosen, cut, fields_of, generation_of


class DuetVLM(lmms):
    """Any supported checkpoint with a method attached; prompts through the processor's chat template, in batches, greedy by default.

    Parameters
    ----------
    pretrained : str
        Hub id, folder, or "tiny" for the embedded model.
    method, budget, preset : optional
        As ``duet_vlm.attach`` and ``duet_vlm.preset`` take them; ``method=none`` is the full model. Default: duet.
    settings : str, optional
        Settings of the method as JSON. Short ones can stand among the arguments: ``text_query=last``.
    batch_size : int
    device, device_map, dtype, attn_implementation : str, optional
        As transformers takes them. Default: cuda if there is one, the checkpoint's own dtype.
    min_pixels, max_pixels : int, optional
        For processors that scale images by these.
    system_prompt : str, optional
        Put in front of every conversation; a text or a file.
    measured : str
        JSON file for tokens, FLOPs and cache bytes of the run.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        budget: int | float | None = None,
        preset: str | None = None,
        settings: str | dict[str, Any] | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        measured: str = "duet_vlm_measured.json",
        max_batch_size: int | None = None,  # lmms-eval passes it to every model
        **fields: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: give a number, 1 or more ('auto' is not supported)")
        self.pretrained, self.batch_size, self.measured = pretrained, int(batch_size), Path(measured)
        self.chosen = chosen(method, budget, preset, fields_of(settings) | fields)
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else ""
        embedded = pretrained == "tiny"
        place = str(tiny.path()) if embedded else pretrained
        loading = {"attn_implementation": attn_implementation, "device_map": device_map}
        self.model = AutoModelForImageTextToText.from_pretrained(
            place,
            dtype=dtype or ("float32" if embedded else "auto"),
            use_safetensors=True,
            **{name: given for name, given in loading.items() if given is not None},
        ).eval()
        if device_map is None:
            self.model.to(device or _own_device())
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.processor = AutoProcessor.from_pretrained(place, **{name: given for name, given in pixels.items() if given is not None})
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"pretrained={pretrained}: its processor has no chat template, so lmms-eval's messages cannot become a prompt")
        c = self.chosen
        salient = getattr(c.method, "text_query", c.fields.get("text_query")) == "salient"
        self.handle = duet_vlm.attach(self.model, c.method, budget=c.budget, processor=self.processor if salient else None, **c.fields)
        self.costs: dict[str, Costs] = {}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers of a task's requests, in their order."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc=f"duet_vlm ({self.chosen.label})") as bar:
            for task, generation, numbers in self._batches(requests):
                conversations = [self._messages(requests[number].args) for number in numbers]
                answers |= zip(numbers, self._answer(task, conversations, generation), strict=True)
                bar.update(len(numbers))
        self._write()
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("duet_vlm answers by generating: take a task with output_type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("duet_vlm does not run multi-round tasks: a reduced cache takes no new images")

    # ---- inside

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any], list[int]]]:
        """(task, its generation settings, numbers of up to ``batch_size`` requests)."""
        groups: dict[tuple[str, str], list[int]] = {}
        for number, request in enumerate(requests):
            _, _, generation, _, task, _ = request.args
            groups.setdefault((task, json.dumps(generation, sort_keys=True, default=str)), []).append(number)
        for (task, _), numbers in groups.items():
            for first in range(0, len(numbers), self.batch_size):
                yield task, requests[numbers[0]].args[2], numbers[first : first + self.batch_size]

    def _messages(self, arguments: tuple[Any, ...]) -> ChatMessages:
        _, doc_to_messages, _, number, task, split = arguments
        messages = doc_to_messages(self.task_dict[task][split][number])
        return ChatMessages(messages=self._apply_system_prompt(messages, self.system_prompt))

    def _answer(self, task: str, conversations: list[ChatMessages], generation: dict[str, Any]) -> list[str]:
        media = [conversation.extract_media() for conversation in conversations]
        if any(videos or sounds for _, videos, sounds in media):
            raise ValueError(f"task {task} brings video or sound: duet_vlm reduces images only")
        images = [image for pictures, _, _ in media for image in pictures]
        text = [self.processor.apply_chat_template(c.to_hf_messages(), tokenize=False, add_generation_prompt=True) for c in conversations]
        inputs = self.processor(images=images or None, text=text, return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(self.model.device, self.model.dtype)
        wanted, stops, unknown = generation_of(generation)
        if unknown and task not in self.costs:
            logger.warning(f"task {task}: generation settings not used: {', '.join(unknown)}")
        out = self.model.generate(**inputs, **wanted)
        costs = self.costs.setdefault(task, Costs())
        if images:
            costs.add(self.handle.report(), len(images))
        said = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [cut(answer, stops) for answer in said]

    def _write(self) -> None:
        """The costs so far: on screen, and as JSON beside what they belong to."""
        reducer = self.handle.reducer
        for task, costs in self.costs.items():
            logger.info(f"duet_vlm {self.chosen.label} on {task}: {costs}")
        found = {
            "model": self.pretrained,
            "label": self.chosen.label,
            "method": reducer.name,
            "budget": self.handle.budget,
            "settings": reducer.settings(),
            "tasks": {task: costs.to_json() for task, costs in self.costs.items()},
            "versions": {"duet_vlm": duet_vlm.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
        file = self.measured if self.world_size == 1 else self.measured.with_suffix(f".rank{self.rank}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


def _own_device() -> str:
    """This process's accelerator, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
