"""Writes references/FAMILY.json: what transformers with ``duet_vlm.attach`` answers, first stage only. Needs no vLLM;
clips need torchvision.

python plugins/vllm/tests/reference.py llava llava_next llava_onevision internvl qwen2_5_vl qwen2_vl qwen3_vl
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import METHODS, POSITIONS, Prompt, prompts
from tiny import checksum, make
from transformers import AutoModelForImageTextToText, AutoProcessor

import duet_vlm

HERE = Path(__file__).parent / "references"
NEW = 6


def inputs_of(processor: Any, prompt: Prompt) -> Any:
    text, images, clips = prompt
    given = {
        "videos": [frames for frames, _ in clips],
        "video_metadata": [told for _, told in clips],
        "do_sample_frames": False,
    }
    videos: Any = given if clips else {}
    return processor(text=text, images=images or None, return_tensors="pt", **videos)


def answer(model: Any, processor: Any, prompt: Prompt, settings: dict[str, Any], positions: str) -> list[Any]:
    """Rows of the prompt that entered, greedy tokens, and their log probabilities."""
    _, images, clips = prompt
    inputs = inputs_of(processor, prompt)
    count = inputs["input_ids"].shape[1]
    cls = duet_vlm.get_method(settings["method"])
    given = {name: value for name, value in settings.items() if name != "method"} | {
        "options": {"positions": positions}
    }
    given |= {"schedule": ()} if "schedule" in cls.__dataclass_fields__ else {}
    with duet_vlm.attach(model, cls(**given)) as handle, torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        spans = handle.trace[0] if images or clips else []
    rows = count - sum(
        span.span.tokens - (len(span.stages[0].kept) if span.stages else span.span.tokens) for span in spans
    )
    tokens = out.sequences[0, count:].tolist()
    return [
        rows,
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
            found = {
                f"{name}/{case}": answer(model, processor, prompt, settings, POSITIONS[family])
                for name, settings in METHODS[family].items()
                for case, prompt in prompts(family).items()
            }
            HERE.mkdir(exist_ok=True)
            made = {"transformers": transformers.__version__, "checksum": checksum(place), "answers": found}
            (HERE / f"{family}.json").write_text(json.dumps(made, indent=1) + "\n")
            print(family, len(found), sorted({str(v[1][:3]) for v in found.values()})[:6])


if __name__ == "__main__":
    main()
