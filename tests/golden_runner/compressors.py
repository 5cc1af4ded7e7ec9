"""Modules with weights: the recorded rows from the recorded weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duet_vlm.methods.trained.quecc import QueCCModule
from duet_vlm.methods.trained.vqtoken import FrameModule
from duet_vlm.ops.kmeans import elbow, kmeans, means
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.windows import windows, within
from golden_runner.case import Case

CLOSE = {"relative": 1e-5, "absolute": 1e-5}
LEAST = 12  # clusters that the elbow begins with


@torch.no_grad()
def check_quecc(case: Case) -> None:
    config, weights = case.config, case.weights()
    module = QueCCModule(
        config["embed_dim"], config["multi_level_dim"], config["text_dim"], config["heads"], config["kernel"]
    )
    module.load_state_dict(
        {name.removeprefix("0."): weight for name, weight in weights.items() if name.startswith("0.")}
    )
    side = config["grid"]
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None].expand(config["batch"], -1, -1)
    for run, settings in case.runs.items():
        count = settings["tokens"]
        every = torch.ones(place.shape[:2], dtype=torch.bool)
        cells = windows(place, every, torch.full((config["batch"],), count), count, side**2 // count)
        rows = module(
            case.tensors["in/x"], case.tensors["in/x_multi"], case.tensors["in/text"][:, 0], cells, within(place, cells)
        )
        case.close(run, "compressed", rows)
        hidden = nn.functional.gelu(nn.functional.linear(rows, weights["1.weight"], weights["1.bias"]))
        case.close(run, "projected", nn.functional.linear(hidden, weights["3.weight"], weights["3.bias"]))


@torch.no_grad()
def check_vqtoken(case: Case) -> None:
    features, config = case.tensors["in/features"], case.config
    rows = unit_rows(features.flatten(0, 1))[None]
    module = FrameModule(config["tokens_per_frame"], config["dim"], config["heads"]).eval()
    module.load_state_dict(case.weights())
    for run, settings in case.runs.items():
        if "error" in settings:
            # names that its own class does not know: here the number of clusters is a setting like any other
            case.errors.add(run)
            continue

        def clustered(first: Tensor, rounds: int = settings["max_iteration"]) -> tuple[Tensor, Tensor]:
            there = torch.ones(1, len(first), dtype=torch.bool)
            labels, centres = kmeans(rows, torch.ones(rows.shape[:2], dtype=torch.bool), first[None], there, rounds)
            return labels, means(rows, labels, centres)

        if case.has(run, "distortions"):
            found = []
            for count in range(LEAST, settings["max_K"] + 1):
                labels, codebook = clustered(case.out(run, name := f"init_index_K{count}"))
                found.append(float((rows[0] - codebook[0, labels[0]]).square().sum()))
                case.compared.add(f"out/{run}/{name}")
            case.close(run, "distortions", torch.tensor(found), CLOSE)
            case.fact(run, "best_K", LEAST if settings.get("method") == "silhouette" else elbow(found, LEAST))
        name = "init_index" if case.has(run, "init_index") else "final_init_index"
        labels, codebook = clustered(case.out(run, name))
        case.compared.add(f"out/{run}/{name}")
        case.same(run, "labels", labels.view(features.shape[:2]))
        case.close(run, "cluster_means", codebook[0])
        case.close(run, "output", module(labels.view(1, *features.shape[:2]), codebook)[0])
