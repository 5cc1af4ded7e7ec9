"""attach(): find the adapter of a model, check the settings, install the hooks; registry of attached models."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from duet_vlm.api.handle import Handle
from duet_vlm.inputs.clip_text import ClipTextEncoder
from duet_vlm.methods import lookup
from duet_vlm.models.lookup import adapter_for, core_of
from duet_vlm.planning.budget import Budget, check_budget
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.persistence import KEY, is_method_file, load_from_config, load_from_file, to_checkpoint_record
from duet_vlm.runtime.compat import check_version
from duet_vlm.runtime.encode.video_chunks import ChunkConfig

# the hooks keep the handle
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    method: str | Path | Reducer | None = None,
    *,
    budget: Budget | None = None,
    processor: Any = None,
    options: TokenOptions | Mapping[str, Any] | None = None,
    align: bool = False,
    text_tower: Any = None,
    chunk_frames: int | None = None,
    still_frames: float | None = None,
    **fields: Any,
) -> Handle:
    """Make ``model`` spend fewer visual tokens, until the handle is detached.

    Parameters
    ----------
    model : nn.Module
        A loaded image-text-to-text model of transformers (PEFT models too).
    method : str, Path or Reducer, optional
        Name of a method (``duet_vlm.list_methods()``), an instance with its settings, or a file that holds method,
        budget and settings (``"duet.json"``, as ``duet-vlm tune`` writes it). Left out: what the checkpoint was trained
        with, if its config remembers it (``remember``), else "duet". A budget or settings named here go before those of
        a file or a checkpoint.
    budget : int or float, optional
        Mean visual tokens per decoder layer and image (int), or that as a fraction of the image's tokens (float in (0,
        1]).
    processor : optional
        The model's processor, whose tokenizer reads the question for ``TokenOptions(text_query="salient")``.
    options : TokenOptions, optional
        How visual tokens are treated, whatever the method: their positions, which text asks, whether images are ranked
        together. What is left out stays as the method, or the file, has it. A mapping of its fields will do.
    align : bool
        Give the decoder's output one row per prompt slot again, a dropped slot repeating the survivor before it: for
        trainers and metrics that line logits up with labels themselves (TRL, label smoothing, ``compute_metrics``). The
        loss is the same; the head then works on every row. Without it logits have the surviving rows only, and
        ``Handle.slots`` says which.
    text_tower : duet_vlm.inputs.clip_text.ClipTextEncoder, optional
        The text side of the CLIP model that the vision tower comes from, for methods that compare tokens with the words
        of the question (``cdpruner`` with ``relevance="contrastive"``); needs ``processor`` too.
    chunk_frames : int, optional
        Frames of a clip that go through the vision tower at a time, outside of training: a multiple of what the tower
        looks at as one (two frames in Qwen's). The result is the same; the tower's memory depends on the piece and not
        on the clip. Left out: on an accelerator as many as fit in a quarter of its free memory, on the CPU the whole
        clip.
    still_frames : float, optional
        Frames of a clip that differ from the last encoded one in no patch by more than that (mean absolute difference
        of its pixels, in the scale in which the processor hands them over; 0: not at all) do not go through the vision
        tower, outside of training: they get the rows of that one. Left out: all are encoded.
    **fields
        Settings of the method; they override those of an instance.

    Returns
    -------
    Handle
        Use it as a context manager, or call ``detach()``.

    Raises
    ------
    ValueError
        Unknown method, setting or budget out of range, model attached already.
    BudgetError
        A budget below the method's floor on this model.
    TypeError
        Unsupported model, or settings that this family cannot have.
    ImportError
        A transformers older than attaching works on (5.21); the rest of the package accepts 5.16.
    """
    check_version()
    check_budget(budget)
    core = core_of(model)
    given = TokenOptions.of(options)
    if method is None or isinstance(method, str | Path) and is_method_file(method):
        saved = (
            load_from_file(method)
            if isinstance(method, str | Path)
            else load_from_config(core) or {"method": "duet", "budget": None, "settings": {}}
        )
        given = TokenOptions.of(saved["settings"].get("options")).overlaid(given)
        method, fields = saved["method"], saved["settings"] | fields
        budget = saved["budget"] if budget is None else budget
    settings = fields | {"options": given}
    if isinstance(method, str):
        reducer = lookup.make_method(method, **settings)
    elif isinstance(method, Reducer):
        reducer = method.with_settings(settings)
    else:
        raise TypeError(f"method must be a name or a Reducer instance, got {method!r}")
    adapter = adapter_for(model)
    if handle_of(model) is not None:
        raise ValueError(
            "a reducer is attached to this model already: detach() its handle first (duet_vlm.detach(model) if nobody kept it), or change it "
            "with handle.set(...)"
        )
    if text_tower is None and isinstance(reducer, EncoderReducer) and reducer.clip_model is not None:
        text_tower = ClipTextEncoder.load(reducer.clip_model, model.device)
    handle = Handle(
        adapter,
        reducer,
        budget,
        processor=processor,
        align=align,
        text_tower=text_tower,
        chunks=ChunkConfig(chunk_frames, still_frames),
    )
    _attached[core] = weakref.ref(handle)
    return handle


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of the reducer that is attached to ``model``, None if there is none."""
    core = core_of(model)
    reference = _attached.get(core) if isinstance(core, nn.Module) else None
    handle = None if reference is None else reference()
    return handle if handle is not None and handle.installed else None


def detach(model: nn.Module) -> None:
    """Take off whatever reducer is attached to ``model``, for callers who did not keep its handle.

    Harmless if there is none.
    """
    handle = handle_of(model)
    if handle is not None:
        handle.detach()


def save_to_config(handle: Handle) -> None:
    """Write the handle's reduction into the model's config, so that the checkpoint keeps it and ``attach(model)`` takes
    it up again.

    It stays there when the handle is detached; ``del model.config.duet_vlm`` takes it out. Weights of the method's own
    are looked for beside the checkpoint: ``handle.save_weights(folder)`` puts them there.
    """
    setattr(handle.adapter.model.config, KEY, to_checkpoint_record(handle.reducer, handle.budget))
