"""Lists of ``methods``, ``presets`` and ``models``, kept as data beside this file: making them takes torch, which takes
seconds to load.

``make tables`` writes the file, a test holds it equal to the package. Where more is installed than the package ships
(methods of other packages, a file added to the source), the package is used.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duet_vlm
from duet_vlm.utils.suggest import did_you_mean

FILE = Path(__file__).with_name("lists.json")
ENTRY_POINTS = "duet_vlm.methods"  # where other packages name their methods, see duet_vlm.reducers.registry
FOLDERS = {"methods": "duet_vlm.methods", "models": "duet_vlm.models"}  # a file in these makes a row of that list

Rows = list[dict[str, Any]]


def rows(name: str) -> Rows:
    """A list by its name: "methods", "presets" or "models"."""
    kept = json.loads(FILE.read_text())
    more = name == "methods" and entry_points(group=ENTRY_POINTS) or name in FOLDERS and kept["files"][name] != _files(name)
    if more or "torch" in sys.modules:  # asking costs nothing any more, and knows what this process has registered
        return MADE[name]()
    return kept[name]


def chosen(name: str, key: str, names: list[str] | None) -> Rows:
    """The rows whose ``key`` is in ``names``; all of them without ``names``.

    Raises
    ------
    ValueError
        An unknown name; the nearest one, and all that there are, are named.
    """
    by_name = {row[key]: row for row in rows(name)}
    for one in names or ():
        if one not in by_name:
            raise unknown(name, one, by_name)
    return [by_name[one] for one in names or by_name]


def check_method(text: str, *others: str) -> None:
    """Refuse a method, or a composition ("frames+duet"), that does not exist; ``others`` are names that are taken as
    well.

    Raises
    ------
    ValueError
        As ``chosen``.
    """
    names = [row["name"] for row in rows("methods")]
    for part in text.split("+"):
        if part not in (*names, *others):
            raise unknown("methods", part, names)


def unknown(name: str, text: str, names: Iterable[str]) -> ValueError:
    """The error for a name that is not in a list."""
    one, all_ = ("family", "families") if name == "models" else (name.removesuffix("s"), name)
    return ValueError(f"unknown {one} {text!r}{did_you_mean(text, names)}; known {all_}: {', '.join(names)}")


def content() -> str:
    """Content of the file, from the package itself."""
    own = [row for row in _methods() if duet_vlm.get_method(row["name"]).__module__.startswith("duet_vlm.")]  # other packages differ by machine
    lists = {"files": {name: _files(name) for name in FOLDERS}, "methods": own, "presets": _presets(), "models": _models()}
    return json.dumps(lists, indent=1) + "\n"


def _files(name: str) -> list[str]:
    spec = find_spec(FOLDERS[name])
    assert spec is not None and spec.submodule_search_locations is not None  # a folder of this package
    return sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))


def _methods() -> Rows:
    return [describe(name, cls) for name, cls in duet_vlm.list_methods().items()]


def describe(name: str, cls: type[duet_vlm.Reducer]) -> dict[str, Any]:
    """A method as plain values."""
    kinds = (("before the decoder", duet_vlm.EncoderReducer), ("inside the decoder", duet_vlm.DecoderReducer))
    in_tower, usual = issubclass(cls, duet_vlm.TowerReducer), cls()
    reads = sorted({*getattr(usual, "signals", ()), *getattr(usual, "reads", ()), *getattr(usual, "needs", ())})
    stages = ["inside the tower"] if in_tower else [word for word, base in kinds if issubclass(cls, base)]
    return {
        "name": name,
        "summary": cls.summary,
        "stage": " + ".join(stages) or "-",
        "needs_text": (issubclass(cls, duet_vlm.DecoderReducer) and cls.uses_text_queries()) or "question" in reads,
        "paper": cls.paper,
        "settings": [field.name for field in dataclasses.fields(cls)],
        "idea": _paragraphs(cls, lambda text: not text.startswith(("Cost", "Parameters", "Differences", "From the paper"))),
        "cost": _paragraphs(cls, lambda text: text.startswith("Cost")),
        "needs": reads,
        "families_without": _refusing(cls),
    }


def _paragraphs(cls: type[duet_vlm.Reducer], select: Callable[[str], bool]) -> str:
    """Paragraphs of a method's docstring before its parameters, or (of the rest) those that ``select`` accepts."""
    paragraphs = [" ".join(text.split()) for text in (inspect.getdoc(cls) or "").split("\n\n")]
    first = next(
        (
            i
            for i, text in enumerate(paragraphs)
            if text.startswith(("Parameters", "Cost", "Differences", "From the paper"))
        ),
        len(paragraphs),
    )
    accepted = [text for text in paragraphs[:first] if select(text)] or [text for text in paragraphs[first:] if select(text)][:1]
    return " ".join(accepted)


def _refusing(cls: type[duet_vlm.Reducer]) -> list[dict[str, Any]]:
    """Reasons for which families cannot run a method with its usual settings, or a preset of its authors' code, as far
    as known without a model."""
    from duet_vlm.models.lookup import families

    presets = [name for name in dir(cls) if name.startswith("official")]
    families_by_reason: dict[tuple[str, str], list[str]] = {}
    for name in ("", *presets):
        try:
            reducer = getattr(cls, name)() if name else cls()
        except TypeError:  # a preset that has to be told which one
            continue
        for family, adapter in families().items():
            if why := _why_not(adapter, reducer):
                families_by_reason.setdefault((name, why), []).append(family)
    return [{"preset": name, "why": why, "families": listed} for (name, why), listed in families_by_reason.items()]


def _why_not(adapter: Any, reducer: duet_vlm.Reducer) -> str:
    if reducer.positions == "compact" and adapter.mrope:
        return "positions are grids (M-RoPE) and cannot be compact"
    lacking = sorted((getattr(reducer, "signals", set()) | getattr(reducer, "reads", set())) & adapter.unsupported.keys())
    if lacking:
        return adapter.unsupported[lacking[0]]
    bare = object.__new__(adapter)  # what a family refuses whatever the model, it refuses without one
    asks = [bare.blocks_to_reduce] if getattr(reducer, "reduces_in_tower", False) else []
    asks += [bare.cls_module] if getattr(reducer, "cls_token", False) else []
    for ask in asks:
        try:
            ask()
        except TypeError as error:
            return str(error).removeprefix(f"{adapter.family}: ")
        except AttributeError:
            continue
    return ""


def _presets() -> Rows:
    from duet_vlm.api.presets import PRESETS

    return [
        {
            "name": name,
            "method": row.reducer.name,
            "model": row.model,
            "tokens": row.tokens,
            "depth": row.depth,
            "mean": row.mean,
            "published": row.published,
            "source": row.source,
            "settings": json.loads(json.dumps(row.reducer.settings())),
        }
        for name, row in PRESETS.items()
    ]


def _models() -> Rows:
    from duet_vlm.models.lookup import support

    return support()


MADE = {"methods": _methods, "presets": _presets, "models": _models}
