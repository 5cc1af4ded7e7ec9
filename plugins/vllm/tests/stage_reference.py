"""Writes references/stages/FAMILY.json: the answers of transformers with ``duet_vlm.attach``, drops inside the decoder
included. Needs no vLLM; families that take clips need torchvision.

python plugins/vllm/tests/stage_reference.py llava llava_next llava_onevision internvl qwen2_5_vl qwen2_vl qwen3_vl
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import POSITIONS
from reference import inputs_of
from stage_cases import LONGER, SETTINGS, prompts
from tiny import checksum, make
from transformers import AutoModelForImageTextToText, AutoProcessor

import duet_vlm

HERE = Path(__file__).parent / "references" / "stages"


def reducer_of(settings: dict[str, Any], positions: str) -> Any:
    """The method as a server sets it: where it reduces before the decoder, rows have the positions of the family."""
    cls = duet_vlm.get_method(settings["method"])
    given = {name: value for name, value in settings.items() if name not in ("method", "budget")}
    return cls(**given | ({"options": {"positions": positions}} if issubclass(cls, duet_vlm.EncoderReducer) else {}))


def answer(model: Any, inputs: Any) -> list[Any]:
    """Greedy tokens and their log probabilities."""
    count = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=LONGER,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[0, count:].tolist()
    return [
        tokens,
        [
            round(float(step[0].float().log_softmax(-1)[token]), 5)
            for step, token in zip(out.logits, tokens, strict=True)
        ],
    ]


def main() -> None:
    for family in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            place = make(family, Path(folder))
            model = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()
            processor = AutoProcessor.from_pretrained(place)
            asked = {case: inputs_of(processor, prompt) for case, prompt in prompts(family).items()}
            found: dict[str, Any] = {"stock": {case: answer(model, one) for case, one in asked.items()}}
            for name, settings in SETTINGS[family].items():
                with duet_vlm.attach(model, reducer_of(settings, POSITIONS[family]), budget=settings.get("budget")):
                    found[name] = {case: answer(model, one) for case, one in asked.items()}
            made = {"transformers": transformers.__version__, "checksum": checksum(place), "answers": found}
            HERE.mkdir(exist_ok=True)
            (HERE / f"{family}.json").write_text(json.dumps(made, indent=1) + "\n")
            print(family, {name: sum(found[name][case] != found["stock"][case] for case in asked) for name in found})


if __name__ == "__main__":
    main()
