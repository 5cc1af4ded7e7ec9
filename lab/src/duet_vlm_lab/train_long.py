"""Train ``tiny-long`` from the shipped tiny video model: ``python -m duet_vlm_lab.train_long --out DIR --seed 0``
(``make train-long``).

One stage (``recipe/long.py``), under an hour on one core with bf16. Start the same command again after a kill and it
goes on from the last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

from duet_vlm_lab.generators.long_clips import LENGTHS, SIDE
from duet_vlm_lab.networks.long_network import LONG_WORDS, POSITIONS, build_long_model
from duet_vlm_lab.networks.video_processor import TinyVideoProcessor, build_video_processor
from duet_vlm_lab.recipe.long import LongStage
from duet_vlm_lab.recipe.one_stage import OneStage

STEPS = 1500


def processor() -> TinyVideoProcessor:
    """Reads small frames, and the words of this task."""
    return build_video_processor(SIDE, LONG_WORDS, LENGTHS[0], POSITIONS)


main = OneStage("duet_vlm_lab.train_long", __doc__, STEPS, LongStage, build_long_model, processor)

if __name__ == "__main__":
    main()
