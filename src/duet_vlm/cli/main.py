"""``duet-vlm``: the verbs, collected."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from duet_vlm.cli import app as page
from duet_vlm.cli import (
    bench,
    budget,
    calibrate,
    demo,
    drop_curve,
    eval,
    generate,
    methods,
    models,
    new_method,
    presets,
    report,
    run,
    serve,
    train,
    tune,
    viz,
)

# A line of the list of verbs: with its name and the panel's frame it fits in 80 columns. ``VERB --help`` says the rest.
LINES: dict[str, dict[str, tuple[Any, str]]] = {
    "Use": {
        "demo": (demo.demo, "20 questions to a tiny model, in full and reduced"),
        "run": (run.run, "Answer one prompt with fewer visual tokens"),
        "generate": (generate.generate, "Answer a file or folder of prompts"),
        "viz": (viz.viz, "Draw which patches are kept, merged and dropped"),
        "app": (page.app, "A page in the browser: full and reduced side by side"),
    },
    "Choose": {
        "tune": (tune.tune, "Find method and budget for your model and questions"),
        "budget": (budget.budget, "What a budget means for a model, before it runs"),
        "methods": (methods.methods, "List the methods"),
        "presets": (presets.presets, "List published settings by name"),
        "models": (models.models, "List the model families"),
    },
    "Measure": {
        "bench": (bench.bench, "Time a model stage by stage, full and reduced"),
        "eval": (eval.evaluate, "Accuracy and cost of methods on the same questions"),
        "report": (report.report, "Tables, plots and a page from results of eval"),
    },
    "Research": {
        "drop-curve": (drop_curve.drop_curve, "From which layer on visual tokens are not needed"),
        "calibrate": (calibrate.calibrate, "Learn what a method wants to know of a model"),
        "train": (train.train, "Train a model under the reduction it will run with"),
        "new-method": (new_method.new_method, "Begin a method of your own in a clone"),
    },
    "Serve": {
        "serve": (serve.serve, "OpenAI's API on vLLM or transformers"),
        "vllm-args": (serve.vllm_args, "Print the flags that make vLLM reduce"),
    },
}
EPILOGS = {"eval": eval.EPILOG, "generate": generate.EPILOG, "train": train.EPILOG, "serve": serve.EPILOG}


class Verbs(TyperGroup):
    """The list of verbs in panels; all other help and every usage error stays plain text, which a narrow terminal, a
    log and a page can hold."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        rich_utils.rich_format_help(obj=self, ctx=ctx, markup_mode="rich")


app = typer.Typer(
    name="duet-vlm",
    cls=Verbs,
    help="Vision-language models made faster by spending fewer visual tokens. Begin with 'duet-vlm demo'; 'duet-vlm VERB --help' says more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for panel, verbs in LINES.items():
    for name, (verb, line) in verbs.items():
        app.command(name, short_help=line, rich_help_panel=panel, epilog=EPILOGS.get(name))(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("duet-vlm"))
        raise typer.Exit()


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision-language models made faster by spending fewer visual tokens."""


if __name__ == "__main__":
    app()
