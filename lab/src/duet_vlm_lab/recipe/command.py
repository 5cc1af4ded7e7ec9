"""Shared by the training commands of the embedded models: options, and the writing of a finished model."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

APART = ("out", "report_to", "export_only")  # options that change nothing in the weights


def parser(name: str, about: str | None, out: str, threads: int = 1, joined: str = "") -> argparse.ArgumentParser:
    """Options of every training command; ``name`` is the module, ``out`` the usual folder, ``joined`` says what the
    threads are for."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    made.add_argument(
        "--out", type=Path, default=Path(out), help="folder for checkpoints and the finished model (weights/)"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=threads, help=joined or None)
    made.add_argument("--fp32", action="store_true", help="no bf16 matrix products (for cores without a bf16 unit)")
    made.add_argument("--export-only", action="store_true", help="export the last checkpoint and stop")
    return made


def parsed(made: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options as given, and those of them that belong into the training log; sets the threads."""
    args = made.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost more than they give on shared cores
    torch.set_num_threads(args.threads)
    return args, {name: value for name, value in vars(args).items() if name not in APART}


def thinned(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """A curve with its validation lines and a dozen of its training lines."""
    plain = [line for line in lines if not any(name.startswith("val_") for name in line)]
    kept = plain[:: max(1, len(plain) // 12)]
    return [line for line in lines if line not in plain or line in kept]


def write(model: PreTrainedModel, processor: ProcessorMixin, target: Path, **log: Any) -> None:
    """Model (float16), processor and training log."""
    model.half().save_pretrained(target)
    processor.save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    (target / "training_log.json").write_text(
        json.dumps({"torch": torch.__version__, **log}).replace("}, {", "},\n{") + "\n"
    )
