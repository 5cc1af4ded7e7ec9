"""FastV in the three released variants: for transformers, in place or as a mask, and for the evaluation harness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from duet_vlm import attach
from duet_vlm.methods.decoder.fastv import FastV
from golden_runner.case import Case
from golden_runner.spy import Watch, scores_at, spying
from golden_runner.t2v import Prompt, compare_step_positions


def check(case: Case) -> None:
    prompt = Prompt(case, [case.meta["image_start"]], [case.meta["image_tokens"]])
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                _check_run(case, run, settings, prompt, recorded=False)
            continue
        _check_run(case, run, settings, prompt)


def preset(case: Case, settings: dict[str, Any]) -> FastV:
    if "rank" in settings:
        return FastV.official("inplace", layers=settings["K"], keep=settings["rank"])
    variant = "lmms" if "lmms" in case.meta["produced_by"] else "hf"
    return FastV.official(variant, layers=settings["K"], keep=1 - settings["R"])


def _check_run(case: Case, run: str, settings: dict[str, Any], prompt: Prompt, recorded: bool = True) -> None:
    reducer, views = preset(case, settings), []
    cache = DynamicCache(config=prompt.text_model.config) if settings.get("use_cache") else None
    with attach(prompt.model, spying(reducer, views)) as handle, Watch(prompt.text_model) as watch:
        prompt(past_key_values=cache, use_cache=cache is not None)
        tokens = handle._prompt_state.layer_groups[-1].tokens
        if not recorded:
            assert torch.isfinite(watch.last).all()
            return
        kept = tokens.prompt_index[0][tokens.visual[0]] - prompt.starts[0]
        case.same(run, "kept_image_index", kept)
        case.fact(run, "kept", len(kept))
        if views:
            scores = views[0].scores[0]
        else:  # everything stays
            scores = scores_at(handle, settings["K"] - 1, watch)[0][prompt.visual[0]]
        case.scores(run, "scores", scores)
        if settings.get("inplace") is False:
            compare_masked(case, run, settings["K"], prompt, watch.last[0], tokens.prompt_index[0])
            return
        case.close(run, "last_hidden_state", watch.last)
        watch.rotates(len(watch.hidden) - 1, case.out(run, "position_ids_entering_last_layer"))
        case.compared.add(f"out/{run}/position_ids_entering_last_layer")
        twice = settings["K"] - 1 if settings.get("layer_calls", len(watch.hidden)) > len(watch.hidden) else None
        widths = [h.shape[1] for h in watch.hidden]
        case.fact(
            run, "seq_len_entering_each_layer_call", widths if twice is None else widths[: twice + 1] + widths[twice:]
        )
        if cache is not None:
            _compare_decode(case, run, prompt, watch, cache, twice)


def compare_masked(case: Case, run: str, layer: int, prompt: Prompt, survivors: Tensor, slots: Tensor) -> None:
    """The mask variant keeps every row and hides the keys of the dropped ones: dropping must give the survivors the
    same states, and a stock model with that mask gives all rows."""
    case.close(run, "last_hidden_state", masked_states(prompt, layer, slots))
    recorded = case.out(run, "last_hidden_state")[0][slots]
    assert torch.allclose(survivors, recorded, rtol=0, atol=1e-4), f"{run}: survivors differ from the masked run"
    positions = case.out(run, "position_ids_entering_last_layer")
    assert torch.equal(positions, torch.arange(positions.shape[1])[None])
    case.compared.add(f"out/{run}/position_ids_entering_last_layer")
    case.fact(run, "seq_len_entering_each_layer_call", [positions.shape[1]] * len(prompt.text_model.layers))


def masked_states(prompt: Prompt, layer: int, slots: Tensor) -> Tensor:
    """Oracle: the plain decoder with the dropped keys hidden from ``layer`` on (a detached model of its own attention
    masks)."""
    rows = prompt.embeds.shape[1]
    shown = torch.zeros(rows, dtype=torch.bool)
    shown[slots] = True
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, rows, rows).masked_fill(~(causal & shown), torch.finfo(torch.float32).min)
    embeds = prompt.embeds.masked_scatter(prompt.visual[..., None], torch.cat(prompt.features))
    inner = prompt.text_model

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask}

    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in inner.layers[layer:]]
    try:
        return inner(inputs_embeds=embeds, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


def _compare_decode(case: Case, run: str, prompt: Prompt, watch: Watch, cache: DynamicCache, twice: int | None) -> None:
    def lengths() -> list[int]:
        # the evaluation file runs one layer twice, so its cache holds every key of that layer twice; ours holds it once
        return [layer.keys.shape[-2] * (2 if i == twice else 1) for i, layer in enumerate(cache.layers)]

    case.fact(run, "kv_len_after_prefill", lengths())
    seen, grown = prompt.embeds.shape[1], []
    for t in sorted({int(name.split("/")[0].removeprefix("decode")) for name in case.names(run, "decode")}):
        token = (watch.last[:, -1:] @ prompt.table.T).argmax(-1)
        case.same(run, f"decode{t}/token_id", token)
        prompt.model(
            input_ids=token, past_key_values=cache, use_cache=True, position_ids=torch.full_like(token, seen + t)
        )
        case.close(run, f"decode{t}/last_hidden_state", watch.last)
        compare_step_positions(case, run, f"decode{t}/position_id_entering_each_layer", watch, twice)
        grown.append(lengths())
    case.fact(run, "kv_len_after_each_decode_step", grown)
