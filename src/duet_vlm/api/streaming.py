"""Clips that arrive piece by piece: a bounded number of visual tokens, whatever the length, and questions at any time.

>>> from duet_vlm.api.streaming import StreamingVideo
>>> stream = StreamingVideo(model, budget=256)
>>> for piece in camera:                                     # the next frames, as the processor makes them of a clip
...     stream.add(**processor(text="<video>", videos=[piece], return_tensors="pt"))
>>> inputs = stream.inputs(processor(text=question, videos=[piece], return_tensors="pt")["input_ids"])
>>> model.generate(**inputs)
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, Modality
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.select import spaced_picks


class StreamingVideo:
    """The visual tokens of one clip that is still going on.

    Each piece goes through the vision encoder when it comes and is then forgotten, so memory depends on the longest
    piece, on ``budget`` and on nothing else. Of all steps so far those ``budget`` tokens are held that ``evs`` keeps of
    the whole clip: the first step, then those that changed most since the step before. As the score of a token depends
    on its own and the last step only, the choice is the same, however the clip is cut into pieces, as long as the
    encoder sees each step by itself.

    Parameters
    ----------
    model : nn.Module
        A supported model that takes clips (``duet-vlm models``), not attached to, or paused.
    budget : int
        Visual tokens that are held, at least 1.

    Raises
    ------
    TypeError
        The family is not supported, takes no clips, or writes something between the steps of a clip.
    ValueError
        A budget below 1.
    """

    def __init__(self, model: nn.Module, budget: int) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(
                f"budget={budget!r}: a stream has no end yet, so give a number of visual tokens (int), not a fraction"
            )
        if budget < 1:
            raise ValueError(f"budget={budget}: a stream holds at least 1 visual token")
        self.adapter: Adapter = adapter_for(model)
        self.kind = _video(self.adapter)
        self.budget = budget
        self.steps = 0
        self.places = 0  # rows of every step
        self._sizes: list[int] | None = None  # (height, width) of the patches of a step, where the family says sizes
        self._rows = self._score = self._index = self._last = self._tail = torch.empty(0, device="cpu")
        self._timing: dict[str, Any] = {}

    @property
    def held(self) -> list[tuple[int, int]]:
        """(step, place) of every token that is held, in order."""
        return [(number // self.places, number % self.places) for number in self._index.tolist()] if self.steps else []

    @torch.no_grad()
    def add(self, **inputs: Any) -> None:
        """Take in the next steps of time.

        Parameters
        ----------
        **inputs
            What the processor makes of one clip of the next frames; what the video encoder does not take is left aside.

        Raises
        ------
        ValueError
            No clip, several of them, frames of another size than before, or rows that are not finite.
        """
        if inputs.get(self.kind.pixels) is None:
            raise ValueError(
                f"stream.add: no {self.kind.pixels} among {', '.join(inputs) or 'nothing'}; pass what the processor makes of a clip"
            )
        encode = getattr(self.adapter.base, self.kind.encode)
        given = {name: value for name, value in inputs.items() if name in inspect.signature(encode).parameters}
        call = self.kind.encoding(given)
        output = encode(**given)
        if getattr(output, "deepstack_features", None):
            raise TypeError(f"{self.adapter.family}: rows that are added behind decoder layers cannot be streamed")
        clips = self.adapter.spans(output, call)
        if len(clips) != 1:
            raise ValueError(f"stream.add: {len(clips)} clips; a stream is one clip, pass its next frames")
        parts = self.adapter.parts(call, [len(rows) for rows in clips])[0]
        steps = int(parts.max()) + 1
        content = int((parts >= 0).sum())
        if bool((parts[:content] < 0).any()):
            raise TypeError(f"{self.adapter.family}: newline rows inside of clips cannot be streamed")
        rows, self._tail = clips[0][:content], clips[0][content:].clone()
        self._same_size(len(rows) // steps, call.sizes[0][1:] if call.sizes else None)
        self._timing |= {name: value for name, value in inputs.items() if name == "second_per_grid_ts"}
        self._take(rows.unflatten(0, (steps, -1)))

    def _same_size(self, places: int, sizes: list[int] | None) -> None:
        if self.steps and (places, sizes) != (self.places, self._sizes):
            before = f"frames of {self.places} rows, size {self._sizes}"
            raise ValueError(f"stream.add: frames of {places} rows, size {sizes}, after {before}: keep to one size")
        self.places, self._sizes = places, sizes

    def _take(self, rows: Tensor) -> None:
        """rows [steps, places, D]."""
        if not bool(rows.isfinite().all()):
            raise ValueError(
                "stream.add: the image features contain NaN or Inf: check the frames, the weights and the dtype"
            )
        unit = unit_rows(rows)
        if not self.steps:
            everyone = torch.ones(1, self.places, dtype=torch.bool, device=rows.device)
            few = spaced_picks(everyone, torch.tensor([min(self.budget, self.places)], device=rows.device))
            first = torch.where(few, torch.inf, -torch.inf)
            self._last = unit[0]
            score = torch.cat([first, (unit[1:] - unit[:-1]).square().sum(-1) / 2])
            held = (
                rows.new_empty(0, rows.shape[2]),
                score.new_empty(0),
                torch.empty(0, dtype=torch.long, device=rows.device),
            )
        else:
            score = (unit - torch.cat([self._last[None], unit[:-1]])).square().sum(-1) / 2
            held = self._rows, self._score, self._index
        number = torch.arange(score.numel(), device=rows.device) + self.steps * self.places
        rows, every, index = (
            torch.cat([old, new]) for old, new in zip(held, (rows.flatten(0, 1), score.flatten(), number), strict=True)
        )
        best = every.argsort(descending=True, stable=True)[: self.budget].sort().values
        best = best[every[best] > -torch.inf]
        self._rows, self._score, self._index = rows[best].clone(), every[best], index[best]
        self._last, self.steps = unit[-1].clone(), self.steps + len(unit)

    def inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Inputs of ``generate`` and ``forward`` for a question about everything added so far.

        Parameters
        ----------
        input_ids : Tensor
            [1, S] a prompt with the placeholders of one clip, of any length: they are replaced by the held tokens.

        Returns
        -------
        dict
            ``inputs_embeds`` [1, S', D], ``attention_mask`` [1, S'] and ``position_ids``: every token where it stands
            in the whole clip.

        Raises
        ------
        ValueError
            Nothing came yet, or the prompt has no placeholders of a clip, several runs of them, or more than one row.
        """
        if not self.steps:
            raise ValueError("stream.inputs: nothing was added yet")
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"stream.inputs: input_ids of {input_ids.shape[0]} rows; a stream answers one prompt at a time"
            )
        ids = input_ids[0].to(self._rows.device)
        here = (ids == self.kind.token_id).nonzero()[:, 0]
        if not len(here) or int(here[-1] - here[0]) + 1 != len(here):
            raise ValueError(
                f"stream.inputs: the prompt holds {len(here)} placeholders of clips ({self.kind.token_id}); give one unbroken run"
            )
        before, behind = ids[: int(here[0])], ids[int(here[-1]) + 1 :]
        embed = self.adapter.base.get_input_embeddings()
        tokens = self.steps * self.places
        whole = tokens + len(self._tail)
        tail = self._tail if whole <= self.budget else self._tail[:0]  # newlines leave first
        rows = torch.cat([embed(before), torch.cat([self._rows, tail]).to(embed.weight.dtype), embed(behind)])[None]
        number = functools.partial(torch.arange, device="cpu")
        clip = torch.cat([self._index.cpu(), tokens + number(len(tail))])
        slots = torch.cat([number(len(before)), len(before) + clip, len(before) + whole + number(len(behind))])
        positions = self._positions(before, behind, whole)[..., slots.to(ids.device)]
        return {
            "inputs_embeds": rows,
            "attention_mask": torch.ones(rows.shape[:2], dtype=torch.long, device=ids.device),
            "position_ids": positions,
        }

    def _positions(self, before: Tensor, behind: Tensor, whole: int) -> Tensor:
        """Positions of the prompt with all tokens that came, [1, S] or [3, 1, S]."""
        total = len(before) + whole + len(behind)
        if not self.adapter.mrope or self._sizes is None:
            return torch.arange(total, device=before.device)[None]
        ids = torch.cat([before, before.new_full((whole,), self.kind.token_id), behind])[None]
        kinds = 2 * (ids == self.kind.token_id).long()
        grid = torch.tensor([[self.steps, *self._sizes]], device=ids.device)
        known = inspect.signature(self.adapter.base.get_rope_index).parameters
        timing = {name: value for name, value in self._timing.items() if name in known}
        return self.adapter.base.get_rope_index(ids, kinds, video_grid_thw=grid, **timing)[0]


def _video(adapter: Adapter) -> Modality:
    kind = next((stream for stream in adapter.modalities if stream.name == "video"), None)
    if kind is None:
        raise TypeError(f"{adapter.family} takes no clips; 'duet-vlm models' says which families do")
    if adapter.placeholder_ids(kind, 4, (2, 2)) != [kind.token_id] * 4:
        raise TypeError(f"{adapter.family} writes marks between the steps of a clip, which a stream cannot place")
    return kind
