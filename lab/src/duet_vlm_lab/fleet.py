"""A budget on devices that are not here: ``python -m duet_vlm_lab.fleet --help``. Predicted from shapes; every
assumption is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from duet_vlm.cli.options import Model, Reduction, reducing
from duet_vlm.evaluation.planned_prompt import equal_parts
from duet_vlm.evaluation.speed.random_model import skeleton
from duet_vlm.planning.budget import BudgetError
from duet_vlm_lab.roofline.devices import ELEMENT_BYTES, THIS, Device, device
from duet_vlm_lab.roofline.predict import Assumptions, ModelCost, Prediction, Workload, predict
from duet_vlm_lab.roofline.workload import workload

BUDGETS = (0.5, 0.33, 0.22, 0.11)
TOKENS = 1296  # of an image of 1,008 x 1,008 pixels in Qwen2.5-VL, where the family fixes no number and none is given


@dataclass(frozen=True)
class Fleet:
    """A load on devices.

    Attributes
    ----------
    device : Device
        The device.
    dtype : str
        Precision.
    batch : int
        Equal requests at a time.
    text, new : int
        Text tokens of a request with one image, and tokens to write.
    requests : float
        Requests per second to serve.
    assumed : Assumptions
        Efficiencies.
    """

    device: Device
    dtype: str
    batch: int
    text: int
    new: int
    requests: float
    assumed: Assumptions

    @classmethod
    def of(
        cls, name: str, dtype: str | None, batch: int, text: int, new: int, requests: float, compute: float | None, bandwidth: float | None,
        launch: float,
    ) -> Fleet:  # fmt: skip
        sheet = device(name)
        dtype = dtype or ("fp32" if name == THIS else "bf16")
        if dtype not in ELEMENT_BYTES:
            raise ValueError(f"--dtype {dtype}: choose one of {', '.join(ELEMENT_BYTES)}")
        sheet.peak(dtype)
        usual = Assumptions.of(sheet)
        assumed = dataclasses.replace(
            usual, compute=compute or usual.compute, bandwidth=bandwidth or usual.bandwidth, launch=launch / 1e6
        )
        return cls(sheet, dtype, batch, text, new, requests, assumed)

    def show(
        self, name: str, skeletal: Any, reductions: Sequence[Reduction], tokens: int | None, parts: int, as_json: bool
    ) -> None:
        """Predict the untouched model and the budgets (of one method), and print them."""
        weights = sum(p.numel() for p in skeletal.parameters())
        first, asked = reductions[0], [reduction.budget for reduction in reductions if reduction.budget is not None]
        own = not asked and (bool(first.fields) or not isinstance(first.method, str | None))
        with (first if own else dataclasses.replace(first, budget=asked[0] if asked else 1.0)).attach(
            skeletal
        ) as handle:
            adapter = handle.adapter
            model = ModelCost(adapter.decoder_dims(), adapter.vision_dims(), weights)
            count = tokens or (adapter.fixed_tokens or 0) * parts or TOKENS
            passes = equal_parts(adapter, count, parts)
            rows: list[dict[str, Any]] = []
            for budget in [handle.budget] if own else asked or BUDGETS:
                try:
                    work = workload(handle.set(budget=budget), passes, self.text, self.new)
                except BudgetError as error:
                    rows.append({"budget": budget, "full": False, "status": "infeasible", "floor": error.floor})
                    continue
                if not rows or "prediction" not in rows[0]:
                    rows.insert(0, self._row(None, work.full(), model) | {"full": True})
                rows.append(self._row(budget, work, model))
            method = handle.reducer.name
        if as_json:
            print(json.dumps(self._plain(name, method, count, parts, weights, rows)))
        else:
            self._print(name, method, count, parts, weights, rows)

    def _row(self, budget: int | float | None, work: Workload, model: ModelCost) -> dict[str, Any]:
        found = predict(model, work, self.device, self.dtype, self.batch, self.assumed)
        mean = sum(plan.mean for plan in work.sample.plans)
        return {
            "budget": budget, "full": False, "mean_tokens": mean, "prediction": dataclasses.asdict(found), "first_token": found.first_token,
            "step": found.step, "total": found.total, "tokens_per_second": found.tokens_per_second,
            "requests_per_second": found.requests_per_second, "devices_for_load": found.devices_for(self.requests), "found": found,
        }  # fmt: skip

    def _plain(
        self, name: str, method: str, tokens: int, parts: int, weights: int, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        request = {"tokens": tokens, "parts": parts, "text": self.text, "new": self.new, "batch": self.batch}
        return {
            "model": name, "method": method, "weights": weights, "device": dataclasses.asdict(self.device), "dtype": self.dtype,
            "request": request, "requests_per_second": self.requests, "assumed": dataclasses.asdict(self.assumed), "predicted": True,
            "rows": [{key: value for key, value in row.items() if key != "found"} for row in rows],
        }  # fmt: skip

    def _print(self, name: str, method: str, tokens: int, parts: int, weights: int, rows: list[dict[str, Any]]) -> None:
        console = Console(highlight=False)
        request = f"an image of {tokens} visual tokens" + (f" in {parts} parts" if parts > 1 else "")
        console.print(
            f"[bold]predicted[/bold] from shapes, nothing was run: {method} on {name}, {_count(weights)} weights in {self.dtype}"
        )
        console.print(
            f"batch of {self.batch}: {request}, {self.text} text tokens, {self.new} new tokens; {self.device.name}\n"
        )
        full: Prediction | None = rows[0]["found"] if rows and "found" in rows[0] else None
        table = Table("budget", *(_label(row) for row in rows), box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for what, cell in self._lines(full):
            table.add_row(what, *(cell(row, row["found"]) if "found" in row else "infeasible" for row in rows))
        console.print(table)
        if full is not None:
            bounds = (
                f"vision bound by {full.vision.bound}, prefill by {full.prefill.bound}, decode by {full.decode.bound}"
            )
            shared = f"{_gigabytes(full)} GB on {'1 device' if full.devices == 1 else f'{full.devices} devices that share a model'}"
            console.print(f"\nfull model: {bounds}; {shared}")
        sheet, a = self.device, self.assumed
        speed = f"{sheet.peak(self.dtype) / 1e12:.4g} TFLOP/s, {sheet.bandwidth / 1e12:.4g} TB/s"
        console.print(f"sheet: {speed}, {sheet.memory / 1e9:.4g} GB ({sheet.source})")
        console.print(
            f"assumed: {a.compute:.0%} of its FLOP/s and {a.bandwidth:.0%} of its bytes/s reached, {a.causal:.0%} of causal attention computed, "
            f"{1e6 * a.launch:.0f} us of host work per layer, {a.usable:.0%} of memory usable, {a.parallel:.0%} kept when devices share a model; "
            "requests of a batch start and end together"
        )

    def _lines(self, full: Prediction | None) -> list[tuple[str, Callable[[dict[str, Any], Prediction], str]]]:
        """Lines of the table for each budget."""
        return [
            ("mean visual tokens", lambda row, _: f"{row['mean_tokens']:.1f}"),
            ("vision", lambda _, p: _ms(p.vision.seconds)),
            ("selection", lambda _, p: _ms(p.selection.seconds) if p.selection.seconds else "-"),
            ("prefill", lambda _, p: _ms(p.prefill.seconds)),
            ("per new token", lambda _, p: _ms(p.step) if p.step else "-"),
            ("whole request", lambda _, p: _ms(p.total)),
            ("speed-up", lambda _, p: f"{full.total / p.total:.2f}x" if full else "-"),
            ("new tokens/s", lambda _, p: f"{p.tokens_per_second:.0f}"),
            ("memory GB", lambda _, p: _gigabytes(p)),
            ("largest batch", lambda _, p: str(p.max_batch)),
            (f"devices for {self.requests:g} requests/s", lambda row, _: str(row["devices_for_load"])),
        ]


def _label(row: dict[str, Any]) -> str:
    budget = row["budget"]
    if row["full"]:
        return "full"
    return "own" if budget is None else f"{budget:.0%}" if isinstance(budget, float) else str(budget)


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} G" if weights >= 1e8 else f"{weights / 1e6:.2g} M"


def _gigabytes(found: Prediction) -> str:
    size = found.memory / 1e9
    return f"{size:.1f}" if size >= 1 else f"{size:.2g}"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1000 * seconds:.4g} ms"


def fleet(
    reductions: list[Reduction],
    json_: bool,
    sheet: Annotated[
        str,
        typer.Option("--device", help="a100, h100, h200, mi300x, l4 (data sheets) or cpu (this machine, measured)."),
    ],
    model: Model = "tiny",
    config_only: Annotated[
        Path | None,
        typer.Option("--config-only", help="A config.json, or a folder with one: nothing else of the model is read."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Visual tokens of the image, where its size decides.")
    ] = None,
    parts: Annotated[
        int, typer.Option("--parts", min=1, help="Crops or frames that the vision tower looks at one by one.")
    ] = 1,
    text: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Text tokens of the prompt.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests at a time.")] = 1,
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens to write.")] = 128,
    requests: Annotated[float, typer.Option("--requests", min=0.001, help="Requests per second to serve.")] = 10.0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16, fp16, fp32 or fp8. Default: bf16, on the CPU fp32.")
    ] = None,
    compute: Annotated[
        float | None,
        typer.Option("--compute-efficiency", min=0.01, max=1, help="Share of the sheet's FLOP/s that is reached."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth-efficiency", min=0.01, max=1, help="Share of the sheet's bytes/s that is reached."),
    ] = None,
    launch: Annotated[
        float, typer.Option("--launch-us", min=0, help="Microseconds of host work per layer and pass.")
    ] = 0.0,
) -> None:
    """Predict seconds, tokens/s, memory, and devices for --requests per second, by budget. Needs no weights."""
    name = model if config_only is None else (f"{model} ({config_only})" if model != "tiny" else str(config_only))
    skeletal, _ = skeleton(model, config_only)
    Fleet.of(sheet, dtype, batch, text, new, requests, compute, bandwidth, launch).show(
        name, skeletal, reductions, tokens, parts, json_
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(reducing(fleet))

if __name__ == "__main__":
    app(prog_name="python -m duet_vlm_lab.fleet")
