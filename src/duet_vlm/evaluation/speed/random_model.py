"""Models from a config alone: without weights, to plan with; with random ones, to time: weights do not change how long
a layer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from duet_vlm.api.embedded import model_names
from duet_vlm.api.loading import config_of, quiet


def skeleton(name: str, config_file: Path | None = None) -> tuple[Any, int]:
    """The model without weights (meta device), and the bytes of one number of its cache; from ``config_file`` alone if
    there is one."""
    from transformers import AutoModelForImageTextToText

    config = config_of(name) if config_file is None else config_in(config_file)
    with quiet(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    dtype = (
        torch.float32
        if name in model_names() and config_file is None
        else getattr(config, "dtype", None) or torch.float32
    )
    return model, dtype.itemsize


def config_in(file: Path) -> Any:
    """The config in a ``config.json`` or in a folder that holds one; nothing else is needed.

    Raises
    ------
    ValueError
        If there is none, or none that transformers can read.
    """
    from transformers import AutoConfig

    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"--config-only {file}: no such file; give a config.json or a folder with one")
    try:
        with quiet():
            return AutoConfig.from_pretrained(file, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--config-only {file}: not a config that transformers can read: {' '.join(str(error).split())}"
        ) from error


def random_model(
    config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> nn.Module:
    """The model of ``config`` (an object, a config.json or a folder with one), in evaluation mode.

    Made in place on ``device``: nothing of it passes through the host's memory.
    """
    from transformers import AutoModelForImageTextToText

    if isinstance(config, Path):
        config = config_in(config)
    torch.manual_seed(0)
    with quiet(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model = model.eval().to(device)
    model.generation_config.eos_token_id = None  # random models stop at random
    model.generation_config.pad_token_id = 0
    return model
