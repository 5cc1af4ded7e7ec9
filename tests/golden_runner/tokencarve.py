"""TokenCarve inside a Llama decoder, earlier caches cut."""

from __future__ import annotations

from typing import Any

import torch

from duet_vlm.methods.decoder.tokencarve import TokenCarve
from duet_vlm.ops.information import information
from duet_vlm.ops.select import ranking, ranks
from golden_runner import inside
from golden_runner.case import Case, near

MODES = {1: 0.0, 2: 1.0}  # the weight of attention where one ranking alone counts


def preset(case: Case, settings: dict[str, Any]) -> TokenCarve:
    weight = MODES.get(settings["SV_AV_mode"], settings["SV_AV_weight"])
    return TokenCarve.official(settings["token_carve_image_token_nums"], weight)


class Carved(inside.Inside):
    def compare(self) -> None:
        case, run = self.case, self.run
        (view,) = self.views
        case.scores(run, "attention_score", view.scores[0])
        carried = information(view.hidden_states, view.valid)[0]
        near(f"{run}/svd_score", carried, case.out(run, "svd_score"), {"relative": 1e-4, "absolute": 0.0})
        case.compared.add(f"out/{run}/svd_score")
        self.compare_points(view.scores[0], carried)
        merged = self.state.layer_group(2).merged_into
        start = self.prompt.starts[0]
        joins = merged.target_row[0] >= 0
        ours = {
            int(m) - start: int(merged.index[0, r]) - start
            for m, r in zip(merged.source_tokens[0][joins], merged.target_row[0][joins], strict=True)
        }
        recorded = zip(case.out(run, "merged_index").tolist(), case.out(run, "merged_into_index").tolist(), strict=True)
        assert ours == dict(recorded), f"{run}: merged {ours}"
        kept = self.kept(2)
        case.same(run, "kept_image_index", kept)
        case.same(run, "stage1_index", sorted(kept + list(ours)))
        assert set(case.out(run, "set_a_index").tolist()) == self.better(view.scores[0], carried), (
            f"{run}: another better half"
        )
        case.compared |= {f"out/{run}/{name}" for name in ("merged_index", "merged_into_index", "set_a_index")}
        case.same(run, "kept_positions", self.state.layer_group(2).tokens.prompt_index[0])
        case.close(run, "hidden_states_entering_layer2", self.watch.hidden[2][0])
        super().compare()

    def points(self, attention: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        weight, everyone = (
            preset(self.case, self.settings).attention_weight,
            torch.ones(1, len(carried), dtype=torch.bool),
        )
        by_attention, by_information = (
            len(carried) - ranks(ranking(x[None], everyone))[0] for x in (attention, carried)
        )
        return weight * by_attention + (1 - weight) * by_information

    def compare_points(self, attention: torch.Tensor, carried: torch.Tensor) -> None:
        """Neighbouring ranks may swap by rounding: within one rank point."""
        name = f"out/{self.run}/fused_score"
        if self.settings["SV_AV_mode"] == 0:
            assert (self.points(attention, carried) - self.case.out(self.run, "fused_score")).abs().max() <= 1
        else:
            alone = carried if self.settings["SV_AV_mode"] == 1 else attention
            near(name, alone, self.case.out(self.run, "fused_score"), {"relative": 1e-4, "absolute": 0.0})
        self.case.compared.add(name)

    def better(self, attention: torch.Tensor, carried: torch.Tensor) -> set[int]:
        points = self.points(attention, carried)
        order = ranking(points[None], torch.ones(1, len(points), dtype=torch.bool))[0]
        return set(order[: self.settings["token_carve_image_token_rank"] // 2].tolist())


def check(case: Case) -> None:
    inside.runs(case, Carved, preset)
