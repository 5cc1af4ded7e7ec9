"""The pages that are read from the code: the command line from ``--help``, the Python interface from its docstrings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli.main import app

CLI, API = "reference/command-line.md", "reference/python.md"
GROUPS = {  # heading -> public names, each where it is defined
    "Attach": ["api.attach.attach", "api.handle.Handle", "api.attach.detach", "api.attach.handle_of", "api.attach.save_to_config", "reducers.persistence.load_from_config"],
    "Reports and traces": ["profiling.report.Report", "planning.tokens.SpanTrace", "planning.tokens.StageTrace", "planning.tokens.Span"],
    "Methods": ["methods.lookup.make_method", "methods.lookup.get_method", "methods.lookup.list_methods", "reducers.options.TokenOptions", "methods.compose.compose", "api.presets.preset", "reducers.registry.register"],
    "Write a method": [
        "reducers.base.Reducer", "reducers.inputs.Input", "reducers.encoder.EncoderReducer", "reducers.score.ScoreReducer", "reducers.decoder.DecoderReducer", "reducers.scheduled.ScheduledReducer", "reducers.vision_tower.TowerReducer",
        "reducers.vision_tower.ThresholdReducer", "reducers.encoder_view.EncoderView", "reducers.decoder_view.DecoderView", "reducers.vision_tower.TowerView", "reducers.vision_tower.MergePairs", "planning.tokens.Selection",
        "planning.budget.SpanPlan", "planning.budget.BudgetError", "reducers.compressor.NewWeights",
    ],
    "Pictures, clips and streams": ["inputs.images.open_image", "inputs.images.rgb", "api.streaming.StreamingVideo"],
    "Text towers": ["inputs.clip_text.ClipTextEncoder"],
    "Training": ["train.collate.Collator", "train.data.conversations"],
}  # fmt: skip


def command_line() -> str:
    """Every verb with what ``--help`` prints."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    told = [
        "# Command line",
        "What `duet-vlm VERB --help` prints. Options are the same wherever two verbs share them.",
        "```text",
        said([]),
        "```",
    ]
    for verb in verbs:
        told += [f"## `{verb}`", "```text", said([verb]), "```"]
    return "\n\n".join(told).replace("```text\n\n", "```text\n").replace("\n\n```\n", "\n```\n") + "\n"


def said(words: list[str]) -> str:
    plain = {"COLUMNS": "88", "TERM": "dumb", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [*words, "--help"], env=plain, prog_name="duet-vlm", terminal_width=88)
    assert done.exit_code == 0, (words, done.output)
    return done.output.strip("\n")


def python() -> str:
    """The public names for mkdocstrings, in groups."""
    words = "Headings are the names that you import or write: `import duet_vlm`, then `duet_vlm.attach(model)`."
    told = ["# Python", words]
    for head, names in GROUPS.items():
        told += [f"## {head}", *(block(name) for name in names)]
    return "\n\n".join(told) + "\n"


def imported(name: str) -> str:
    """The name that people write for a public object, given where it is defined (``attach.attach``)."""
    short = name.rpartition(".")[2]
    return f"duet_vlm.{short if short in duet_vlm.__all__ else name}"


def block(name: str) -> str:
    """One object for mkdocstrings, under the name that people write."""
    return f"::: duet_vlm.{name}\n    options:\n      heading: {imported(name)}\n      toc_label: {imported(name)}"


def public() -> Iterator[tuple[str, Any]]:
    """What the page shows: names with the objects, and the public methods of the classes among them."""
    for name in (name for names in GROUPS.values() for name in names):
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(f"duet_vlm.{module}"), attribute)
        yield name, found
        if inspect.isclass(found):
            held = getattr(found, "__dataclass_fields__", {})  # values, described in the class's docstring
            for own, member in vars(found).items():
                callable_ = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
                if callable_ and own not in held and not own.startswith("_"):
                    yield f"{name}.{own}", getattr(member, "__func__", member)


def undocumented() -> list[str]:
    """Public names without a docstring, and names of ``__all__`` that the page lacks."""
    shown = {name.rpartition(".")[2] for names in GROUPS.values() for name in names}
    return sorted([name for name, found in public() if not (vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__)]
                  + [f"{name} (not on the page)" for name in duet_vlm.__all__ if name not in shown])  # fmt: skip
