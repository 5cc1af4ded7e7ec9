"""The rows that go on behind a drop inside the decoder, for several requests of one step: what the method is shown, and
what follows.

An engine brings the rows of the layer, its queries and keys; shapes are known on the host, so nothing here waits for a
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows, pack_right, upload
from duet_vlm.ops.score import query_attention
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime.validation import check_mask
from duet_vlm.serve.staged_step import StagedStep

Prefix = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DropTables:
    """The rows of one drop on the device: D requests of up to L rows, V visual ones and Q that rank.

    Attributes
    ----------
    rows, valid : Tensor
        [D, L] rows in the flat batch of the stage before, and which are real.
    visual, visual_valid : Tensor
        [D, V] places of the visual rows among the L, ascending.
    queries, queries_valid : Tensor
        [D, Q] places of the text rows that rank.
    places : Tensor
        [D, L] the number of each row in the prompt as it came.
    counts : tuple of (int, int)
        Visual rows of each request that are there, and that stay.
    """

    rows: Tensor
    valid: Tensor
    visual: Tensor
    visual_valid: Tensor
    queries: Tensor
    queries_valid: Tensor
    places: Tensor
    counts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, step: StagedStep, stage: int, text_query: str, current: Tensor) -> DropTables | None:
        """The drop in front of ``stage``; ``current`` [T] are the numbers, in the batch as it came, of the rows of the
        stage before. None where no request loses rows."""
        drop = step.drop(stage, text_query)
        if drop is None:
            return None
        host = drop.rows, drop.valid, step.visual_rows, step.query_rows(text_query), step.rows(0)
        rows, valid, visual, asks, places = (upload(torch.from_numpy(table), current.device) for table in host)
        came = current[rows]
        shown = pack_right(visual[came] & valid, max(before for before, _ in drop.counts))
        queries = pack_right(asks[came] & valid, max(drop.num_queries))
        return cls(rows, valid, *shown, *queries, places[came], drop.counts)


def attention_scores(
    reducer: DecoderReducer,
    query: Tensor,
    key: Tensor,
    scaling: float,
    tables: DropTables,
    prefix: Prefix | None = None,
) -> Tensor:
    """Attention of the rows that rank to every row, as ``attach`` has it.

    Parameters
    ----------
    query, key : Tensor
        [D, H, L, d] and [D, Hkv, L, d], rotated, of the rows of ``tables``.
    prefix : (Tensor, Tensor), optional
        Keys [D, Hkv, P, d] of rows that an earlier step left in the cache, and which are real [D, P]: the softmax runs
        over them, too.

    Returns
    -------
    Tensor
        [D, L] float32; [D, L, H] for methods that look at each head.
    """
    before = 0 if prefix is None else prefix[0].shape[2]
    order = torch.arange(key.shape[2], device=key.device)
    seen_before = None if prefix is None else prefix[1]
    key = key if prefix is None else torch.cat([prefix[0].to(key.dtype), key], 2)
    asking = gather_rows(query.transpose(1, 2), tables.queries).transpose(1, 2)

    def allowed(block: slice) -> Tensor:
        own = tables.valid[:, None] & (order <= tables.queries[:, block, None])
        return own if seen_before is None else torch.cat([seen_before[:, None].expand(-1, own.shape[1], -1), own], 2)

    scores = query_attention(
        asking, key, scaling, allowed, tables.queries_valid.float(), heads=reducer.scoring_rules().score_heads
    )
    return scores[:, before:]


def rows_that_go_on(
    reducer: DecoderReducer,
    tables: DropTables,
    signals: Mapping[str, Tensor],
    total: tuple[int, int],
    final_norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The method's decision as a gather.

    Parameters
    ----------
    signals : mapping
        By name, what the method asks for [D, L, ...]: "scores", "keys", "hidden_states", "previous_hidden_states".
    total : (int, int)
        Rows of the flat batch before and behind the drop.
    final_norm : callable
        The decoder's last norm.

    Returns
    -------
    Tensor
        [total behind] ascending rows of the flat batch that go on.

    Raises
    ------
    ValueError
        The method returned something else than a mask of as many rows as planned (on a GPU only its form is checked).
    """
    stays = torch.zeros_like(tables.visual_valid)
    if any(after for _, after in tables.counts):
        view = _view(reducer, tables, signals, final_norm)
        chosen = reducer.prune_tokens(view)
        if isinstance(chosen, Selection):
            raise ValueError(
                f"{reducer.name}: prune_tokens returned a selection, and a server only drops rows inside the decoder: return a mask"
            )
        stays, _ = check_mask(reducer, chosen, view.valid, view.num_keep)
    rows = tables.rows.gather(1, tables.visual)
    spare = torch.where(tables.visual_valid & ~stays, rows, total[0])
    keep = torch.ones(total[0] + 1, dtype=torch.bool, device=rows.device).scatter(0, spare.flatten(), False)
    return pack_right(keep[None, :-1], total[1])[0][0]


def _view(
    reducer: DecoderReducer, tables: DropTables, signals: Mapping[str, Tensor], final_norm: Callable[[Tensor], Tensor]
) -> DecoderView:
    """The method's view: its signals of the visual rows, and of the text that ranks."""
    needed, made = reducer.requires, dict(signals)
    if Input.POSITIONS in needed:
        made["positions"] = tables.places
    columns = {
        name: gather_rows(rows, tables.visual)
        for name, rows in made.items()
        if name != "hidden_states" or Input.HIDDEN_STATES in needed
    }
    of_text = {"keys", "positions"} | ({"hidden_states"} if Input.TEXT_HIDDEN_STATES in needed else set())
    columns |= {f"text_{name}": gather_rows(made[name], tables.queries) for name in of_text & made.keys()}
    keep = upload([after for _, after in tables.counts], tables.visual.device)
    return DecoderView(
        tables.visual_valid,
        keep,
        host_counts=tables.counts,
        text_valid=tables.queries_valid,
        final_norm=final_norm,
        method=reducer.name,
        **columns,
    )
