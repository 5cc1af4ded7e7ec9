"""The embedded models of the lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duet_vlm.api.embedded import EmbeddedModel

WEIGHTS = Path(__file__).parent / "weights"


def read_video_processor(folder: Path) -> Any:
    """The processor of a video model: the stock class of its family needs torchvision."""
    from duet_vlm_lab.networks.video_processor import TinyVideoProcessor

    return TinyVideoProcessor.from_pretrained(folder)


chain = EmbeddedModel("tiny-chain", WEIGHTS / "chain")
page = EmbeddedModel("tiny-page", WEIGHTS / "page")
video = EmbeddedModel("tiny-video", WEIGHTS / "video", read_video_processor)
long = EmbeddedModel("tiny-long", WEIGHTS / "long", read_video_processor)
