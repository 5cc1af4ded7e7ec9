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

from duet_vlm.api.catalogue import check_method, check_settings, chosen, refuses_without_budget
from duet_vlm.api.loading import LoadedModel, check_model, source
from duet_vlm.cli.errors import GOES_ON, friendly
from duet_vlm.inputs.images import open_image
from duet_vlm.inputs.video import VideoFrames, decode, length
from duet_vlm.planning.budget import read_budget
from duet_vlm.reducers import method_files
from duet_vlm.reducers.persistence import is_method_file, load_from_config, load_from_file
from duet_vlm.utils.field_types import is_setting_name, merged, nested, read_value

if TYPE_CHECKING:
    from torch import nn

    from duet_vlm import Handle, Reducer

SEVERAL = "Several: commas between, or the option again."

Model = Annotated[
    str, typer.Option("--model", "-m", help="'tiny' (ships with the package), a local folder, or a hub id.")
]
Images = Annotated[list[Path] | None, typer.Option("--image", "-i", help=f"Image file. {SEVERAL}")]
Videos = Annotated[list[Path] | None, typer.Option("--video", help=f"Video file (needs the 'video' extra). {SEVERAL}")]
FrameCount = Annotated[
    int | None,
    typer.Option("--frames", min=1, help="Frames taken of each clip, evenly spaced. Default: the model's, else 8."),
]
Rate = Annotated[float | None, typer.Option("--fps", help="Frames taken per second of a clip, in place of --frames.")]
ChunkFrames = Annotated[
    int | None,
    typer.Option(
        "--chunk-frames",
        min=1,
        help="Frames of a clip that go through the vision tower at a time: the same answer, in less memory.",
    ),
]
StillFrames = Annotated[
    float | None,
    typer.Option(
        "--still-frames",
        min=0,
        help="Do not encode frames that differ from the last encoded one in no patch by more than this (mean difference of its pixels, as the model "
        "gets them; 0: not at all).",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question; images and clips go in front of it.")]
Method = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="TEXT",
        help="A method ('duet-vlm methods'), several as one (frames+duet), a file of 'duet-vlm tune' (duet.json), or a Python file of yours "
        "(./mine.py). Default: what the model was trained with, else duet.",
    ),
]
Preset = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        metavar="TEXT",
        help="A method with all its settings as published ('duet-vlm presets'); in place of --method, --budget and --set.",
    ),
]
BudgetText = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="TEXT",
        help="Mean visual tokens per decoder layer and image (64), or that as a fraction (0.22 or 22%).",
    ),
]
Positions = Annotated[str | None, typer.Option("--positions", help="'keep' (default) or 'compact'.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method, e.g. --set 'schedule=((16, .5), (24, 0.0))', or an option: --set options.text_query=last.",
    ),
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
    return [
        path for value in values or () for path in ([value] if value.exists() else map(Path, _separated(str(value))))
    ]


def one(option: str, values: Sequence[str] | None) -> str | None:
    """The value of an option that takes several elsewhere and one here.

    Raises
    ------
    ValueError
        If there are more; they would be dropped in silence otherwise.
    """
    found = several(values)
    if len(found) > 1:
        raise ValueError(f"{option} {','.join(found)}: give one; 'duet-vlm eval' and 'duet-vlm bench' compare several")
    return found[0] if found else None


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
    def of(
        cls, images: list[Path] | None, videos: list[Path] | None, frames: int | None, fps: float | None, prompt: str
    ) -> VisualInputs:
        """As the options say; ``prompt`` is what is asked about them.

        Raises
        ------
        ValueError
            Nothing to look at, nothing asked, files that are none, options that exclude each other.
        """
        if not prompt.strip():
            raise ValueError("--prompt is empty: write a question")
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
    given = {"--chunk-frames": chunk_frames, "--still-frames": still_frames}
    settings = {option: value for option, value in given.items() if value is not None}
    if settings and not clips:
        raise ValueError(
            f"{' and '.join(f'{option} {value}' for option, value in settings.items())}: no clip is shown; {remedy}, or leave it out"
        )
    return {option.removeprefix("--").replace("-", "_"): value for option, value in settings.items()}


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
        typer.echo(
            "warning: --budget 1 is one token per image; all tokens are 1.0 or 100%. Did you mean 1.0?", err=True
        )
    return value


def warn_of_more(budget: int | float | None, tokens: Sequence[int]) -> None:
    """Say that a token count above what every picture has keeps all of them; ``tokens``: those of each picture and
    clip."""
    if isinstance(budget, int) and tokens and budget >= max(tokens):
        pictures = (
            f"the picture or clip has {tokens[0]}"
            if len(tokens) == 1
            else f"the largest picture or clip has {max(tokens)}"
        )
        typer.echo(
            f"warning: --budget {budget}: {pictures} visual tokens, so all are kept and nothing is reduced", err=True
        )


def budgets_of(values: Sequence[str] | None) -> list[int | float]:
    """Several of them."""
    return [budget for budget in map(budget_of, several(values)) if budget is not None]


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value is a Python literal where it reads as one, else text."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not is_setting_name(key.strip()):
            raise ValueError(f"--set {pair}: write it as key=value")
        out[key.strip()] = read_value(value)
    return nested(out)


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

    def attach(self, model: nn.Module, processor: Any = None, **chunk_settings: Any) -> Handle:
        """Attach it; ``chunk_settings`` are those of ``pieces_of``."""
        from duet_vlm import attach

        return attach(model, self.method, budget=self.budget, processor=processor, **self.fields | chunk_settings)

    def check(self, model: str) -> None:
        """Refuse, before anything large is loaded, settings that the method does not have.

        Raises
        ------
        ValueError, TypeError
            As the method itself.
        """
        if isinstance(known := self.known(model), dict):
            check_settings(known["method"], known["settings"])

    def known(self, model: str | nn.Module) -> dict[str, Any] | None:
        """Method, budget and settings on a model (or one by its name), as far as that is known: not of presets, nor of
        a hub id's memory."""
        own = {"method": self.method, "budget": self.budget, "settings": self.fields}
        if self.method is not None:
            return own if isinstance(self.method, str) else None
        if isinstance(model, str):
            path, local = source(model)
            if not local:
                return None
            kept = load_from_config(path) if (Path(path) / "config.json").is_file() else None
        else:
            kept = load_from_config(model)
        kept = kept or {"method": "duet", "budget": None, "settings": {}}
        budget = kept["budget"] if self.budget is None else self.budget
        return kept | {"budget": budget, "settings": merged(kept["settings"], self.fields)}

    def lacks_budget(self, model: str | nn.Module) -> bool:
        """True where nothing says how many tokens the method is to keep, as the method itself says."""
        known = self.known(model)
        return (
            known is not None and known["budget"] is None and refuses_without_budget(known["method"], known["settings"])
        )

    def check_budget(self, model: str) -> None:
        """Raise a ValueError where nothing says so."""
        known = self.known(model)
        if known is not None and self.lacks_budget(model):
            raise ValueError(
                f"--budget: {known['method']} needs a budget (64 tokens, 0.22 or 22% of them), or settings of its own with --set; "
                f"'duet-vlm methods {known['method']}' lists them"
            )


def method_of(name: str, *others: str) -> tuple[str, int | float | None, dict[str, Any]]:
    """Method, budget and settings that ``--method`` names, be it a method (then without the other two), a Python file
    that registers one, or a file that holds all three; ``others`` as ``check_method``.

    Raises
    ------
    ValueError
        An unknown method, or a file without one.
    """
    saved = load_from_file(name) if is_method_file(name) else {"method": name, "budget": None, "settings": {}}
    parts = [
        method_files.announce(part) if method_files.names_module(part) else part for part in _stages(saved["method"])
    ]
    check_method("+".join(parts), *others)
    return "+".join(parts), saved["budget"], saved["settings"]


def _stages(method: str) -> list[str]:
    """The methods of a composition; a + in the path of a file that is there separates nothing."""
    return [method] if method_files.names_module(method) and Path(method).expanduser().is_file() else method.split("+")


def reductions_of(
    method: list[str] | None,
    preset: list[str] | None,
    budget: list[str] | None,
    positions: str | None,
    settings: list[str] | None,
) -> list[Reduction]:
    """The texts of the shared options as values: a reduction for each budget.

    Raises
    ------
    ValueError
        A preset beside other choices, an unknown method or preset, a budget or a setting that cannot be parsed.
    """
    name, published = one("--method", method), one("--preset", preset)
    if published is None:
        fields = settings_of([*(settings or []), *([] if positions is None else [f"options.positions={positions}"])])
        budgets: list[int | float | None] = [*budgets_of(budget)]
        if name is not None:
            name, own, kept = method_of(name)
            budgets, fields = budgets or [own], merged(kept, fields)
        return [Reduction(None, name, value, fields) for value in budgets or [None]]
    others = {"--method": method, "--budget": budget, "--positions": positions, "--set": settings}
    given = [option for option, value in others.items() if value]
    if given:
        raise ValueError(f"--preset {published} brings its method and all settings: leave out {', '.join(given)}")
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
    budgets) and ``json_``, and its errors as one line. What can be known to be wrong without the model is refused
    before the verb begins."""
    return _reducing(verb)


def resumable(verb: Callable[..., None]) -> Callable[..., None]:
    """As ``reducing``, of a verb that goes on where it was interrupted."""
    return _reducing(verb, GOES_ON)


def _checked(reductions: list[Reduction], values: dict[str, Any]) -> list[Reduction]:
    """Refuse a model that is none, and settings that are none."""
    if values.get("config_only") is None:
        check_model(values["model"])
        for reduction in reductions:
            reduction.check(values["model"])
    return reductions


def _reducing(verb: Callable[..., None], interrupted: str = "") -> Callable[..., None]:
    parameters = inspect.signature(verb, eval_str=True).parameters
    own = [p for p in parameters.values() if p.name not in ("reduction", "reductions", "json_")]
    shared = list(inspect.signature(_shared, eval_str=True).parameters.values())

    @functools.wraps(verb)
    def command(
        method: Any, preset: Any, budget: Any, positions: Any, settings: Any, json_: bool, debug: bool, **values: Any
    ) -> None:
        with friendly(debug, json_, interrupted):
            if "reduction" in parameters:
                one("--budget", budget)
            reductions = _checked(reductions_of(method, preset, budget, positions, settings), values)
            verb(
                **values,
                json_=json_,
                **({"reductions": reductions} if "reductions" in parameters else {"reduction": reductions[0]}),
            )

    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}  # typer reads both
    return command
