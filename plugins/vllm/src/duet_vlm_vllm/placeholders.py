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
class ReducedContent(PromptUpdateDetails):
    """Content with ``after`` of an image's or video's ``before`` rows."""

    before: int = 0
    after: int = 0


class ImagesOnly:
    """Mixin before a family's processing info: no videos, which are left to stock vLLM, for the reason ``why``."""

    why: str

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {**super().get_supported_mm_limits(), "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            raise ValueError(f"clips cannot be reduced for this model: {self.why}. Send images, or serve it without duet")
        super().validate_num_items(modality, num_items)


class FewerPlaceholders:
    """Mixin before a family's multi-modal processor.

    Attributes
    ----------
    positions : str
        "compact", or "keep" for grids (M-RoPE).
    counted : dict
        By kind ("image", "video" where the family takes videos) the field that each image or video with pixels has
        once.
    """

    positions = "compact"
    counted: ClassVar[dict[str, str]] = {"image": "pixel_values"}

    def spans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[torch.Tensor]:
        """Parts of the spans of image or video ``number``, processed to ``item`` and laid out in ``tokens`` rows.

        For each span that has a budget of its own: the part (crop, frame) of its rows [n], -1 for newlines. The worker
        must agree.
        """
        return [torch.zeros(tokens, dtype=torch.long)]

    def visual(self, kind: str, ids: list[int], details: PromptUpdateDetails) -> torch.Tensor:
        """Mask [n] bool of the rows of an image or video among the family's tokens for it."""
        return torch.ones(len(ids), dtype=torch.bool) if details.is_embed is None else details.is_embed(ids)

    def in_prompt(self, kind: str, content: ReducedContent) -> ReducedContent:
        """The content in the form of the prompt."""
        return content

    @property
    def duet(self) -> ServedMethod:
        return served(self.info.get_hf_config(), self.positions)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        out = super()._apply_hf_processor_main(mm_items, _for_transformers(hf_kwargs))
        for kind, field in self.counted.items():
            if PIXELS[kind] in out:  # embeddings are reduced already
                request_budget = self.duet.request_budget(self.info.ctx.get_merged_mm_kwargs(hf_kwargs))
                out[BUDGETS[kind]] = torch.full((len(out[field]),), request_budget, dtype=torch.float64)
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
                return self.in_prompt(kind, ReducedContent(list(details.full), details.is_embed))
            ids = list(details.full)
            visual_indices = self.visual(kind, ids, details).nonzero().squeeze(1).tolist()
            request_budget = float(item[BUDGETS[kind]].data)
            before = len(visual_indices)
            spans = self.spans(kind, mm_items, number, item, before)
            after = sum(self.duet.span(*part_sizes(parts), request_budget).entry for parts in spans)
            dropped = set(visual_indices[after:])
            kept_ids = [token for index, token in enumerate(ids) if index not in dropped]
            return self.in_prompt(kind, ReducedContent(kept_ids, details.is_embed, before, after))

        return dataclasses.replace(update, replacement=content)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Hashes with the server's settings, as caches may be shared between servers; a request's settings are in the
        stock hashes."""
        salt = self.duet.salt
        hashes = super()._get_mm_hashes(inputs)
        return {name: [hashlib.sha256((salt + one).encode()).hexdigest() for one in some] for name, some in hashes.items()}

    def _apply_prompt_updates(self, token_ids: Any, mm_prompt_updates: Any) -> Any:
        contents = [item[0].content for kind in self.counted for item in mm_prompt_updates.get(kind, ())]
        reduced = [one for one in contents if isinstance(one, ReducedContent)]
        if reduced:
            count(self.info.model_id, sum(one.before for one in reduced), sum(one.after for one in reduced))
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)


def _for_transformers(kwargs: Any) -> dict[str, Any]:
    """Arguments without our key, which transformers' processors do not know."""
    return {name: value for name, value in kwargs.items() if name != REQUEST}
