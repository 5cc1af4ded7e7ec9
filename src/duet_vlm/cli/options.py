"""Options that several verbs share, and how their text becomes values."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from torch import nn

from duet_vlm.attach import attach
from duet_vlm.cli.errors import friendly
from duet_vlm.handle import Handle
from duet_vlm.loading import Loaded
from duet_vlm.memory import remembered
from duet_vlm.pictures import open_image
from duet_vlm.presets import preset as preset_of
from duet_vlm.reducer import Reducer
from duet_vlm.video import Clip, decode, length

Model = Annotated[str, typer.Option("--model", "-m", help="'tiny' (ships with the package), a local folder, or a hub id.")]
Images = Annotated[list[Path] | None, typer.Option("--image", "-i", help="Image file; repeat it for several.")]
Videos = Annotated[list[Path] | None, typer.Option("--video", help="Video file (needs the 'video' extra); repeat it for several.")]
FrameCount = Annotated[int | None, typer.Option("--frames", min=1, help="Frames taken of each clip, evenly spaced. Default: the model's, else 8.")]
Rate = Annotated[float | None, typer.Option("--fps", help="Frames taken per second of a clip, in place of --frames.")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question; images and clips go in front of it.")]
Method = Annotated[
    str | None,
    typer.Option("--method", help="A method ('duet-vlm methods') or several as one (frames+duet). Default: what the model was trained with, duet."),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="A method with all its settings as published, e.g. duet-192; in place of --method, --budget and --set."),
]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Mean visual tokens per decoder layer and image (64), or that as a fraction (0.22 or 22%)."),
]
Positions = Annotated[str | None, typer.Option("--positions", help="'keep' (default) or 'compact'.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, e.g. --set 'schedule=((16, .5), (24, 0.0))'."),
]
Device = Annotated[str | None, typer.Option("--device", help="Where to run; default: cuda if there is one, else cpu.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Shown:
    """What a prompt shows: pictures, then clips, as the options name them. Files that cannot be right are refused before a model is loaded."""

    images: list[Image.Image]
    videos: list[Path]
    frames: int | None
    fps: float | None

    @classmethod
    def of(cls, images: list[Path] | None, videos: list[Path] | None, frames: int | None, fps: float | None) -> Shown:
        if not images and not videos:
            raise ValueError("nothing to look at: give --image, --video or both")
        if frames is not None and fps is not None:
            raise ValueError(f"--frames {frames} and --fps {fps}: give one of them")
        for path in videos or []:
            length(path)
        return cls([open_image(path) for path in images or []], videos or [], frames, fps)

    def clips(self, loaded: Loaded) -> list[Clip]:
        """The clips, with as many frames as the user or the model wants."""
        frames = loaded.frames if self.frames is None and self.fps is None else self.frames
        return [decode(path, frames, self.fps) for path in self.videos]


def budget_of(text: str | None) -> int | float | None:
    """``64`` is a token count, ``0.22`` and ``22%`` are fractions.

    Raises
    ------
    ValueError
        If the text is neither.
    """
    if text is None:
        return None
    cleaned = text.strip()
    try:
        if cleaned.endswith("%"):
            return float(cleaned[:-1]) / 100
        return int(cleaned) if cleaned.lstrip("+-").isdigit() else float(cleaned)
    except ValueError:
        raise ValueError(f"--budget {text}: give a token count (64), a fraction (0.22) or a percentage (22%)") from None


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value is a Python literal where it reads as one, else text."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"--set {pair}: write it as key=value")
        try:
            out[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            out[key.strip()] = value.strip()
    return out


@dataclass(frozen=True)
class Reduction:
    """What the options of one command line ask for, ready to be attached; ``method`` None is what the model remembers, else duet."""

    label: str | None
    method: str | Reducer | None
    budget: int | float | None
    fields: dict[str, Any]

    def label_on(self, handle: Handle) -> str:
        """What it is called."""
        return self.label or handle.reducer.name

    def attach(self, model: nn.Module, processor: Any = None) -> Handle:
        """Attach it; ``processor`` is used where the settings need one."""
        known = remembered(model) if self.method is None else None
        fields = (known or {}).get("settings", {}) | self.fields
        marked = processor if fields.get("text_query") == "salient" else None
        return attach(model, self.method, budget=self.budget, processor=marked, **self.fields)


def reduction_of(
    method: str | None, preset: str | None, budget: str | None, positions: str | None, settings: list[str] | None
) -> Reduction:
    """The texts of the shared options as values.

    Raises
    ------
    ValueError
        A preset beside other choices, an unknown preset, a budget or a setting that does not read as one.
    """
    if preset is None:
        fields = settings_of(settings) | ({} if positions is None else {"positions": positions})
        return Reduction(method, method, budget_of(budget), fields)
    others = {"--method": method, "--budget": budget, "--positions": positions, "--set": settings}
    given = [option for option, value in others.items() if value]
    if given:
        raise ValueError(f"--preset {preset} brings its method and all settings: leave out {', '.join(given)}")
    return Reduction(preset, preset_of(preset), None, {})


def _shared(
    method: Method = None,
    preset: Preset = None,
    budget: BudgetText = None,
    positions: Positions = None,
    settings: Settings = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """The options of every verb that attaches a method, where they are told apart from the verb's own."""


def reducing(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the shared options; it receives them as ``reduction`` and ``json_``, and its errors as one line."""
    own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name not in ("reduction", "json_")]
    shared = list(inspect.signature(_shared, eval_str=True).parameters.values())

    @functools.wraps(verb)
    def command(method: Any, preset: Any, budget: Any, positions: Any, settings: Any, json_: bool, debug: bool, **values: Any) -> None:
        with friendly(debug, json_):
            verb(**values, reduction=reduction_of(method, preset, budget, positions, settings), json_=json_)

    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}  # typer reads both
    return command
