"""The model that lmms-eval runs. Only lmms-eval imports this file; it needs the extra ``lmms``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from duet_vlm.evaluation.lmms.arguments import fields_of, generation_of, parse_arguments
from duet_vlm.evaluation.lmms.engine import Engine


class DuetVLM(lmms):
    """Any supported checkpoint with a method attached; prompts through the processor's chat template, in batches,
    greedy by default.

    Parameters
    ----------
    pretrained : str
        Hub id, folder, or "tiny" for the embedded model.
    method, budget, preset : optional
        As ``duet_vlm.attach`` and ``duet_vlm.preset`` take them; ``method=none`` is the full model. Default: duet.
    settings : str, optional
        Settings of the method as JSON. Short ones can stand among the arguments: ``keep=0.3``, ``options.text_query=last``.
    batch_size : int
    device, device_map, dtype, attn_implementation, min_pixels, max_pixels : optional
        See ``Engine``.
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
        self.batch_size, self.measured = int(batch_size), Path(measured)
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else ""
        self.engine = Engine(
            pretrained,
            parse_arguments(method, budget, preset, fields_of(settings) | fields),
            device=device,
            device_map=device_map,
            dtype=dtype,
            attn_implementation=attn_implementation,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        self.device = self.engine.model.device  # lmms-eval gathers results there when several processes share a task

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers of a task's requests, in their order."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc=f"duet_vlm ({self.engine.chosen.label})") as bar:
            for task, generation, numbers in self._batches(requests):
                conversations = [self._messages(requests[number].args).to_hf_messages() for number in numbers]
                answers |= zip(numbers, self.engine.answer(task, conversations, generation), strict=True)
                bar.update(len(numbers))
        self._write()
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "duet_vlm answers by generating: take a task with output_type generate_until, not loglikelihood"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("duet_vlm does not run multi-round tasks: a reduced cache takes no new images")

    def clean(self) -> None:
        """Called by lmms-eval when the model has done its work."""
        self.engine.handle.detach()
        del self.engine.model
        super().clean()

    # ---- inside

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any], list[int]]]:
        """(task, its generation settings, numbers of up to ``batch_size`` requests)."""
        groups: dict[tuple[str, str], list[int]] = {}
        for number, request in enumerate(requests):
            _, _, generation, _, task, _ = request.args
            groups.setdefault((task, json.dumps(generation, sort_keys=True, default=str)), []).append(number)
        for (task, _), numbers in groups.items():
            generation = requests[numbers[0]].args[2]
            _, _, unknown = generation_of(generation)
            if unknown:
                logger.warning(f"task {task}: generation settings not used: {', '.join(unknown)}")
            for first in range(0, len(numbers), self.batch_size):
                yield task, generation, numbers[first : first + self.batch_size]

    def _messages(self, arguments: tuple[Any, ...]) -> ChatMessages:
        _, doc_to_messages, _, number, task, split = arguments
        messages = doc_to_messages(self.task_dict[task][split][number])
        return ChatMessages(messages=self._apply_system_prompt(messages, self.system_prompt))

    def _write(self) -> None:
        """The costs so far: on screen, and as JSON."""
        for task, costs in self.engine.costs.items():
            logger.info(f"duet_vlm {self.engine.chosen.label} on {task}: {costs}")
        self.engine.write(
            self.measured if self.world_size == 1 else self.measured.with_suffix(f".rank{self.rank}.json")
        )
