"""Two ranks that hold half of the heads each drop the same rows, with the engine in a process of its own: answers are
those of ``attach``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, os, sys
sys.path.insert(0, {here!r})
import stage_engine, engine
os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
from stage_cases import SETTINGS, prompts

def main():
    answers = json.load(open(os.path.join({here!r}, "references", "stages", {family!r} + ".json")))["answers"][{name!r}]
    more = dict(tensor_parallel_size=2, distributed_executor_backend="mp", max_num_seqs=4)
    llm = stage_engine.start({folder!r}, {family!r}, SETTINGS[{family!r}][{name!r}], **more)
    cases = prompts({family!r})
    requests = [engine.request(*prompt) for prompt in cases.values()]
    found = stage_engine.ask(llm, requests) + stage_engine.ask(llm, requests)  # the second time behind cached prefixes
    print([case for case, one in zip([*cases, *cases], found) if not stage_engine.same(one, answers[case])], "differ")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("family", "name"), [("llava", "pyramiddrop"), ("qwen2_5_vl", "both stages")])
def test_two_ranks_drop_the_same_rows(family: str, name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        CODE.format(here=str(Path(__file__).parent), family=family, name=name, folder=str(checkpoints[family]))
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "[] differ" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
