"""End to end: CLIP tower, projector and decoder through ``generate`` of an attached model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm import DecoderView, Reducer, attach
from duet_vlm.methods.baselines.none import NoReduction
from duet_vlm.methods.two_stage.duet import Duet
from golden_runner.case import Case
from golden_runner.models import generate, llava, renamed
from golden_runner.spy import Watch, scores_at, spying
from golden_runner.v2v import tolerances

RULES = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
}


def check(case: Case) -> None:
    config = case.config
    assert config["mm_vision_select_layer"] == -2 and config["mm_vision_select_feature"] == "patch"
    assert config["mm_projector_type"] == "mlp2x_gelu"
    ids = case.given("input_ids")[0].tolist()
    said = {int(t) for run in case.runs for name in case.names(run, "generated") for t in case.out(run, name).flatten()}
    unused = next(i for i in range(config["llm_config"]["vocab_size"] - 1, 2, -1) if i not in said | set(ids))
    model = llava(renamed(case.weights(), RULES), unused, vision=config["vision_config"], text=config["llm_config"])
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                _check_run(case, run, settings, model, ids, unused, recorded=False)
            continue
        _check_run(case, run, settings, model, ids, unused)


def preset(settings: dict[str, Any]) -> Reducer:
    """``idxs`` never reach the decoder in the released code, so the text query stays "all"."""
    schedule = tuple(zip(settings["layer_list"], settings["ratio_list"], strict=False))
    v2v = settings.get("v2v")
    if v2v is None:
        return Duet.official_llava(None, None, schedule=schedule) if schedule else NoReduction()
    return Duet.official_llava(v2v["dominant"], v2v["contextual"], v2v["cluster_width"], schedule=schedule)


def _check_run(
    case: Case, run: str, settings: dict[str, Any], model: Any, ids: list[int], image: int, recorded: bool = True
) -> None:
    config, pixels = case.config, case.given("pixel_values")
    start = ids.index(config["image_placeholder_id"])
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    prompt = torch.tensor([ids[:start] + [image] * patches + ids[start + 1 :]])
    tower, _ = tolerances(model, pixels)
    reducer = preset(settings)
    # once as it is; once more with the recorded projector output in place of ours, so that the rounding of a deep tower
    # does not blur the strict comparison of everything behind it
    for exact in (False, True) if recorded else (False,):
        views: list[DecoderView] = []

        def at_projector(module: Any, args: Any, output: Tensor, exact: bool = exact) -> Tensor | None:
            if not recorded:
                return None
            case.close(run, "vision_features_before_projector", args[0], tower)
            case.close(run, "image_features_after_projector", output, tower)
            case.fact(run, "image_tokens", [output.shape[1]])
            return case.out(run, "image_features_after_projector").clone() if exact else None

        # before attach: in front of the library's hook
        hook = model.model.multi_modal_projector.register_forward_hook(at_projector)
        try:
            watched = spying(reducer, views) if isinstance(reducer, Duet) else reducer
            with attach(model, watched) as handle, Watch(model.model.language_model) as watch:
                inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}
                result = generate(model, inputs, case.out(run, "generated_token_ids").shape[1] if recorded else 2)
                if recorded:
                    case.same(run, "generated_token_ids", result.sequences[:, prompt.shape[1] :])
                    compare_stages(case, run, settings["layer_list"], handle, watch, views, exact)
                if exact:
                    logits = torch.cat(result.logits)
                    case.close(run, "step_logits", logits)
                    case.close(run, "first_token_logits", logits[:1])
                    case.close(run, "inputs_embeds_to_llm", watch.calls[0][0][0])
                    case.fact(run, "image_token_posi", [start])
                    case.fact(run, "seq_len_entering_each_layer_prefill", [h.shape[1] for h in watch.calls[0][0]])
                    case.fact(
                        run, "kv_len_after_generate", [layer.keys.shape[-2] for layer in result.past_key_values.layers]
                    )
                    compare_steps(case, run, watch)
        finally:
            hook.remove()


def compare_stages(
    case: Case, run: str, layers: list[int], handle: Any, watch: Watch, views: list[DecoderView], exact: bool
) -> None:
    """Survivors at each stage, and with the recorded features their scores."""
    if not layers:
        return
    state = handle._prompt_state
    scored = dict(zip(state.record.scored_layers, [v for v in views if isinstance(v, DecoderView)], strict=True))
    entry = state.layer_groups[0].tokens
    entered = {slot: i for i, slot in enumerate(entry.prompt_index[0][entry.visual[0]].tolist())}
    for s, layer in enumerate(layers):
        before, after = (state.layer_group(at).tokens for at in (layer - 1, layer))
        old, new = ([entered[t] for t in g.prompt_index[0][g.visual[0]].tolist()] for g in (before, after))
        case.same(run, f"stage{s}/kept_in_v2v_token_order", new)
        case.same(run, f"stage{s}/kept_in_current_image_block", [old.index(t) for t in new])
        if not exact:
            continue
        scores = (
            scored[layer].scores[0] if layer in scored else scores_at(handle, layer, watch, call=0)[0][before.visual[0]]
        )
        case.scores(run, f"stage{s}/scores", scores)


def compare_steps(case: Case, run: str, watch: Watch) -> None:
    """[steps, layers] positions of the fed tokens."""
    recorded = case.out(run, "decode_position_id_entering_each_layer")
    assert len(recorded) == len(watch.calls) - 1, (
        f"{run}: {len(recorded)} decode steps recorded, {len(watch.calls) - 1} made"
    )
    for step, positions in enumerate(recorded):
        for layer, position in enumerate(positions):
            watch.rotates(layer, position.view(1, 1), call=step + 1)
    case.compared.add(f"out/{run}/decode_position_id_entering_each_layer")
