"""Predicted cost from 7B to 72B, from one image to an hour of video: writes results/scale.json; and the same predictor
at the points that were measured on this machine: writes results/roofline.json. ``--only scale`` and ``--same-sheet``
measure nothing and can run anywhere."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import HERE, environment
from shapes import LLAVA, QWEN, Shape, build

import duet_vlm
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims
from duet_vlm.profiling.report import SampleCounts
from duet_vlm.profiling.selection_cost import selection_flops
from duet_vlm_lab.roofline.devices import SHEETS, Device, this_machine
from duet_vlm_lab.roofline.predict import Assumptions, ModelCost, Prediction, Workload, predict
from duet_vlm_lab.roofline.workload import selection_bytes

RESULTS = HERE / "results"
BUDGETS = (0.33, 0.22, 0.11)
HEAD = 80  # width of a head of this tower


def qwen(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int = 152064) -> ModelCost:
    """Qwen2.5-VL at one of its published sizes; the tower is the same in all of them."""
    tower = VisionDims(32, 1280, 3420, 3, 4, 0, 1176, ((5120, 5120), (5120, hidden)), full_layers=4, window=64)
    return ModelCost(DecoderDims(layers, hidden, heads, kv_heads, 128, mlp, vocab), tower)


MODELS = {"7B": qwen(28, 3584, 28, 4, 18944), "32B": qwen(64, 5120, 40, 8, 27648), "72B": qwen(80, 8192, 64, 8, 29568)}


@dataclass(frozen=True)
class Input:
    """``steps`` parts that the tower looks at one by one, ``each`` tokens, ``text`` further ones, ``new`` to write."""

    steps: int
    each: int
    text: int = 60
    new: int = 128

    @property
    def tokens(self) -> int:
        return self.steps * self.each


INPUTS = {  # clips: one frame per second, two frames per step of time, 64 tokens per step
    "image, 576 tokens": Input(1, 576),
    "image, 1,296 tokens": Input(1, 1296),
    "page, 4,000 tokens": Input(1, 4000),
    "yes or no about an image": Input(1, 1296, new=2),
    "minute of video": Input(30, 64),
    "two minutes of video": Input(60, 64),
    "ten minutes": Input(300, 64),
    "hour of video": Input(1800, 64),
}


def request(model: ModelCost, what: Input, budget: float | None) -> Workload:
    """One prompt under duet; ``None`` is the untouched model."""
    depth, reducer = model.decoder.layers, duet_vlm.get_method("duet")()
    plan = reducer.plan(what.tokens, depth, 1.0 if budget is None else budget)
    counts = (plan.entry, *plan.counts)
    scored = tuple(i for i in range(depth) if counts[i + 1] not in (counts[i], 0))
    passes = ((what.each,) * what.steps,)
    sample = SampleCounts(what.text, (what.tokens,), passes, (plan,), what.text, (plan.counts, plan.counts))
    width = model.vision.projector[-1][1]
    cost = (
        selection_flops(reducer, [plan], passes, model.vision, HEAD, width),
        selection_bytes(reducer, [plan], passes, model.vision, HEAD),
    )
    return Workload(sample, what.new, scored, True, *cost, reused_layers=scored)


def scale() -> list[dict[str, Any]]:
    rows = []
    for size, model in MODELS.items():
        for name, what in INPUTS.items():
            for device in SHEETS.values() if size == "7B" else [SHEETS["h200"]]:
                for batch in (1, 8, 32):
                    found = {
                        budget: predict(model, request(model, what, budget), device, "bf16", batch)
                        for budget in (None, *BUDGETS)
                    }
                    case = {
                        "model": size,
                        "input": name,
                        "tokens": what.tokens,
                        "new": what.new,
                        "device": device.name,
                        "batch": batch,
                    }
                    rows.append(case | _row(found))
    return rows


def _row(found: dict[float | None, Prediction]) -> dict[str, Any]:
    """Full against reduced; speed-ups are of the seconds that all devices together spend, for a full batch may need
    more of them."""
    full, last = found[None], found[BUDGETS[-1]]
    reduced = {f"{budget:.0%}": each for budget, each in found.items() if budget is not None}
    vision, prefill, decode = (stage.seconds / full.total for stage in (full.vision, full.prefill, full.decode))
    nothing = last.total - last.prefill.seconds - last.selection.seconds  # reading the prompt at no cost at all
    return {
        "seconds": full.total, "first_token": full.first_token, "vision_share": vision, "prefill_share": prefill, "decode_share": decode,
        "bound": {"vision": full.vision.bound, "prefill": full.prefill.bound, "decode": full.decode.bound},
        "speed_up": {name: full.total * full.devices / (each.total * each.devices) for name, each in reduced.items()},
        "first_token_speed_up": {name: full.first_token * full.devices / (each.first_token * each.devices) for name, each in reduced.items()},
        "ceiling": full.total * full.devices / (nothing * last.devices), "largest_batch": [full.max_batch, last.max_batch],
        "devices": [full.devices, last.devices], "requests_per_device": [each.requests_per_second / each.devices for each in (full, last)],
        "for_100_per_second": [full.devices_for(100), last.devices_for(100)],
        "by_1000_devices": [1000 // each.devices * each.requests_per_second for each in (full, last)],
    }  # fmt: skip


# ---- at the points that were measured


def checks(sheet: Device) -> list[dict[str, Any]]:
    """Every committed measurement that the predictor speaks of, beside its prediction."""
    measured = {
        name: json.loads((RESULTS / f"{name}.json").read_text())["results"] for name in ("v2v", "prefill", "decode")
    }
    known = {name: _model(shape) for name, shape in (("llava", LLAVA), ("qwen2_5_vl", QWEN))}
    rows = []
    for entry in measured["v2v"]:
        model, shape = known[entry["shape"]["family"]], Shape(**entry["shape"])
        if entry["name"] in ("tower with CLS", "tower without CLS"):
            found = predict(model, _request(model, shape, None, encoded=False), sheet, "fp32")
            rows.append(_check(entry["name"], found.vision.seconds, entry["milliseconds"][1]))
    model = known["llava"]
    for entry in measured["prefill"]:
        if "milliseconds" not in entry or ", duet" not in entry["name"]:
            continue
        budget, encoded = float(entry["name"].split("at ")[1].rstrip("%")) / 100, entry["name"].startswith("decoder")
        full, reduced = (predict(model, _request(model, LLAVA, b, encoded), sheet, "fp32") for b in (None, budget))
        name = entry["name"].split(",")[0]
        if not any(row["name"] == f"{name}, full" for row in rows):
            rows.append(_check(f"{name}, full", full.first_token, entry["milliseconds"][0]))
        rows.append(_check(entry["name"], reduced.first_token, entry["milliseconds"][1]))
        rows[-1] |= {
            "speed_up": {
                "predicted": full.first_token / reduced.first_token,
                "measured": entry["median"],
                "by_flops": entry["predicted"],
            }
        }
    for entry in (row for row in measured["decode"] if "padded" not in row["name"]):
        shape = Shape(**entry["shape"])
        work = _request(model, shape, 0.22, encoded=True)
        rows.append(
            _check(entry["name"] + " at 22%", predict(model, work, sheet, "fp32").step, entry["milliseconds"][0])
        )
    return rows


def _check(name: str, predicted: float, measured_ms: float) -> dict[str, Any]:
    return {
        "name": name,
        "predicted_ms": 1000 * predicted,
        "measured_ms": measured_ms,
        "ratio": 1000 * predicted / measured_ms,
    }


def _model(shape: Shape) -> ModelCost:
    adapter = adapter_for(build(dataclasses.replace(shape)))
    return ModelCost(adapter.decoder_dims(), adapter.vision_dims())


def _request(model: ModelCost, shape: Shape, budget: float | None, encoded: bool) -> Workload:
    reducer, depth, tokens = duet_vlm.get_method("duet")(), model.decoder.layers, shape.visual_tokens
    plan = reducer.plan(tokens, depth, 1.0 if budget is None else budget)
    counts = (plan.entry, *plan.counts)
    scored = tuple(i for i in range(depth) if counts[i + 1] not in (counts[i], 0))
    passes: tuple[tuple[int, ...], ...] = () if encoded else ((tokens,),)
    sample = SampleCounts(
        shape.text + 1, (tokens,), passes, (plan,), shape.text, (plan.counts, plan.counts), skipped=budget is not None
    )
    return Workload(sample, 2, scored, shape.family != "llava", reused_layers=scored)  # two tokens: one step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("scale", "roofline"))
    parser.add_argument(
        "--same-sheet",
        action="store_true",
        help="what roofline.json says of its machine holds, only its predictions are made anew",
    )
    parser.add_argument("--threads", type=int, default=2, help="of this machine, as in the measured files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.only != "roofline":
        assumed = dataclasses.asdict(Assumptions())
        sheets = {name: dataclasses.asdict(sheet) for name, sheet in SHEETS.items()}
        _write(
            given.out / "scale.json",
            {"benchmark": "scale", "predicted": True, "assumed": assumed, "sheets": sheets, "results": scale()},
        )
    if given.only != "scale":
        file = given.out / "roofline.json"
        known = json.loads(file.read_text()) if given.same_sheet else {}
        sheet = Device(**known["sheet"]) if known else this_machine(fresh=True)
        found = {
            "benchmark": "roofline",
            "environment": known.get("environment") or environment(),
            "sheet": dataclasses.asdict(sheet),
        }
        _write(file, found | {"results": checks(sheet)})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
