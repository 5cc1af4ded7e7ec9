"""Run by test_distributed.py under ``accelerate launch``: every scenario trains a tiny model on all ranks; rank 0
writes what came out.

``ranks.py FOLDER``: FOLDER/scenarios.json is a list of Scenario fields; for each FOLDER/NAME.pt gets losses and full
weights.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from families import build
from ranks_data import BUDGET, STEPS, Scenario, freeze
from torch import nn
from training_data import RATE, collate, targets_in
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import duet_vlm


@dataclass
class Result:
    """What rank 0 reports: loss of every step over all ranks, tokens per layer it measured last, weights afterwards,
    and an evaluation."""

    losses: list[float]
    measured: float
    weights: dict[str, torch.Tensor]
    evaluated: float


def reducer(model: nn.Module) -> duet_vlm.Handle:
    return duet_vlm.attach(model, "duet", budget=BUDGET)


def train(scenario: Scenario, accelerator: Accelerator) -> Result:
    """One SGD step per entry of STEPS; every rank sees its own samples."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"], config["gradient_clipping"] = 1, 0.0
        # share out the small weights of small models, too
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        unset_hf_deepspeed_config()  # the model is made whole, from its own seeds, and shared out by prepare
    model = build(scenario.family)
    freeze(model, scenario.tower)
    if scenario.checkpointing == "model":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.activation_checkpointing = scenario.checkpointing == "plugin"
    core, handle = model, None
    if scenario.attach == "before":
        handle = reducer(model)
    model, optimizer = accelerator.prepare(
        model, torch.optim.SGD([w for w in model.parameters() if w.requires_grad], RATE)
    )
    if handle is None:
        handle = reducer(model)
    model.train()
    losses = []
    for step in STEPS:
        batch = collate(scenario.family, step[accelerator.process_index])
        targets = accelerator.reduce(torch.tensor(float(targets_in(batch))))
        # gradients are averaged over ranks; no cache: layers that the plugin recomputes would write to it twice, in
        # stock models too
        loss = model(**batch, use_cache=False, num_items_in_batch=targets / accelerator.num_processes).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    # the first rank's last batch has an image
    measured = handle.report().measured_mean if accelerator.is_main_process else 0.0
    model.eval()
    with torch.no_grad():
        batch = collate(scenario.family, STEPS[1][accelerator.process_index])
        targets = accelerator.reduce(torch.tensor(float(targets_in(batch))))
        evaluated = accelerator.reduce(model(**batch, num_items_in_batch=targets).loss).item()
    weights = {
        name.replace("_checkpoint_wrapped_module.", ""): w
        for name, w in (accelerator.get_state_dict(model) or {}).items()
    }
    handle.detach()
    assert not any(
        hook
        for module in core.modules()
        for hook in module._forward_pre_hooks.values()
        if "duet" in type(hook).__module__
    )
    accelerator.free_memory()
    return Result(losses, measured, weights, evaluated)


def without_gpus() -> None:
    """accelerate 1.15 has DDP for CPUs but shards only where it finds GPUs: the one function that looks for them is
    replaced."""
    torch.set_num_threads(1)
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *ignored, **options: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # no operators that would have to be compiled first


def main(folder: Path) -> None:
    without_gpus()
    scenarios: list[dict[str, Any]] = json.loads((folder / "scenarios.json").read_text())
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    for fields in scenarios:
        scenario = Scenario(**fields)
        print(f"rank {accelerator.process_index} of {accelerator.num_processes} starts {scenario.name}", flush=True)
        result = train(scenario, accelerator)
        if accelerator.is_main_process:
            torch.save(
                vars(result) | {"kind": str(accelerator.distributed_type), "ranks": accelerator.num_processes},
                folder / f"{scenario.name}.pt",
            )
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
