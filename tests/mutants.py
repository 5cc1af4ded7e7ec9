"""Defects that were mended (git log) put back, one at a time, and the tests of the default tier that find them: ``make mutants`` writes mutants.json.

Each mutant is one place of the source, changed in a copy. Only the tests that it concerns are run, until one of them fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file``; with ``new`` in its place the source has ``defect`` again. ``tests``: files and a -k expression."""

    defect: str
    file: str
    old: str
    new: str
    tests: str
    chosen: str = ""


MUTANTS = (
    Mutant(
        "greedy coverage: rounding decides between tokens that gain the same",
        "ops/greedy.py", "_first(score, CLOSE) if picks", "score.argmax(1, keepdim=True) if picks", "tests/test_greedy.py",
    ),
    Mutant(
        "largest determinant: rounding decides between tokens that are alike",
        "ops/greedy.py", "best = _first(score, TIE)", "best = score.argmax(1, keepdim=True)",
        "tests/test_greedy.py tests/test_groups.py tests/methods tests/test_golden.py", "determinant or duet_plus or cdpruner or dpp or map",
    ),
    Mutant(
        "Pio.official keeps stages that drop nothing",
        "methods/decoder/pio.py", "if count and (not schedule or count < schedule[-1][1]):", "if True:", "tests/methods/test_pio.py", "count_of_zero",
    ),
    Mutant(
        "ApET.official_qwen does not truncate the float product",
        "methods/two_stage/apet.py", '"floor" if self.slots == "own" else "int"', '"floor"', "tests/methods/test_apet.py", "counts",
    ),
    Mutant(
        "EVS does not count as released",
        "methods/video/evs.py", 'depth, budget, "int")', 'depth, budget, "floor")', "tests/methods/test_evs.py",
    ),
    Mutant(
        "pio counts guessed rows among those that it predicts from",
        "runtime/prefill/layers.py", "tokens.valid & (tokens.prompt_index < num_certain)",
        "tokens.valid", "tests/methods/test_pio.py", "drafts",
    ),
    Mutant(
        "half precision: rounded rotary tables rank inside the decoder",
        "runtime/prefill/layers.py", 'self._exact_rotary(group, index, hidden, kwargs["position_embeddings"])', 'kwargs["position_embeddings"]',
        "tests/test_half_precision_ranking.py",
    ),
    Mutant(
        "a prompt that ends in an image is answered blind",
        "runtime/prefill/prompt_layout.py", "return predicting & visual & valid", "return predicting & visual & ~valid",
        "tests/test_predicting.py", "six_pictures or equals_the_oracle",
    ),
    Mutant(
        "later turns of a batch get positions that padding shifts",
        "runtime/decode/step.py", "        if mask is None:\n            return torch.arange", "        if True:\n            return torch.arange",
        "tests/test_caches.py", "later_turn",
    ),
    Mutant(
        "rows of a reordered cache lose their prompts",
        "runtime/pruned_cache.py", "self.duet_order = self._sample_numbers(index.device)[index]", "pass", "tests/test_caches.py", "follows",
    ),
    Mutant(
        "a cache that others compress is not noticed",
        "runtime/pruned_cache.py", "evicted if any(evicted) else ()", "()", "tests/test_works_with.py tests/test_caches.py", "compress",
    ),
    Mutant(
        "positions after a clip are the largest, not those of the last row",
        "runtime/prefill/positions.py", "last_true(valid).long().argmax(1, keepdim=True).to(position_ids.device))[..., 0]\n        + 1",
        "last_true(valid).long().argmax(1, keepdim=True).to(position_ids.device))[..., 0] * 0\n        + position_ids.amax(-1)\n        + 1",
        "tests/test_video.py tests/test_caches.py tests/test_generation.py", "turn or oracle",
    ),
    Mutant(
        "a small image ends a whole batch under a fractional budget",
        "planning/solve.py", "or error.floor is None\n", "or error.floor is None or True\n",
        "tests/test_budget.py", "floor",
    ),
    Mutant(
        "prompts without images stop methods that rank by attention among visual tokens",
        "ops/score.py", "total_weight = weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)", "total_weight = weight.sum(1, keepdim=True)",
        "tests/test_invariants.py tests/test_ops.py", "(padded and fitprune) or (order and fitprune) or query_attention",
    ),
    Mutant(
        "a default device reaches tensors of the library",
        "ops/select.py", "i = torch.arange(width, device=count.device)", "i = torch.arange(width)", "tests/test_default_device.py", "factory and select",
    ),
    Mutant(
        "a processor= that is no processor is not refused",
        "runtime/compatibility.py", 'raise TypeError(f"processor= must be', 'print(f"processor= must be', "tests/test_errors.py", "processor",
    ),
    Mutant(
        "tome_tower cannot let half of an even number of units leave in a block",
        "methods/vision_tower/tome_tower.py", "here - here // 2, self.least", "here - (here - 1) // 2, self.least", "tests/test_merging.py tests/test_tower.py", "half",
    ),
    Mutant(
        "VScan.official: windows are counted in a batch, not in a picture",
        "methods/two_stage/vscan.py", "limit = half // count if", "limit = half // (count * len(count)) if", "tests/methods/test_vscan.py tests/test_golden.py", "vscan",
    ),
    Mutant(
        "what is chosen of a picture depends on what pads it",
        "ops/greedy.py", "unit = unit_rows(rows) * valid[..., None]", "unit = unit_rows(rows)", "tests/test_greedy.py", "padding or divprune or scope",
    ),
    Mutant(
        "a gradient in float16 vanishes",
        "runtime/prefill/prediction_gradient.py", "scale = LOSS_SCALE if hidden.dtype == torch.float16 else 1.0", "scale = 1e-4",
        "tests/methods/test_pio.py", "finite",
    ),
)  # fmt: skip


def found_by(mutant: Mutant) -> str:
    """The first test of the default tier that fails on a copy of the source with the mutant; empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / "duet_vlm" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.file} has {text.count(mutant.old)} times {mutant.old!r}, and a mutant is one place: mend {__file__}"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:logging",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-rfE",
            *mutant.tests.split(),
        ]
        command += ["-k", mutant.chosen] if mutant.chosen else []
        command += ["-o", f"pythonpath={source} tests"]
        search = os.pathsep.join(
            [
                str(source),
                *(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry != str(ROOT / "src")),
            ]
        )
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True
        )
    if done.returncode not in (0, 1):
        raise SystemExit(
            f"{mutant.defect}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
    assert (failed is None) == (done.returncode == 0)
    return failed[1] if failed else ""


def main(only: list[str]) -> None:
    known = {row["defect"]: row for row in json.loads(OUT.read_text())["mutants"]} if OUT.exists() else {}
    for number, mutant in enumerate(MUTANTS):
        if not only or str(number) in only:
            known[mutant.defect] = asdict(mutant) | {"found_by": found_by(mutant)}
            print(f"{number}. {mutant.defect}: {known[mutant.defect]['found_by'] or 'NOT FOUND'}", flush=True)
            rows = [known[one.defect] for one in MUTANTS if one.defect in known]
            found = sum(bool(row["found_by"]) for row in rows)
            OUT.write_text(
                json.dumps({"mutants_found": found, "mutants_run": len(rows), "mutants": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
