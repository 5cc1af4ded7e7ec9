"""Models with random weights from a config alone: weights do not change how long a layer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from duet_vlm.loading import quiet


def random_model(config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    """The model of ``config`` (an object, a config.json or a folder with one), in evaluation mode.

    Made in place on ``device``: nothing of it passes through the host's memory.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if isinstance(config, Path):
        file = config / "config.json" if config.is_dir() else config
        if not file.is_file():
            raise ValueError(f"--config-only {file}: no such file; give a config.json or a folder with one")
        config = AutoConfig.from_pretrained(file, local_files_only=True)
    torch.manual_seed(0)
    with quiet(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model = model.eval().to(device)
    model.generation_config.eos_token_id = None  # random models stop at random
    model.generation_config.pad_token_id = 0
    return model
