"""Train the tiny video model from the shipped tiny model: ``python -m duet_vlm.tiny.train_video --out DIR --seed 0``.

One stage (``recipe/video.py``), under an hour on one core with bf16. Start the same command again after a kill and it goes on from the
last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

from duet_vlm.tiny.recipe.one_stage import OneStage
from duet_vlm.tiny.recipe.video import VideoStage
from duet_vlm.tiny.video_network import build_video_model
from duet_vlm.tiny.video_processor import build_video_processor

STEPS = 2200

main = OneStage("duet_vlm.tiny.train_video", __doc__, STEPS, VideoStage, build_video_model, build_video_processor)

if __name__ == "__main__":
    main()
