"""The front end: a prompt with fewer placeholders, and each request's budget on its way to the worker."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import PromptUpdateDetails

from duet_vlm.planning.budget import SpanPlan
from duet_vlm.runtime.encode.selection import part_sizes
from duet_vlm.serve.served_method import REQUEST, ServedMethod
from duet_vlm_vllm.metrics import count, count_drops
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.stages.request_checks import LEFT_BEHIND
from duet_vlm_vllm.stages.running_step import COUNTS

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# of each image or clip, on its way to the worker: a field belongs to one kind
BUDGETS = {"image": REQUEST, "video": f"{REQUEST}_video"}


@dataclasses.dataclass
class ShortenedPrompt(PromptUpdateDetails):
    """Content that shows ``after`` of an image's or clip's ``before`` rows; ``stages``: of these, those in each stage
    of the decoder."""

    before: int = 0
    after: int = 0
    stages: tuple[int, ...] = ()


class ImagesOnly:
    """In front of a family's processing info: no clips.

    Attributes
    ----------
    why, instead : str
        Why not, and what serves them.
    """

    why: str
    instead = "serve it without duet"

    @property
    def takes_clips(self) -> bool:
        return False

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return super().get_supported_mm_limits() | ({} if self.takes_clips else {"video": 0})

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items and not self.takes_clips:
            raise ValueError(f"clips cannot be reduced for this model: {self.why}. Send images, or {self.instead}")
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
        """Of image or clip ``number``, processed to ``item`` and laid out in ``tokens`` rows: for each span that has a
        budget of its own the part (crop, frame) that its rows show [n], -1 for newlines. The worker must say the same.
        """
        return [torch.zeros(tokens, dtype=torch.long)]

    def visual(self, kind: str, ids: list[int], details: PromptUpdateDetails) -> torch.Tensor:
        """Mask [n] bool of the tokens that the family shows an image or clip with: True for its rows."""
        return torch.ones(len(ids), dtype=torch.bool) if details.is_embed is None else details.is_embed(ids)

    def shown(self, kind: str, content: ShortenedPrompt) -> ShortenedPrompt:
        """The content as it stands in the prompt."""
        return content

    @property
    def duet(self) -> ServedMethod:
        return served(self.info.get_hf_config(), self.positions)

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused before anything is processed: an error behind it leaves an image in the front end's cache only, and
        the next request with it fails."""
        if inputs.cache is not None and LEFT_BEHIND.is_set():
            LEFT_BEHIND.clear()
            inputs.cache.clear_cache()
        ends = inputs.prompt[-1:] if self.duet.decoder_reducer is not None else []
        if set(ends) & media_tokens(self.info.get_hf_config()):
            raise ValueError(
                "the prompt ends in an image, so no text could rank its visual tokens: write the question behind it"
            )
        return super().apply(inputs, *args, **kwargs)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        out = super()._apply_hf_processor_main(mm_items, _for_transformers(hf_kwargs))
        for kind, field in self.counted.items():
            if PIXELS[kind] in out:  # what comes as embeddings has been chosen from already
                asked = self.duet.asked(self.info.ctx.get_merged_mm_kwargs(hf_kwargs))
                out[BUDGETS[kind]] = torch.full((len(out[field]),), asked, dtype=torch.float64)
        if self.duet.decoder_reducer is not None:
            self._count_stages(out, mm_items, hf_kwargs)
        return out

    def _count_stages(self, out: Any, mm_items: Any, hf_kwargs: Any) -> None:
        """Add to ``out`` how many rows of each image or clip every stage of the decoder reads: the engine counts with
        them before anything runs."""
        items = MultiModalKwargsItems.from_hf_inputs(out, self._get_mm_fields_config(out, hf_kwargs))
        for update in super()._get_prompt_updates(mm_items, _for_transformers(hf_kwargs), items):
            kind = update.modality
            counts = []
            for number, item in enumerate(items.get(kind, ()) if kind in self.counted else ()):
                if BUDGETS[kind] not in item:
                    raise ValueError(
                        f"{kind} embeddings were chosen from already, and their rows cannot be planned again: send the {kind} itself"
                    )
                _, places = self._rows(kind, update, number)
                plans = self._plans(kind, mm_items, number, item, len(places))
                counts.append(self._of_stages(plans))
            if counts:
                out[COUNTS[kind]] = torch.tensor(counts)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for kind, name in (*BUDGETS.items(), *COUNTS.items()):
            if name in hf_inputs:
                fields[name] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, _for_transformers(hf_processor_mm_kwargs), out_mm_kwargs)
        return [
            self._shortened(update, mm_items, out_mm_kwargs) if update.modality in self.counted else update
            for update in updates
        ]

    def _shortened(self, update: Any, mm_items: Any, out_mm_kwargs: Any) -> Any:
        kind = update.modality

        def content(number: int) -> PromptUpdateDetails:
            details, places = self._rows(kind, update, number)
            item = out_mm_kwargs[kind][number]
            if item is None or BUDGETS[kind] not in item:
                return self.shown(kind, ShortenedPrompt(list(details.full), details.is_embed))
            plans = self._plans(kind, mm_items, number, item, len(places))
            stay = sum(plan.entry for plan in plans)
            gone = set(places[stay:])
            ids = [token for place, token in enumerate(details.full) if place not in gone]
            stages = () if self.duet.decoder_reducer is None else self._of_stages(plans)
            return self.shown(kind, ShortenedPrompt(ids, details.is_embed, len(places), stay, stages))

        return dataclasses.replace(update, replacement=content)

    def _rows(self, kind: str, update: Any, number: int) -> tuple[PromptUpdateDetails, list[int]]:
        """The tokens that the family shows an image or clip with, and the places of its rows among them."""
        stock = update.content(number) if callable(update.content) else update.content
        details = stock if isinstance(stock, PromptUpdateDetails) else PromptUpdateDetails.from_seq(list(stock))
        return details, self.visual(kind, list(details.full), details).nonzero().squeeze(1).tolist()

    def _plans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[SpanPlan]:
        """The plans of the spans of an image or clip of ``tokens`` rows, by the budget of its request."""
        asked = float(item[BUDGETS[kind]].data)
        return [self.duet.span(*part_sizes(parts), asked) for parts in self.spans(kind, mm_items, number, item, tokens)]

    def _of_stages(self, plans: list[SpanPlan]) -> tuple[int, ...]:
        """Rows of an image or clip in each stage of the decoder."""
        return tuple(sum(rows) for rows in zip(*map(self.duet.stages.counts, plans), strict=True))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Hashes know what a request asks for; what the server is set to is added here, as caches may be shared between
        servers."""
        salt = self.duet.salt
        hashes = super()._get_mm_hashes(inputs)
        return {
            name: [hashlib.sha256((salt + one).encode()).hexdigest() for one in some] for name, some in hashes.items()
        }

    def _apply_prompt_updates(self, token_ids: Any, mm_prompt_updates: Any) -> Any:
        shown = [item[0].content for kind in self.counted for item in mm_prompt_updates.get(kind, ())]
        reduced = [one for one in shown if isinstance(one, ShortenedPrompt)]
        if reduced:
            count(self.info.model_id, sum(one.before for one in reduced), sum(one.after for one in reduced))
        if dropped := [one.stages for one in reduced if one.stages]:
            count_drops(self.info.model_id, self.duet.stages, [sum(rows) for rows in zip(*dropped, strict=True)])
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)


def media_tokens(config: Any) -> set[int | None]:
    """The tokens that stand for an image or a clip in a prompt."""
    return {getattr(config, f"{kind}_token_{what}", None) for kind in BUDGETS for what in ("id", "index")} - {None}


class TextBehind:
    """In front of a family's dummy inputs: vLLM's are images alone, and text has to stand behind them."""

    def get_dummy_text(self, mm_counts: Any) -> str:
        return f"{super().get_dummy_text(mm_counts)} ."


def _for_transformers(kwargs: Any) -> dict[str, Any]:
    """Arguments without our key, which its processors do not know."""
    return {name: value for name, value in kwargs.items() if name != REQUEST}
