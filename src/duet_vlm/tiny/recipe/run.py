"""Bookkeeping of one training stage: checkpoints that resume exactly, and a log."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import nn


class Run:
    """One stage of training in ``folder``: ``<name>.pt`` is the last checkpoint, ``<name>.jsonl`` the log.

    All data are a function of the step, so model, optimisers, the random state of torch and the step are the whole state.
    """

    def __init__(self, folder: Path, name: str, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer], every: int = 200):
        self.file, self.log_file = folder / f"{name}.pt", folder / f"{name}.jsonl"
        self.name, self.modules, self.opts, self.every = name, modules, opts, every
        self.started, self.before = time.time(), 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the last checkpoint, if any; return the step to go on with."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        for opt, saved in zip(self.opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        self.before = state["seconds"]
        return state["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint after ``step`` steps; a kill in between leaves the old one whole."""
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizers": [o.state_dict() for o in self.opts],
            "random": torch.get_rng_state(),
            "seconds": self.seconds(),
            "step": step,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.file)

    def seconds(self) -> float:
        """Time spent in this stage, earlier starts included."""
        return self.before + time.time() - self.started

    def log(self, step: int, **values: object) -> None:
        """One line to the screen and to the log file."""
        record = {"stage": self.name, "step": step, "seconds": round(self.seconds()), **values}
        with self.log_file.open("a") as f:
            f.write(json.dumps(record) + "\n")
        print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)


def apply(loss: torch.Tensor, modules: list[nn.Module], opts: list[torch.optim.Optimizer], bf16: bool) -> None:
    """Backward, clip, step. With ``bf16`` the matrix products of the optimisers, too, run in bf16."""
    for opt in opts:
        opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for opt in opts:
            opt.step()
