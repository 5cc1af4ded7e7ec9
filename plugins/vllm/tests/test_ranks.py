"""Two ranks that hold half of the heads each, of tower and decoder, choose the same tokens: those of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, os, sys
sys.path.insert(0, {here!r})
import engine
os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
from cases import METHODS, prompts

def main():
    family, name = {family!r}, {name!r}
    wanted = json.load(open(os.path.join({here!r}, "references", family + ".json")))["answers"]
    more = dict(tensor_parallel_size=2, distributed_executor_backend="mp", max_model_len=1024, max_num_seqs=4)
    llm = engine.start({folder!r}, family, METHODS[family][name], **more)
    outputs = llm.generate([engine.request(*prompt) for prompt in prompts(family).values()], engine.GREEDY, use_tqdm=False)
    print([case for case, one in zip(prompts(family), outputs) if not engine.same(engine.found(one), wanted[name + "/" + case])], "differ")

if __name__ == "__main__":
    main()
"""


# llava and qwen2_5_vl: test_stages_ranks.py
RANKED = [("llava_next", "duet_plus"), ("llava_onevision", "duet"), ("internvl", "duet"), ("qwen3_vl", "duet")]


@pytest.mark.parametrize(("family", "name"), RANKED)
def test_two_ranks_answer_as_one(family: str, name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        CODE.format(here=str(Path(__file__).parent), family=family, name=name, folder=str(checkpoints[family]))
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "[] differ" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
