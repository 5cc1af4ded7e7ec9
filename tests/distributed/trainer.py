"""Run by test_distributed.py under ``accelerate launch``: the stock Trainer on all ranks, uninterrupted, and stopped
and resumed.

``trainer.py FOLDER CHECKPOINTING``: writes FOLDER/whole and FOLDER/resumed (models as the Trainer saves them) and their
loss curves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from families import build
from ranks import without_gpus
from ranks_data import BUDGET, MOMENTUM
from stock_trainer import losses, trainer
from training_data import RATE

import duet_vlm


def run(folder: Path, steps: int, checkpointing: str, resume: bool = False) -> list[float]:
    """One run of the Trainer with one sample per rank, saved at its end; its losses."""
    model = build("llava")
    # the Trainer cannot read the names in its own checkpoint unless the weights are sharded (see test_trainers)
    if resume:
        model = type(model).from_pretrained(folder / "checkpoint-2")
    # LLaVA reads the last but one layer: DDP waits for the others' gradients, resuming FSDP2
    for name, weight in model.named_parameters():
        # misses their optimizer state
        weight.requires_grad_("encoder.layers.3" not in name and "post_layernorm" not in name)
    options = {"gradient_checkpointing": True} if checkpointing == "model" else {}
    with duet_vlm.attach(model, "duet", budget=BUDGET) as handle:
        duet_vlm.save_to_config(handle)
        done = trainer(
            model, "llava", folder, use_cpu=False, per_device_train_batch_size=1, max_steps=steps, save_strategy="steps", save_steps=2, **options,
            optimizer=(torch.optim.SGD, {"lr": RATE, "momentum": MOMENTUM}),
        )  # fmt: skip
        done.train(resume_from_checkpoint=resume)
        done.save_model(str(folder))
    return losses(done)


def main(folder: Path, checkpointing: str) -> None:
    without_gpus()
    curves = {
        "whole": run(folder / "whole", 4, checkpointing),
        "stopped": run(folder / "resumed", 2, checkpointing),
        "resumed": run(folder / "resumed", 4, checkpointing, resume=True),
    }
    if torch.distributed.get_rank() == 0:
        (folder / "curves.json").write_text(json.dumps(curves))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
