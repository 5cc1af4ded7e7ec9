"""HoliTom inside a Llama-like decoder: what leaves joins what stays, one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from duet_vlm.methods.video.holitom import HoliTom
from duet_vlm.reducers.options import TokenOptions
from golden_runner import inside
from golden_runner.case import Case


def preset(case: Case, settings: dict[str, Any]) -> HoliTom:
    layer, count = settings["HOLITOM_k"], case.meta["image_tokens"]
    return HoliTom.official(
        None, ((layer, round(count * (1 - settings["HOLITOM_r"]))),), options=TokenOptions(positions="keep")
    )


def seeing_all(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """The released call of the layer that ranks hands its attention no causal mask: prompts see what follows."""
    rows: Tensor = args[0] if args else kwargs["hidden_states"]
    if rows.shape[1] > 1:
        kwargs["attention_mask"] = rows.new_zeros(1, 1, rows.shape[1], rows.shape[1])
    return args, kwargs


class Joined(inside.Inside):
    def __init__(self, case: Case, run: str, reducer: HoliTom, prompt: inside.Prompt) -> None:
        settings, hook = case.runs[run], None
        if not settings["layer_k_minus_1_attention_is_causal"]:
            ranks = prompt.text_model.layers[settings["HOLITOM_k"] - 1]
            hook = ranks.register_forward_pre_hook(seeing_all, with_kwargs=True)
        super().__init__(case, run, reducer, prompt)
        if hook is not None:
            hook.remove()

    def compare(self) -> None:
        case, run, layer = self.case, self.run, self.settings["HOLITOM_k"]
        (view,) = self.views
        case.scores(run, "scores", view.scores[0])
        name = "output_of_layer_k_minus_1"
        case.close(run, name, self.watch.output[layer - 1].view_as(case.out(run, name)))
        case.fact(run, "kept", int(view.num_keep))
        kept = self.kept(layer)
        case.same(run, "kept_image_index", kept)
        left = [token for token in range(case.meta["image_tokens"]) if token not in kept]
        case.same(run, "dropped_index", left)
        merged, start = self.state.layer_group(layer).merged_into, self.prompt.starts[0]
        anchor = dict(
            zip(
                (merged.source_tokens[0] - start).tolist(),
                (merged.index[0][merged.target_row[0]] - start).tolist(),
                strict=True,
            )
        )
        case.same(run, "merged_into_index", [anchor[token] for token in left])
        case.close(run, "hidden_states", self.watch.hidden[layer][0])
        case.same(run, "position_ids", self.state.layer_group(layer).tokens.prompt_index[0])
        self.watch.rotates(layer, case.out(run, "position_ids")[None])
        super().compare()


def check(case: Case) -> None:
    inside.runs(case, Joined, preset)
