"""``duet-vlm train``: transformers' own Trainer with fewer visual tokens."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from duet_vlm.api.catalogue import check_settings
from duet_vlm.api.loading import check_model
from duet_vlm.cli.errors import GOES_ON, folder_for, friendly
from duet_vlm.cli.options import (
    SEVERAL,
    AsJson,
    Debug,
    budget_of,
    budgets_of,
    method_of,
    one,
    settings_of,
    several_paths,
)
from duet_vlm.train.settings import TUNED, TrainSettings, recipes, settings_from
from duet_vlm.utils.field_types import merged

NEEDED = ("accelerate", "yaml")  # of the extra 'train', in every run
EPILOG = "\n\n".join(["Recipes:", *(f"{name}: {said}." for name, said in recipes().items())])

OPTIONS = {"settings": "--set"} | {
    name: f"--{name.replace('_', '-')}" for name in "data images limit tune imitate anneal_until trainer".split()
}

Text = str | None


def train(
    recipe: Annotated[Text, typer.Option("--recipe", help="Settings by name, see below.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file of settings, over the recipe's.")] = None,
    model: Annotated[
        Text, typer.Option("--model", "-m", help="'tiny' (ships with the package), a local folder, or a hub id.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help=f"LLaVA or chat JSON, JSON lines, 'tiny' or 'tiny-crowded'. {SEVERAL}"),
    ] = None,
    images: Annotated[
        Text, typer.Option("--images", help="Folder that image paths are relative to; default: that of the data.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="The first N conversations of each source.")
    ] = None,
    tune: Annotated[
        Text, typer.Option("--tune", help=f"What learns: {', '.join(TUNED)} (lora: and the projector).")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="TEXT",
            help="A method ('duet-vlm methods') or a duet.json of 'tune'; 'none' trains the full model.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", "--budgets", "-b", help=f"As elsewhere (64, 0.22, 22%). {SEVERAL} Every step then draws one."
        ),
    ] = None,
    schedule: Annotated[
        Text, typer.Option("--schedule", help="Drops inside the decoder, e.g. '((16, .5), (24, 0.0))'.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method.")
    ] = None,
    imitate: Annotated[
        int | None,
        typer.Option(
            "--imitate",
            min=0,
            help="Steps in which a new module of the method's own first learns to make means of tokens.",
        ),
    ] = None,
    anneal_from: Annotated[
        Text,
        typer.Option(
            "--anneal-from", help="Begin with this fraction of the tokens and fall to --budget (a fraction too)."
        ),
    ] = None,
    anneal_until: Annotated[
        float | None, typer.Option("--anneal-until", help="Share of the steps at which --budget is reached.")
    ] = None,
    out: Annotated[Text, typer.Option("--out", help="Folder for checkpoints, logs and the trained model.")] = None,
    trainer: Annotated[
        list[str] | None,
        typer.Option(
            "--trainer",
            metavar="KEY=VALUE",
            help="An argument of transformers.TrainingArguments, e.g. learning_rate=1e-4.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as YAML (for --config) and stop.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the checkpoints of an earlier run in --out and begin anew.")
    ] = False,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model under the reduction it will run with. The checkpoint remembers it.

    Start the same command again after a kill and it continues from the last checkpoint. On several GPUs:
    'accelerate launch -m duet_vlm.cli.main train ...'.
    """
    with friendly(debug, json_, GOES_ON):
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f'training needs {", ".join(missing)}: pip install ".[train]" in your clone of duet-vlm')
        name = one("--method", method)
        budgets = budgets_of(budget)
        kept: dict[str, Any] = {}
        if name is not None:
            name, own, kept = method_of(name)
            budgets = budgets or ([] if own is None else [own])
        given: dict[str, Any] = {
            "model": model, "data": [str(path) for path in several_paths(list(map(Path, data or [])))] or None, "images": images, "limit": limit,
            "tune": tune, "method": name, "out": out, "budget": (budgets[0] if len(budgets) == 1 else budgets) if budgets else None,
            "anneal_from": budget_of(anneal_from), "anneal_until": anneal_until, "imitate": imitate, "trainer": _arguments(trainer),
            "settings": merged(kept, settings_of([*(set_ or []), *([f"schedule={schedule}"] if schedule else [])])),
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        with _options_named(
            OPTIONS if config is None else {name: OPTIONS[name] for name in OPTIONS if given.get(name)}
        ):
            settings = settings_from(recipe, config, given)
        check_settings(settings.method, settings.settings)
        if print_config:
            from duet_vlm.train.yaml_text import written

            typer.echo(json.dumps(settings.to_dict()) if json_ else written(settings.to_dict()), nl=json_)
            return
        check_model(settings.model)
        _train(settings, restart, json_)


@contextlib.contextmanager
def _options_named(options: Mapping[str, str]) -> Iterator[None]:
    """Errors of settings begin with the setting's name, as a YAML file has it; those of ``options`` are named as they
    are typed."""
    try:
        yield
    except ValueError as error:
        name, colon, said = str(error).partition(": ")
        if not colon or name not in options:
            raise
        raise ValueError(f"{options[name]}: {said}") from error


def _train(settings: TrainSettings, restart: bool, as_json: bool) -> None:
    first = os.environ.get("RANK", "0") == "0"
    out = Path(settings.out)
    if first:
        folder_for("--out", out)
    from duet_vlm.train import resume
    from duet_vlm.train.run import train as run

    done = resume.finished(out) and not restart
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        warnings.simplefilter("ignore", FutureWarning if first else Warning)  # only the first process speaks
        run(settings, restart)
    if not first:
        return
    if as_json:
        typer.echo(json.dumps({"out": settings.out, "was_finished": done} | resume.state(out)))
    elif done:
        typer.echo(f"{out} is finished already (--restart trains anew)")
    else:
        typer.echo(f"trained: {out}\nnext: duet-vlm run --model {out} --image FILE --prompt TEXT")


def _arguments(pairs: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value is read as YAML reads it."""
    from duet_vlm.train.yaml_text import scalar

    arguments = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"--trainer {pair}: write it as key=value")
        arguments[key.strip()] = scalar(value)
    return arguments
