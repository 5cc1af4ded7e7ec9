"""The front end: a prompt with fewer placeholders, and each request's budget on its way to the worker."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from duet_vlm.runtime.encode.selection import part_sizes
from duet_vlm.serve.served_method import REQUEST, ServedMethod
from duet_vlm_vllm.metrics import count
from duet_vlm_vllm.settings import served

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
BUDGETS = {"image": REQUEST, "video": f"{REQUEST}_video"}  # of each image or clip, on its way to the worker: a field belongs to one kind


@dataclasses.dataclass
class Shortened(PromptUpdateDetails):
    """Content that shows ``after`` of an image's or clip's ``before`` rows."""

    before: int = 0
    after: int = 0


class ImagesOnly:
    """In front of a family's processing info: no clips, which stay with stock vLLM. ``why`` they do."""

    why: str

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {**super().get_supported_mm_limits(), "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            raise ValueError(f"clips cannot be reduced for this model: {self.why}. Send images, or serve it without duet")
        super().validate_num_items(modality, num_items)


class FewerPlaceholders:
    """In front of a family's multi-modal processor.

    Attributes
    ----------
    positions : str
        "compact", or "keep" for grids (M-RoPE).
    counted : dict
        By kind ("image", "video" where the family takes clips) the field that each image or clip with pixels has once.
    """

    positions = "compact"
    counted: ClassVar[dict[str, str]] = {"image": "pixel_values"}

    def spans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[torch.Tensor]:
        """Of image or clip ``number``, processed to ``item`` and laid out in ``tokens`` rows: for each span that has a budget of its own the part
        (crop, frame) that its rows show [n], -1 for newlines. The worker must say the same."""
        return [torch.zeros(tokens, dtype=torch.long)]

    def visual(self, kind: str, ids: list[int], details: PromptUpdateDetails) -> torch.Tensor:
        """Which of the tokens that the family shows an image or clip with are its rows [n] bool."""
        return torch.ones(len(ids), dtype=torch.bool) if details.is_embed is None else details.is_embed(ids)

    def shown(self, kind: str, content: Shortened) -> Shortened:
        """The content as it stands in the prompt."""
        return content

    @property
    def duet(self) -> ServedMethod:
        return served(self.info.get_hf_config(), self.positions)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        out = super()._apply_hf_processor_main(mm_items, _for_transformers(hf_kwargs))
        for kind, field in self.counted.items():
            if PIXELS[kind] in out:  # what comes as embeddings has been chosen from already
                asked = self.duet.request_budget(self.info.ctx.get_merged_mm_kwargs(hf_kwargs))
                out[BUDGETS[kind]] = torch.full((len(out[field]),), asked, dtype=torch.float64)
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for kind, name in BUDGETS.items():
            if name in hf_inputs:
                fields[name] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, _for_transformers(hf_processor_mm_kwargs), out_mm_kwargs)
        return [self._shortened(update, mm_items, out_mm_kwargs) if update.modality in self.counted else update for update in updates]

    def _shortened(self, update: Any, mm_items: Any, out_mm_kwargs: Any) -> Any:
        kind = update.modality

        def content(number: int) -> PromptUpdateDetails:
            stock = update.content(number) if callable(update.content) else update.content
            details = stock if isinstance(stock, PromptUpdateDetails) else PromptUpdateDetails.from_seq(list(stock))
            item = out_mm_kwargs[kind][number]
            if item is None or BUDGETS[kind] not in item:
                return self.shown(kind, Shortened(list(details.full), details.is_embed))
            ids = list(details.full)
            places = self.visual(kind, ids, details).nonzero().squeeze(1).tolist()
            asked = float(item[BUDGETS[kind]].data)
            stay = sum(self.duet.span(*part_sizes(parts), asked).entry for parts in self.spans(kind, mm_items, number, item, len(places)))
            gone = set(places[stay:])
            return self.shown(kind, Shortened([token for place, token in enumerate(ids) if place not in gone], details.is_embed, len(places), stay))

        return dataclasses.replace(update, replacement=content)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Hashes know what a request asks for; what the server is set to is added here, as caches may be shared between servers."""
        salt = self.duet.salt
        hashes = super()._get_mm_hashes(inputs)
        return {name: [hashlib.sha256((salt + one).encode()).hexdigest() for one in some] for name, some in hashes.items()}

    def _apply_prompt_updates(self, token_ids: Any, mm_prompt_updates: Any) -> Any:
        shown = [item[0].content for kind in self.counted for item in mm_prompt_updates.get(kind, ())]
        reduced = [one for one in shown if isinstance(one, Shortened)]
        if reduced:
            count(self.info.model_id, sum(one.before for one in reduced), sum(one.after for one in reduced))
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)


def _for_transformers(kwargs: Any) -> dict[str, Any]:
    """Arguments without our key, which its processors do not know."""
    return {name: value for name, value in kwargs.items() if name != REQUEST}
