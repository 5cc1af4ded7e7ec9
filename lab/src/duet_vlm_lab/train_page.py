"""Train ``tiny-page`` from the shipped tiny-chain: ``python -m duet_vlm_lab.train_page --out DIR --seed 0`` (``make
train-page``).

One stage (``recipe/page.py``), under an hour on one core with bf16. Start the same command again after a kill and it
goes on from the last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

from torch import Tensor

from duet_vlm_lab.networks.page_network import build_page_model, build_page_processor
from duet_vlm_lab.recipe.one_stage import OneStage
from duet_vlm_lab.recipe.page import PageStage
from duet_vlm_lab.train_chain import in_turns

STEPS = 2400
DECODER = "language_model."


def whole(core: dict[str, Tensor]) -> dict[str, Tensor]:
    """All layers of the decoder from those that learned."""
    decoder = in_turns({name.removeprefix(DECODER): value for name, value in core.items() if name.startswith(DECODER)})
    return {name: value for name, value in core.items() if not name.startswith(DECODER)} | {
        DECODER + name: value for name, value in decoder.items()
    }


main = OneStage("duet_vlm_lab.train_page", __doc__, STEPS, PageStage, build_page_model, build_page_processor, whole)

if __name__ == "__main__":
    main()
