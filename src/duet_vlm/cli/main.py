"""``duet-vlm``: the verbs, collected."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

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

app = typer.Typer(
    name="duet-vlm",
    help="Vision-language models made faster by spending fewer visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("eval", epilog=eval.EPILOG)(eval.evaluate)
app.command("generate", epilog=generate.EPILOG)(generate.generate)
app.command("drop-curve")(drop_curve.drop_curve)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("calibrate")(calibrate.calibrate)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("budget")(budget.budget)
app.command("bench")(bench.bench)
app.command("viz")(viz.viz)
app.command("app")(page.app)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("vllm-args")(serve.vllm_args)
app.command("methods")(methods.methods)
app.command("presets")(presets.presets)
app.command("models")(models.models)
app.command("demo")(demo.demo)
app.command("new-method")(new_method.new_method)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(version("duet-vlm"))
        raise typer.Exit()


@app.callback()
def main(
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Vision-language models made faster by spending fewer visual tokens."""


if __name__ == "__main__":
    app()
