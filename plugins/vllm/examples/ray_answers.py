"""Answers to the lines of a JSON-lines file (id, image, question) by Ray Data with one vLLM engine a GPU, on one
machine or a cluster.

Start it on a machine of the cluster; files must stand where all machines see them. ``--out`` is a folder of JSON lines
in no order. Every engine takes one of the CPUs that Ray counts, and reading and writing take others: Ray waits for ever
where there are none left.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import ray
from transformers import AutoConfig
from vllm import LLM, SamplingParams

from duet_vlm.inputs.images import open_image


class Engine:
    """Answers batches of lines; a picture that cannot be read costs its own line only."""

    def __init__(self, model: str, settings: dict[str, Any], options: dict[str, Any], longest: int) -> None:
        (architecture,) = AutoConfig.from_pretrained(model).architectures
        self.llm = LLM(model, hf_overrides={"architectures": ["Duet" + architecture], "duet": settings}, **options)
        self.sampling = SamplingParams(temperature=0, max_tokens=longest)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        turns, errors = [], []
        for image, question in zip(batch["image"], batch["question"], strict=True):
            try:
                content = [{"type": "image_pil", "image_pil": open_image(image)}, {"type": "text", "text": question}]
                turns.append([{"role": "user", "content": content}])
                errors.append("")
            except (OSError, ValueError) as error:
                errors.append(str(error))
        said = iter(self.llm.chat(turns, self.sampling, use_tqdm=False) if turns else [])
        done = [None if error else next(said) for error in errors]
        answers = [one.outputs[0].text.strip() if one else "" for one in done]
        rows = [len(one.prompt_token_ids) if one else 0 for one in done]
        return {**batch, "answer": answers, "prompt_tokens": rows, "error": errors}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--model", required=True)
    ask.add_argument("--data", required=True)
    ask.add_argument("--out", required=True)
    ask.add_argument(
        "--settings",
        type=json.loads,
        default={"method": "duet_plus", "budget": 64},
        help="as JSON; a budget counts what enters",
    )
    ask.add_argument("--engines", type=int, default=1)
    ask.add_argument("--gpus", type=float, default=1, help="of each engine")
    ask.add_argument("--batch", type=int, default=256)
    ask.add_argument("--max-new-tokens", type=int, default=64)
    ask.add_argument("--options", type=json.loads, default={}, help="of vLLM's LLM, as JSON")
    given = ask.parse_args()
    lines = ray.data.read_json(given.data).map_batches(
        Engine,
        fn_constructor_args=(given.model, given.settings, given.options, given.max_new_tokens),
        compute=ray.data.ActorPoolStrategy(size=given.engines),
        num_gpus=given.gpus,
        batch_size=given.batch,
    )
    lines.write_json(given.out)


if __name__ == "__main__":
    main()
