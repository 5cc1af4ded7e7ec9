"""Accuracy of the embedded models on a server: stock vLLM, the first stage alone and both stages at equal mean tokens; and
how many answers are those of the same method attached in transformers.

    python benchmarks/serve_accuracy.py               # in the environment of make test-vllm, and pip install --no-deps -e lab
    python benchmarks/serve_accuracy.py --compare     # in that of make test, where methods are attached

Questions are those that ``duet-vlm eval`` asks with the same seed. Both sides keep the same mean number of tokens over
the decoder's layers: the first stage alone all of them at every layer, both stages more at first and fewer later.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import serve
import torch
from PIL import Image

import duet_vlm
from duet_vlm.api.embedded import embedded_task
from duet_vlm.api.loading import LoadedModel, load
from duet_vlm.evaluation.run_sample import inputs_of
from duet_vlm.evaluation.tasks import TaskQuestion, right, task

SEED, AT_ONCE, BATCH = 7, 32, 20
TASKS = ("tiny", "tiny-crowded", "tiny-chain", "tiny-page")
COMPACT = {"options": {"positions": "compact"}}  # as served, for LLaVA
METHODS: dict[str, dict[str, Any]] = {"first": {"schedule": (), **COMPACT}, "both": COMPACT}


async def served(at: serve.Server, questions: list[TaskQuestion], share: float | None, longest: int) -> list[str]:
    """Answers of a server, many at once."""
    gate = asyncio.Semaphore(AT_ONCE)
    extra: dict[str, Any] = {"add_special_tokens": True}  # LLaVA's chat template leaves <s> to the tokenizer
    if share is not None:
        extra["mm_processor_kwargs"] = {"duet_budget": share}

    async def one(question: TaskQuestion) -> str:
        pictures = [{"type": "image_url", "image_url": {"url": as_url(image)}} for image in question.images]
        content = [*pictures, {"type": "text", "text": question.text}]
        async with gate:
            answer = await client.chat.completions.create(
                model=at.model, messages=[{"role": "user", "content": content}], max_tokens=longest, temperature=0,
                extra_body=extra,
            )  # fmt: skip
        return (answer.choices[0].message.content or "").strip()

    async with serve.client_of(at) as client:
        return list(await asyncio.gather(*map(one, questions)))


def as_url(image: Image.Image) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def attached(
    loaded: LoadedModel, stages: str, questions: list[TaskQuestion], share: float | None, longest: int
) -> list[str]:
    """Answers of the same method attached in transformers."""
    context = (
        contextlib.nullcontext()
        if share is None
        else duet_vlm.attach(loaded.model, "duet", budget=share, **METHODS[stages])
    )
    said: list[str] = []
    with context, torch.no_grad():
        for first in range(0, len(questions), BATCH):
            inputs = inputs_of(loaded, questions[first : first + BATCH])
            made = loaded.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            new = made[:, inputs["input_ids"].shape[1] :]
            said += [text.strip() for text in loaded.processor.batch_decode(new, skip_special_tokens=True)]
    return said


def measure(name: str, count: int, shares: list[float]) -> list[dict[str, Any]]:
    """Rows of one task, read by the model that was trained for it, with all answers."""
    asked, model = task(name), embedded_task(name).model
    limit = json.loads((model.folder / "config.json").read_text())["text_config"]["max_position_embeddings"]
    questions = [asked.ask(SEED, number) for number in range(count)]
    options = [*serve.CPU, "--max-model-len", str(limit)]
    rows: list[dict[str, Any]] = []
    for engine in ("stock", "first", "both"):
        with tempfile.TemporaryDirectory() as place:
            copied = shutil.copytree(model.folder, Path(place) / "model")
            folder = str(serve.named_as_on_the_hub(copied))
            with serve.server(folder, serve.ENGINES[engine], options, Path(place) / engine) as at:
                for share in [None] if engine == "stock" else shares:
                    said = asyncio.run(served(at, questions, share, asked.max_new_tokens))
                    hits = "".join("01"[right(q, a)] for q, a in zip(questions, said, strict=True))
                    row = {"task": name, "stages": engine, "share": share, "questions": count, "hits": hits}
                    print(row, file=sys.stderr)
                    rows.append(row | {"answers": said})
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Count the answers that the same method gives where it is attached in transformers."""
    for row in rows:
        asked, loaded = task(row["task"]), load(embedded_task(row["task"]).model.name, "cpu")
        questions = [asked.ask(SEED, number) for number in range(row["questions"])]
        here = attached(loaded, row["stages"], questions, row["share"], asked.max_new_tokens)
        row["as_attached"] = sum(map(str.__eq__, row["answers"], here))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="embedded tasks with pictures")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.33, 0.22, 0.11])
    parser.add_argument("--compare", action="store_true", help="ask nothing; count in --out the answers as attached")
    parser.add_argument("--out", type=Path, default=serve.HERE / "results" / "serve_accuracy.json")
    given = parser.parse_args()
    if given.compare:
        made = json.loads(given.out.read_text())
        compare(made["results"])
    else:
        rows = [row for name in given.tasks for row in measure(name, given.questions, given.shares)]
        made = {"benchmark": "serve_accuracy", "environment": serve.environment(), "seed": SEED, "results": rows}
    given.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
