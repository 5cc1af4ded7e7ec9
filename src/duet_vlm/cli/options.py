"""Options that several verbs share, and the parsing of their text. Nothing here loads torch before a verb runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from duet_vlm.api.loading import LoadedModel
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.lists import check_method, chosen
from duet_vlm.inputs.images import open_image
from duet_vlm.inputs.video import VideoFrames, decode, length
from duet_vlm.planning.budget import read_budget
from duet_vlm.reducers.persistence import is_method_file, load_from_file
from duet_vlm.utils.field_types import read_value

if TYPE_CHECKING:
    from torch import nn

    from duet_vlm import Handle, Reducer

SEVERAL = "Several: commas between, or the option again."

Model = Annotated[str, typer.Option("--model", "-m", help="'tiny' (ships with the package), a local folder, or a hub id.")]
Images = Annotated[list[Path] | None, typer.Option("--image", "-i", help=f"Image file. {SEVERAL}")]
Videos = Annotated[list[Path] | None, typer.Option("--video", help=f"Video file (needs the 'video' extra). {SEVERAL}")]
FrameCount = Annotated[int | None, typer.Option("--frames", min=1, help="Frames taken of each clip, evenly spaced. Default: the model's, else 8.")]
Rate = Annotated[float | None, typer.Option("--fps", help="Frames taken per second of a clip, in place of --frames.")]
ChunkFrames = Annotated[
    int | None,
    typer.Option("--chunk-frames", min=1, help="Frames of a clip that go through the vision tower at a time: the same answer, in less memory."),
]
StillFrames = Annotated[
    float | None,
    typer.Option(
        "--still-frames",
        min=0,
        help="Do not encode frames that differ from the last encoded one in no patch by more than this (mean "
            "difference of its pixels, as the model "
        "gets them; 0: not at all).",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question; images and clips go in front of it.")]
Method = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="TEXT",
        help="A method ('duet-vlm methods'), several as one (frames+duet), or a file of 'duet-vlm tune' (duet.json). "
            "Default: what the model was "
        "trained with, else duet.",
    ),
]
Preset = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        metavar="TEXT",
        help="A method with all its settings as published ('duet-vlm presets'); in place of --method, --budget and "
            "--set.",
    ),
]
BudgetText = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", metavar="TEXT", help="Mean visual tokens per decoder layer and image (64), or that as a fraction (0.22 or 22%)."),
]
Positions = Annotated[str | None, typer.Option("--positions", help="'keep' (default) or 'compact'.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, e.g. --set 'schedule=((16, .5), (24, 0.0))'."),
]
Device = Annotated[str | None, typer.Option("--device", help="Where to run; default: cuda if there is one, else cpu.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def several(values: Sequence[str] | None) -> list[str]:
    """The values of an option that takes several: ``-b .33 -b .11`` and ``-b .33,.11`` are the same. Commas inside
    brackets separate nothing."""
    return [part for value in values or () for part in _separated(value)]


def _separated(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()] or [text]


def several_paths(values: Sequence[Path] | None) -> list[Path]:
    """As ``several``, for files: a comma in the name of an existing file separates nothing."""
    return [path for value in values or () for path in ([value] if value.exists() else map(Path, _separated(str(value))))]


def one(option: str, values: Sequence[str] | None) -> str | None:
    """The value of an option that takes several elsewhere and one here.

    Raises
    ------
    ValueError
        If there are more; they would be dropped in silence otherwise.
    """
    texts = several(values)
    if len(texts) > 1:
        raise ValueError(f"{option} {','.join(texts)}: give one; 'duet-vlm eval' and 'duet-vlm bench' compare several")
    return texts[0] if texts else None


def counts(option: str, values: Sequence[str] | None, default: int) -> tuple[int, ...]:
    """Several counts, each at least 1.

    Raises
    ------
    ValueError
        If a text is no such count.
    """
    texts = several(values) or [str(default)]
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{option} {text}: give whole numbers, at least 1")
    return tuple(map(int, texts))


@dataclass(frozen=True)
class VisualInputs:
    """Images and videos of a prompt, as the options name them. Files that cannot be right are refused before a model is
    loaded.

    Attributes
    ----------
    images, videos : tuple of Path
        Files of images, then of videos.
    frames : int or None
        Frames of each video.
    fps : float or None
        Frames per second of each video.
    paths : tuple of Path
        All files.
    """

    images: list[Image.Image]
    videos: list[Path]
    frames: int | None
    fps: float | None
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, images: list[Path] | None, videos: list[Path] | None, frames: int | None, fps: float | None) -> VisualInputs:
        pictures, clips = several_paths(images), several_paths(videos)
        if not pictures and not clips:
            raise ValueError("nothing to look at: give --image, --video or both")
        if frames is not None and fps is not None:
            raise ValueError(f"--frames {frames} and --fps {fps}: give one of them")
        if not clips and (frames is not None or fps is not None):
            raise ValueError("--frames and --fps choose frames of a clip: give --video, or leave them out")
        for path in clips:
            length(path)
        return cls([open_image(path) for path in pictures], clips, frames, fps, [*pictures, *clips])

    def clips(self, loaded: LoadedModel) -> list[VideoFrames]:
        """The videos, with the number of frames of the user or the model."""
        frames = loaded.frames if self.frames is None and self.fps is None else self.frames
        return [decode(path, frames, self.fps) for path in self.videos]


def pieces_of(chunk_frames: int | None, still_frames: float | None, clips: bool, remedy: str) -> dict[str, Any]:
    """Arguments of ``attach`` for the chunks of videos.

    Raises
    ------
    ValueError
        If an option is given without ``clips``; ``remedy`` says what to give.
    """
    options = {"--chunk-frames": chunk_frames, "--still-frames": still_frames}
    options_given = {option: value for option, value in options.items() if value is not None}
    if options_given and not clips:
        raise ValueError(f"{' and '.join(f'{option} {value}' for option, value in options_given.items())}: no clip is shown; "
            f"{remedy}, or leave it out")
    return {option.removeprefix("--").replace("-", "_"): value for option, value in options_given.items()}


def budget_of(text: str | None) -> int | float | None:
    """Parse a budget: ``64`` is a token count, ``0.22`` and ``22%`` are fractions; ``1`` is one token, with a message.

    Raises
    ------
    ValueError
        If the text is neither, or out of range.
    """
    if text is None:
        return None
    value = read_budget(text, "--budget")
    if value == 1 and isinstance(value, int):
        typer.echo("warning: --budget 1 is one token per image; all tokens are 1.0 or 100%. Did you mean 1.0?", err=True)
    return value


def budgets_of(values: Sequence[str] | None) -> list[int | float]:
    """Several of them."""
    return [budget for budget in map(budget_of, several(values)) if budget is not None]


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value is a Python literal where it reads as one, else text."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"--set {pair}: write it as key=value")
        out[key.strip()] = read_value(value)
    return out


@dataclass(frozen=True)
class Reduction:
    """The reduction of one command line, ready to be attached; ``method`` None is the one saved with the model, else
    duet."""

    preset: str | None
    method: str | Reducer | None
    budget: int | float | None
    fields: dict[str, Any]

    def label_on(self, handle: Handle) -> str:
        """Title of the reduction under a handle."""
        return self.preset or handle.reducer.name

    def attach(self, model: nn.Module, processor: Any = None, **pieces: Any) -> Handle:
        """Attach it; ``processor`` is used where the settings need one, ``pieces`` are those of ``pieces_of``."""
        from duet_vlm import attach, load_from_config

        saved = load_from_config(model) if self.method is None else None
        fields = (saved or {}).get("settings", {}) | self.fields
        marked = processor if fields.get("text_query") == "salient" else None
        return attach(model, self.method, budget=self.budget, processor=marked, **self.fields | pieces)


def method_of(name: str, *others: str) -> tuple[str, int | float | None, dict[str, Any]]:
    """Method, budget and settings that ``--method`` names, either a method (then without the other two) or a file;
    ``others`` as in ``check_method``.

    Raises
    ------
    ValueError
        An unknown method, or a file without one.
    """
    setting = load_from_file(name) if is_method_file(name) else {"method": name, "budget": None, "settings": {}}
    check_method(setting["method"], *others)
    return setting["method"], setting["budget"], setting["settings"]


def reductions_of(
    method: list[str] | None, preset: list[str] | None, budget: list[str] | None, positions: str | None, settings: list[str] | None
) -> list[Reduction]:
    """The texts of the shared options as values: a reduction for each budget.

    Raises
    ------
    ValueError
        A preset beside other choices, an unknown method or preset, a budget or a setting that cannot be parsed.
    """
    name, published = one("--method", method), one("--preset", preset)
    if published is None:
        fields = settings_of(settings) | ({} if positions is None else {"positions": positions})
        budgets: list[int | float | None] = [*budgets_of(budget)]
        if name is not None:
            name, own, kept = method_of(name)
            budgets, fields = budgets or [own], kept | fields
        return [Reduction(None, name, value, fields) for value in budgets or [None]]
    others = {"--method": method, "--budget": budget, "--positions": positions, "--set": settings}
    conflicting = [option for option, value in others.items() if value]
    if conflicting:
        raise ValueError(f"--preset {published} brings its method and all settings: leave out {', '.join(conflicting)}")
    chosen("presets", "name", [published])  # refused before anything large is loaded
    from duet_vlm import preset as preset_of

    return [Reduction(published, preset_of(published), None, {})]


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
    """Give a verb the shared options; it receives them as ``reduction`` (or ``reductions``, where it takes several
    budgets) and ``json_``, and its errors as one line."""
    parameters = inspect.signature(verb, eval_str=True).parameters
    own = [p for p in parameters.values() if p.name not in ("reduction", "reductions", "json_")]
    shared = list(inspect.signature(_shared, eval_str=True).parameters.values())

    @functools.wraps(verb)
    def command(method: Any, preset: Any, budget: Any, positions: Any, settings: Any, json_: bool, debug: bool, **values: Any) -> None:
        with friendly(debug, json_):
            if "reductions" in parameters:
                verb(**values, reductions=reductions_of(method, preset, budget, positions, settings), json_=json_)
                return
            one("--budget", budget)
            (reduction,) = reductions_of(method, preset, budget, positions, settings)
            verb(**values, reduction=reduction, json_=json_)

    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}  # typer reads both
    return command
