"""A larger decoder with fewer rows or a smaller one with more, at equal operations: what QueCC's paper asks, on two
embedded decoders.

``python lab/studies/decoder_sizes.py [--seed 0]``: the start of the compressors' comparison with all of its layers and
with the first half of them, both trained further in full (the half has to learn to answer from there), then with
``quecc`` at few rows; results/decoder_sizes.json. For each number of rows in front of the whole decoder the half gets
as many as cost a question the same, tower, module and the pass over the question counted. A row that is there is not
made again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import torch
from common import environment
from compressors import CONVERSATIONS, IMITATE, ROOT, SIDE, SOURCES, START, asked, chosen, rows, trained, write

FILE, OUT = Path(__file__).parent / "results" / "decoder_sizes.json", ROOT / "out" / "decoder_sizes"
ROWS = (4, 16)  # in front of the whole decoder
FIRST = 1600  # conversations of each source in full, for either decoder
METHOD = "quecc"


def cut(layers: int) -> Path:
    """The start with its first ``layers`` decoder layers."""
    from duet_vlm.api.loading import load

    folder = OUT / f"start-{layers}"
    if not (folder / "config.json").exists():
        loaded = load(START)
        text = loaded.model.model.language_model
        text.layers = text.layers[:layers]
        loaded.model.config.text_config.num_hidden_layers = layers
        loaded.processor.save_pretrained(folder)
        loaded.model.save_pretrained(folder)
    return folder


def gflops(folder: Path, tokens: int) -> float:
    """Predicted of the first question of the first task; a module's weights change nothing about it."""
    import duet_vlm
    from duet_vlm.api.loading import load
    from duet_vlm.evaluation.tasks import task

    loaded, question = load(str(folder)), task(SOURCES[0]).ask(0, 0)
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
        add_generation_prompt=True,
    )
    inputs = loaded.processor(images=question.images, text=text, return_tensors="pt")
    with torch.no_grad(), duet_vlm.attach(loaded.model, METHOD, budget=tokens, **chosen(METHOD, tokens)) as handle:
        loaded.model(**inputs)
        return handle.report().observed.flops / 1e9


def alike(small: Path, target: float) -> int:
    """Rows in front of the small decoder that cost what is nearest to ``target`` GFLOPs."""
    below, above = 1, SIDE * SIDE - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if gflops(small, middle) < target else (below, middle)
    return min((below, above), key=lambda tokens: abs(gflops(small, tokens) - target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed, here = parser.parse_args().seed, environment()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    from duet_vlm.api.loading import load

    layers = load(START).model.config.text_config.num_hidden_layers
    large, small = (OUT / f"full-{depth}-{seed}" for depth in (layers, layers // 2))

    def others(depth: int, tokens: int | None) -> list[dict[str, Any]]:
        """The rows that are there but for this one."""
        key = {"layers": depth, "tokens_asked": tokens, "seed": seed}
        return [done for done in rows(FILE) if not key.items() <= done.items()]

    def row(depth: int, start: Path, out: Path, tokens: int | None, conversations: int, imitate: int) -> None:
        method = METHOD if tokens else "none"
        seconds, loss = trained(method, tokens, seed, conversations, imitate, str(start), out)
        said: dict[str, Any] = {
            "layers": depth,
            "tokens_asked": tokens,
            "seed": seed,
            "train_cpu_seconds": seconds,
            "loss": loss,
        }
        said |= asked(out, method, tokens) | {"environment": here}
        write(FILE, [*others(depth, tokens), said], what="a larger decoder with fewer rows, a smaller one with more")
        print(depth, tokens, said["accuracy"], said["gflops"], seconds, flush=True)

    wanted = [(layers, large, tokens) for tokens in ROWS]
    wanted += [(layers // 2, small, alike(cut(layers // 2), gflops(cut(layers), tokens))) for tokens in ROWS]
    lacking = [one for one in wanted if len(others(one[0], one[2])) == len(rows(FILE))]
    for depth, out in ((layers, large), (layers // 2, small)):  # what the others begin with
        if len(others(depth, None)) == len(rows(FILE)) or (lacking and not out.exists()):
            row(depth, cut(depth), out, None, FIRST, 0)
    for depth, start, tokens in lacking:
        row(depth, start, OUT / f"{METHOD}-{depth}-{tokens}-{seed}", tokens, CONVERSATIONS, IMITATE)


if __name__ == "__main__":
    main()
