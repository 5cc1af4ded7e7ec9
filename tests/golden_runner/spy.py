"""Seeing what the library does: the views its methods decide on, and what each decoder layer reads."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm import Handle, Reducer
from duet_vlm.inputs.text_queries import query_rows
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.ops.score import query_attention


def spying(reducer: Reducer, seen: list[Any]) -> Reducer:
    """The same method with the same settings; ``seen`` collects the views it is shown."""
    cls = type(reducer)

    def select_tokens(self: Any, view: Any) -> Any:
        seen.append(view)
        return cls.select_tokens(self, view)  # type: ignore[attr-defined]

    def prune_tokens(self: Any, view: Any) -> Any:
        seen.append(view)
        return cls.prune_tokens(self, view)  # type: ignore[attr-defined]

    return type(cls.__name__, (cls,), {"select_tokens": select_tokens, "prune_tokens": prune_tokens})(
        **{f.name: getattr(reducer, f.name) for f in fields(reducer)}
    )


class Watch:
    """What each decoder layer read in one call. Create it after ``attach``: its hooks then run behind the library's."""

    def __init__(self, text_model: nn.Module) -> None:
        self.text_model = text_model
        self.hidden: list[Tensor] = []
        self.rotary: list[tuple[Tensor, Tensor]] = []
        self.output: dict[int, Tensor] = {}
        self.last: Tensor
        self.hooks = [layer.register_forward_pre_hook(self._layer, with_kwargs=True) for layer in text_model.layers]
        self.hooks += [layer.register_forward_hook(self._after(i)) for i, layer in enumerate(text_model.layers)]
        self.hooks.append(text_model.register_forward_pre_hook(self._start))
        self.hooks.append(text_model.register_forward_hook(self._end))
        self.calls: list[tuple[list[Tensor], list[tuple[Tensor, Tensor]], dict[int, Tensor]]] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *args: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _start(self, module: nn.Module, args: Any) -> None:
        self.hidden, self.rotary, self.output = [], [], {}
        self.calls.append((self.hidden, self.rotary, self.output))

    def _layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.hidden.append(args[0] if args else kwargs["hidden_states"])
        self.rotary.append(kwargs["position_embeddings"])

    def _after(self, index: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.output[index] = output[0] if isinstance(output, tuple) else output

        return after

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.last = output.last_hidden_state

    def rotates(self, layer: int, positions: Tensor, valid: Tensor | None = None, call: int = -1) -> None:
        """``layer`` really rotated by ``positions`` [..., B, T] (right-padded where ``valid`` is given): compared as
        angles."""
        cos, sin = self.calls[call][1][layer]
        expected = self.text_model.rotary_emb(cos, positions)
        for ours, theirs in zip((cos, sin), expected, strict=True):
            ours = ours.expand(positions.shape[-2], *ours.shape[1:])
            for b in range(len(ours)):
                row = ours[b] if valid is None else ours[b][valid[b]]
                assert not positions[..., b, len(row) :].any(), (
                    f"layer {layer}: positions recorded for rows that are padding here"
                )
                assert torch.allclose(row, theirs[b, : len(row)], rtol=0, atol=1e-5), (
                    f"layer {layer} rotates by other positions"
                )


def scores_at(
    handle: Handle,
    layer: int,
    watch: Watch,
    labels: Tensor | None = None,
    salient: Tensor | None = None,
    call: int = -1,
) -> Tensor:
    """Ranking scores [B, T] of the rows in front of ``layer``, for stages that keep all or none, which the library does
    not score."""
    run, reducer, adapter = handle._prompt_state, handle.reducer, handle.adapter
    tokens = run.layer_group(layer - 1).tokens
    rows = query_rows(
        reducer.options.text_query,
        run.prompt.visual,
        run.prompt.valid,
        labels,
        None if salient is None else lambda candidates: salient & candidates,
        reducer.options.training_turns,
    )
    index, valid = pack_right(gather_rows(rows, tokens.prompt_index) & tokens.valid, max(1, int(rows.sum(1).max())))
    hidden, rotary = watch.calls[call][2][layer - 1], watch.calls[call][1][layer - 1]
    module = adapter.layers[layer]
    rotary = tuple(t.expand(len(hidden), *t.shape[1:]) for t in rotary)
    query, key = adapter.project(module, hidden, rotary, index)
    allowed = tokens.valid[:, None].expand(-1, index.shape[1], -1)
    if reducer.scoring_rules().score_mask == "causal":
        allowed = allowed & (torch.arange(hidden.shape[1]) <= index[..., None])
    return query_attention(query, key, adapter.scaling(module), allowed, valid.float())
