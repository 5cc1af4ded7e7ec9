"""The recipe for Ray Data on a Ray of this machine: two engines share the lines, and answer as one engine does alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine
import pytest

from duet_vlm.evaluation import tiny

pytest.importorskip("ray", reason="needs Ray Data: make test-vllm")

RECIPE = Path(__file__).parents[1] / "examples" / "ray_answers.py"
COUNT, BROKEN, BUDGET = 12, 7, 16
SETTINGS: dict[str, Any] = {"method": "duet_plus", "budget": BUDGET}
SMALL: dict[str, Any] = {"max_model_len": 1024, "limit_mm_per_prompt": {"image": 1}}
LOCAL = """
import ray, runpy, sys
if __name__ == "__main__":
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=10**8, _node_ip_address="127.0.0.1", log_to_driver=False)
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_the_recipe(tmp_path: Path) -> None:
    items = [tiny.sample("test", number, 0) for number in range(COUNT)]
    lines = []
    for number, item in enumerate(items):
        item.image.save(tmp_path / f"{number}.png")
        lines.append({"id": number, "image": str(tmp_path / f"{number}.png"), "question": item.question})
    (tmp_path / f"{BROKEN}.png").write_bytes(b"no picture")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "local.py").write_text(LOCAL)
    command = [sys.executable, "local.py", str(RECIPE), "--model", str(tiny.path()), "--engines", "2"]
    command += ["--data", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "answers")]
    command += [
        "--settings",
        json.dumps(SETTINGS),
        "--gpus",
        "0",
        "--batch",
        "3",
        "--options",
        json.dumps(engine.COMMON | SMALL),
    ]
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_worker_niceness": "0",
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    written = [json.loads(line) for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()]
    found = {row["id"]: row for row in written}
    assert len(written) == COUNT and sorted(found) == list(range(COUNT))  # nothing lost, nothing twice
    assert "7.png" in found[BROKEN]["error"] and not found[BROKEN]["answer"]
    told = {number: row for number, row in found.items() if number != BROKEN}
    assert not any(row["error"] for row in told.values())
    # the model can do this
    assert sum(row["answer"] == items[number].answer for number, row in told.items()) > COUNT // 2
    llm = engine.start(tiny.path(), "llava", SETTINGS, **SMALL)
    try:
        for number, row in told.items():
            content = [
                {"type": "image_pil", "image_pil": items[number].image},
                {"type": "text", "text": items[number].question},
            ]
            (alone,) = llm.chat(
                [[{"role": "user", "content": content}]],
                engine.SamplingParams(temperature=0, max_tokens=64),
                use_tqdm=False,
            )
            assert row["answer"] == alone.outputs[0].text.strip() and row["prompt_tokens"] == len(
                alone.prompt_token_ids
            )
            text = [{"role": "user", "content": items[number].question}]
        (none,) = llm.chat([text], engine.SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        # what entered, and the marks around it
        assert 0 <= row["prompt_tokens"] - len(none.prompt_token_ids) - BUDGET <= 2
    finally:
        llm.llm_engine.engine_core.shutdown()
