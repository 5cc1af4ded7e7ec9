"""Train the tiny video model from the shipped tiny model: ``python -m duet_vlm_lab.train_video --out DIR --seed 0``.

One stage (``recipe/video.py``), under an hour on one core with bf16. Start the same command again after a kill and it
goes on from the last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

from duet_vlm_lab.networks.video_network import build_video_model
from duet_vlm_lab.networks.video_processor import build_video_processor
from duet_vlm_lab.recipe.one_stage import OneStage
from duet_vlm_lab.recipe.video import VideoStage

STEPS = 2200

main = OneStage("duet_vlm_lab.train_video", __doc__, STEPS, VideoStage, build_video_model, build_video_processor)

if __name__ == "__main__":
    main()
