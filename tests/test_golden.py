"""Fidelity to the released code: every recorded case of a folder, one test item each (see golden_runner).

``pytest tests/test_golden.py --golden-dir DIR`` runs any folder of the same format.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_runner import (
    anyres,
    apet,
    cdpruner,
    clips,
    compressors,
    dart,
    e2e,
    fastv,
    fitprune,
    greedy,
    hired,
    holitom,
    probed,
    prumerge,
    qwen,
    reroute,
    sparsevlm,
    t2v,
    tokencarve,
    tome,
    towers,
    v2drop,
    v2v,
    vscan,
)
from golden_runner.case import SCORE, Case

KINDS = {
    "V2V": v2v.check,
    "T2V": t2v.check,
    "T2V, original PyramidDrop": t2v.check,
    "FastV baseline": fastv.check,
    "Qwen2.5-VL V2V and T2V": qwen.check,
    "end to end LLaVA": e2e.check,
    "V2V, LLaVA-NeXT style tiles (anyres)": anyres.check,
    "FasterVLM": towers.check_clip,
    "SCOPE": greedy.check_scope,
    "DivPrune": greedy.check_divprune,
    "VisPruner": towers.check_clip,
    "VisPruner, SigLIP": towers.check_siglip,
    "HiRED": hired.check,
    "LLaVA-PruMerge / PruMerge+": prumerge.check,
    "ToMe bipartite soft matching": tome.check_matching,
    "DART": dart.check,
    "ApET, encoder stage": apet.check_encoder,
    "ApET, LLM stage (LLaVA)": apet.check_llm,
    "ApET, Qwen2.5-VL input stage": apet.check_qwen_input,
    "ApET, Qwen2.5-VL LLM stage (present but not called in the released code)": apet.check_llm,
    "ApET, Video-LLaVA": apet.check_video,
    "PIO-FVLM / TRIO": probed.check,
    "FitPrune": fitprune.check,
    "SparseVLM": sparsevlm.check,
    "TokenCarve": tokencarve.check,
    "V2Drop (LLaVA)": v2drop.check,
    "V2Drop (Qwen2-VL)": v2drop.check_qwen,
    "CDPruner": cdpruner.check,
    "VScan stage 1 (also the encoder stage of PIO-FVLM/TRIO: same file)": vscan.check_clip,
    "VScan stage 1, Qwen2.5-VL (also the encoder stage of PIO-FVLM/TRIO there)": vscan.check_qwen,
    "VScan stage 2": vscan.check_decoder,
    "ToMe inside a ViT": tome.check_tower,
    "VidCom2": clips.check_vidcom2,
    "EVS": clips.check_evs,
    "QueCC": compressors.check_quecc,
    "VQToken": compressors.check_vqtoken,
    "HoliTom (outer, before the LLM)": clips.check_holitom,
    "HoliTom (inner, in the LLM)": holitom.check,
    "PruneVid": clips.check_prunevid,
    "FastVID (LLaVA-OneVision version)": clips.check_fastvid,
    "Reroute": reroute.check,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        found = sorted(metafunc.config.getoption("--golden-dir").glob("*.json"))
        metafunc.parametrize("golden", found or [None], ids=[path.stem for path in found] or ["nothing found"])


def test_golden(golden: Path | None, request: pytest.FixtureRequest) -> None:
    if golden is None:
        pytest.fail(f"no recorded case (*.json) in {request.config.getoption('--golden-dir')}")
    case = Case(golden)
    stage = case.meta.get("stage") or case.meta.get("method")
    if stage not in KINDS:
        pytest.fail(f"{golden.name}: unknown kind {stage!r}, known: {', '.join(KINDS)}")
    with torch.no_grad():
        KINDS[stage](case)
    case.finish()


@pytest.mark.parametrize("name", ["e2e_llava_b1_s951", "qwen25vl_duet_b1_s901"])
def test_recorded_tokens_run_past_the_end_of_a_sequence(name: str) -> None:
    """The recording goes on behind an end-of-sequence token: here every run's first token is declared to be one."""
    case = Case(Path(__file__).parent / "golden" / f"{name}.json")
    first = {
        int(t[0, 0]) for key, t in case.tensors.items() if key.endswith(("/generated_token_ids", "/new_token_ids"))
    }
    assert first
    case.config["llm_config"]["eos_token_id"] = sorted(first)
    with torch.no_grad():
        KINDS[case.meta["stage"]](case)
    case.finish()


def reordered(model: Any, seed: int) -> Any:
    """The same decoder by mathematics: hidden units of every MLP in another order, so that sums are rounded in another
    order."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer in model.model.language_model.layers:
        order = torch.randperm(layer.mlp.down_proj.in_features, generator=draw)
        for before in (layer.mlp.gate_proj, layer.mlp.up_proj):
            before.weight.copy_(before.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    return model


@pytest.mark.parametrize("sharper", [1, 4])
def test_scores_may_differ_by_what_another_order_of_sums_costs(sharper: int) -> None:
    """Attention that is sharper amplifies rounding: what is allowed grows with it, and not by much more."""
    case = Case(Path(__file__).parent / "golden/qwen25vl_duet_b1_s901.json")
    inputs = {name: case.given(name) for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    with torch.no_grad():
        model = qwen.build(case, "eager")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(sharper)
        allowed = qwen.score_tolerance(model, inputs)["relative"]
        mine, _ = qwen.scores_in_full(model, inputs)
        others = [qwen.scores_in_full(reordered(model, seed), inputs)[0] for seed in range(4)]
    worst = max(float((a - b).abs().max() / b.max()) for other in others for a, b in zip(other, mine, strict=True))
    assert worst <= allowed <= 10 * worst
    assert sharper == 1 or worst > SCORE["relative"]  # a tolerance that stands still would refuse what is equal
