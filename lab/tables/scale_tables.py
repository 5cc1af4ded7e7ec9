"""Tables of lab/NOTEBOOK.md, from results/roofline.json and results/scale.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from folders import SPEED

SHARES = ("33%", "22%", "11%")


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def _read(name: str) -> dict[str, Any]:
    return json.loads((SPEED / f"{name}.json").read_text())


def _cases(**wanted: Any) -> list[dict[str, Any]]:
    return [row for row in _read("scale")["results"] if all(row[key] == value for key, value in wanted.items())]


def roofline() -> str:
    rows = []
    for row in _read("roofline")["results"]:
        speed = row.get("speed_up")
        cells = (
            ["-", "-", "-"]
            if speed is None
            else [f"{speed[key]:.2f}x" for key in ("predicted", "by_flops", "measured")]
        )
        rows.append(
            [row["name"], f"{row['predicted_ms']:.0f}", f"{row['measured_ms']:.0f}", f"{row['ratio']:.2f}", *cells]
        )
    head = [
        "what",
        "predicted ms",
        "measured ms",
        "predicted / measured",
        "speed-up predicted",
        "by FLOPs alone",
        "measured",
    ]
    return _table(head, rows)


def sheets() -> str:
    rows = [
        [f"`{name}`", *(f"{sheet['flops'][dtype] / 1e12:.4g}" if dtype in sheet["flops"] else "-" for dtype in ("bf16", "fp8", "fp32")),
         f"{sheet['bandwidth'] / 1e12:.3g}", f"{sheet['memory'] / 1e9:.0f}", sheet["source"]]
        for name, sheet in _read("scale")["sheets"].items()
    ]  # fmt: skip
    return _table(["device", "bf16 TFLOP/s", "fp8", "fp32", "TB/s", "GB", "source"], rows)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def models() -> str:
    rows = []
    for row in _cases(device="h200", batch=8):
        shares = [f"{row[key]:.0%}" for key in ("vision_share", "prefill_share", "decode_share")]
        speed = [f"{row['speed_up'][share]:.2f}x" for share in SHARES]
        devices = "{} / {}".format(*row["devices"])
        rows.append(
            [
                row["model"],
                row["input"],
                f"{row['tokens']:,}",
                _seconds(row["seconds"]),
                *shares,
                *speed,
                f"{row['ceiling']:.2f}x",
                devices,
            ]
        )
    head = [
        "model",
        "input",
        "visual tokens",
        "full",
        "vision",
        "prefill",
        "decode",
        "at 33 %",
        "at 22 %",
        "at 11 %",
        "ceiling",
    ]
    return _table([*head, "H200s per model, full / 11 %"], rows)


def batches() -> str:
    rows = []
    for name in ("image, 1,296 tokens", "yes or no about an image", "ten minutes"):
        for row in _cases(device="h200", model="7B", input=name):
            shares = [f"{row[key]:.0%}" for key in ("vision_share", "prefill_share", "decode_share")]
            first, whole = row["first_token_speed_up"]["11%"], row["speed_up"]["11%"]
            rows.append(
                [
                    name,
                    str(row["batch"]),
                    *shares,
                    row["bound"]["decode"],
                    f"{first:.2f}x",
                    f"{whole:.2f}x",
                    f"{row['ceiling']:.2f}x",
                ]
            )
    head = [
        "input",
        "batch",
        "vision",
        "prefill",
        "decode",
        "decode bound by",
        "first token at 11 %",
        "whole request at 11 %",
        "ceiling",
    ]
    return _table(head, rows)


def devices() -> str:
    rows = []
    for name in ("image, 1,296 tokens", "hour of video"):
        for row in _cases(model="7B", input=name, batch=1 if name == "hour of video" else 32):
            largest, needed = ("{} -> {}".format(*row[key]) for key in ("largest_batch", "for_100_per_second"))
            rows.append(
                [
                    name,
                    str(row["batch"]),
                    f"`{row['device']}`",
                    _seconds(row["seconds"]),
                    f"{row['speed_up']['11%']:.2f}x",
                    largest,
                    needed,
                ]
            )
    return _table(["input", "batch", "device", "full", "at 11 %", "largest batch", "devices for 100 requests/s"], rows)


def fleet() -> str:
    rows = []
    for size in ("7B", "32B", "72B"):
        for name in ("image, 1,296 tokens", "ten minutes", "hour of video"):
            (row,) = _cases(model=size, input=name, device="h200", batch=8)
            full, reduced = row["requests_per_device"]
            pairs = [(n * full, n * reduced) for n in (row["devices"][0], 64)] + [row["by_1000_devices"]]
            rows.append([size, name, str(row["devices"][0]), *(f"{_rate(a)} -> {_rate(b)}" for a, b in pairs)])
    return _table(
        ["model", "input", "H200s per full model", "requests/s of one copy's devices", "of 64", "of 1,000"], rows
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


BLOCKS: dict[str, Callable[[], str]] = {
    "roofline": roofline, "sheets": sheets, "scale_models": models, "scale_batches": batches, "scale_devices": devices, "scale_fleet": fleet,
}  # fmt: skip
