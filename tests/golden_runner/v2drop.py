"""V2Drop on a Llama decoder, and on one with M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from duet_vlm.methods.decoder.v2drop import V2Drop
from golden_runner import inside
from golden_runner.case import Case
from golden_runner.models import load, renamed
from golden_runner.t2v import Prompt


class Stages(inside.Inside):
    def compare(self) -> None:
        views = iter(self.views)
        for layer in self.case.meta["layers_before_which_tokens_are_dropped"]:
            name = f"stage_before_layer{layer}"
            before, after = self.kept(layer - 1), self.kept(layer)
            if len(before) > len(after):
                view = next(views)
                moved = (view.hidden_states - view.previous_hidden_states).norm(dim=-1)[0][view.valid[0]]
            else:  # nobody leaves, so nobody was asked
                visual = self.state.layer_group(layer).tokens.visual[0]
                moved = (self.watch.hidden[layer] - self.watch.hidden[layer - 1])[0][visual].norm(dim=-1)
            self.case.scores(self.run, f"{name}/scores", moved)
            self.case.same(self.run, f"{name}/kept_image_index", after)
            self.case.same(self.run, f"{name}/kept_index_in_current_block", [before.index(token) for token in after])
            self.case.close(self.run, f"{name}/hidden_states", self.watch.hidden[layer][0], inside.DEEP)
        super().compare()


def preset(case: Case, settings: dict[str, Any]) -> V2Drop:
    stages = zip(case.meta["layers_before_which_tokens_are_dropped"], case.meta["keep_ratio_of_current"], strict=True)
    return V2Drop.official("qwen2_vl" if "Qwen" in case.meta["method"] else "llava", schedule=tuple(stages))


def check(case: Case) -> None:
    inside.runs(case, Stages, preset)


class QwenPrompt(Prompt):
    """Recorded embeddings and M-RoPE positions as a call of a Qwen2-VL; placeholders are two ids more, or (``within``)
    two of the vocabulary."""

    def __init__(self, case: Case, within: bool = False) -> None:
        start, count = case.meta["image_start"], case.meta["image_tokens"]
        config = dict(case.config)
        weights = case.weights()
        self.table = weights["embed_tokens.weight"]
        embeds = case.given("inputs_embeds").clone()
        special = torch.full_like(self.table[:2], 3.0)
        special[1] = 4.0
        weights["embed_tokens.weight"] = self.table if within else torch.cat([self.table, special])
        text = {
            k: v
            for k, v in config.items()
            if k not in ("mrope_section", "qkv_bias", "vocab_size", "rope_theta", "attn")
        }
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
            "mrope_section": config["mrope_section"],
        }
        vision = dict(depth=1, embed_dim=8, num_heads=1, hidden_size=config["hidden_size"], mlp_ratio=1, patch_size=14)
        image = 0 if within else len(self.table)
        placeholder = weights["embed_tokens.weight"][image]
        assert not (embeds == placeholder).all(-1).any()
        made = Qwen2VLConfig(
            text_config=text | {"vocab_size": len(weights["embed_tokens.weight"])}, vision_config=vision,
            image_token_id=image, video_token_id=image + 1, vision_start_token_id=image + 2, vision_end_token_id=image + 3, tie_word_embeddings=False,
        )  # fmt: skip
        self.model = Qwen2VLForConditionalGeneration(made).eval()
        self.model.set_attn_implementation(case.meta.get("attn") or config["attn"])
        load(
            self.model,
            renamed(weights, {name: f"model.language_model.{name}" for name in ("embed_tokens.", "layers.", "norm.")}),
        )
        self.text_model, self.own_head = self.model.model.language_model, False
        self.starts = [start]
        self.visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        self.visual[:, start : start + count] = True
        self.features = [embeds[0][self.visual[0]]]
        self.embeds = embeds.masked_scatter(self.visual[..., None], placeholder.expand_as(embeds))
        self.mask, self.positions = None, case.given("position_ids").view(3, 1, -1)

    def __call__(self, **kwargs: Any) -> Any:
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=list(self.features))}
        return self.model(
            inputs_embeds=self.embeds.clone(), mm_encoder_outputs=encoded, position_ids=self.positions, **kwargs
        )


class QwenStages(Stages):
    def rotates(self, layer: int, name: str) -> None:
        positions = self.case.out(self.run, name)
        self.watch.rotates(layer, positions[:, None] if positions.ndim == 2 else positions)
        self.case.compared.add(f"out/{self.run}/{name}")


def check_qwen(case: Case) -> None:
    prompt = QwenPrompt(case)
    for run, settings in case.runs.items():
        if "error" in settings:
            case.errors.add(run)  # of the released code's surroundings: the rule itself is in the other runs
            continue
        QwenStages(case, run, preset(case, settings), prompt)
