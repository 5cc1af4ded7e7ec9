"""Lists that ``methods``, ``presets`` and ``models`` print. The columns of their tables are kept beside this file, since
making them takes torch, which takes seconds to load.

``make tables`` writes the file, a test holds it equal to what the package says of itself. Where more is asked for, or
more is installed than the package ships (methods of other packages, a file that somebody adds to the source), the
package is asked.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duet_vlm
from duet_vlm.planning.budget import NoBudget
from duet_vlm.reducers import method_files
from duet_vlm.reducers.inputs import FEATURE_INPUTS, TOWER_INPUTS, Input
from duet_vlm.utils import lab
from duet_vlm.utils.suggest import did_you_mean
from duet_vlm.utils.suggest import unknown as not_known

FILE = Path(__file__).with_name("catalogue.json")
ENTRY_POINTS = "duet_vlm.methods"  # where other packages name their methods, see duet_vlm.reducers.registry
USUAL = (576, 32)  # visual tokens and decoder layers (LLaVA-1.5-7B) that a method is asked to plan for
FOLDERS = {"methods": "duet_vlm.methods", "models": "duet_vlm.models"}  # a file in these makes a row of that list
KEPT = {  # the columns of a list that are kept; all where none are named
    "methods": ("name", "summary", "stage", "needs_text", "paper"),
    "presets": ("name", "method", "model", "tokens", "mean", "source"),
    "models": (),
}

Rows = list[dict[str, Any]]
UNLISTED = FEATURE_INPUTS | TOWER_INPUTS | {Input.SCORES, Input.TOKENS}  # every model has them


def rows(name: str, others: bool = False) -> Rows:
    """The kept columns of a list by its name: "methods", "presets" or "models"; ``others``: with the methods of other
    packages, which are imported for it."""
    kept = json.loads(FILE.read_text())
    more = others and name == "methods" and offered() or name in FOLDERS and kept["files"][name] != _count_files(name)
    if more or "torch" in sys.modules:  # asking costs nothing any more, and knows what this process has registered
        return MADE[name]()
    return kept[name]


def offered() -> set[str]:
    """Names of the methods that other installed packages offer; nothing is imported."""
    return {entry.name for entry in entry_points(group=ENTRY_POINTS)}


def chosen(name: str, key: str, wanted: list[str] | None, whole: bool = False) -> Rows:
    """The rows whose ``key`` is ``wanted``; all of them where nothing is. ``whole``: with all columns.

    Raises
    ------
    ValueError
        An unknown name; the nearest ones are named.
    """
    by_name = {row[key]: row for row in rows(name)}
    if wanted is None or not by_name.keys() >= set(wanted):
        by_name = {row[key]: row for row in rows(name, others=True)}
    for each in wanted or ():
        if each not in by_name:
            raise unknown(name, each, by_name)
    if whole:
        by_name = {row[key]: row for row in MADE[name]()}
    return [by_name[each] for each in wanted or by_name]


def check_method(text: str, *others: str) -> None:
    """Refuse a method, or a composition ("frames+duet"), that does not exist; ``others`` are names that are taken as
    well.

    Raises
    ------
    ValueError
        As ``chosen``.
    """
    own = {*method_files.names(), *offered()}
    for part in text.split("+"):
        if part not in (*own, *others):
            known = [row["name"] for row in rows("methods")]
            if part not in known and part in lab.METHODS:
                raise ValueError(lab.how_to_install("method", part))
            if part not in known:
                raise unknown("methods", part, [*known, *own])


def check_settings(text: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a method or a composition does not have, and values that it does not take. Settings load
    torch; none do not.

    Raises
    ------
    ValueError, TypeError
        As the method itself, made with them.
    """
    if settings:
        duet_vlm.make_method(text, **settings)


def refuses_without_budget(text: str, settings: Mapping[str, Any]) -> bool:
    """True where a method or a composition cannot plan by these settings alone. It is asked itself: one stage may need
    a budget where another runs without, which no list knows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of these counts, which are no picture's
            duet_vlm.make_method(text, **settings).plan(*USUAL, None)
    except NoBudget:
        return True
    except (ValueError, TypeError):  # ``attach`` says what is wrong
        return False
    return False


def unknown(name: str, given: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in a list."""
    if name == "methods":  # too many for a line
        return not_known("method", given, known, "'duet-vlm methods'")
    one, all_ = ("family", "families") if name == "models" else (name.removesuffix("s"), name)
    return ValueError(f"unknown {one} {given!r}{did_you_mean(given, known)}; known {all_}: {', '.join(known)}")


def content() -> str:
    """Text of the file, made from the package itself: a row a line."""
    made = {name: MADE[name]() for name in KEPT}
    # other packages differ by machine
    own = [row for row in made["methods"] if duet_vlm.get_method(row["name"]).__module__.startswith("duet_vlm.")]
    lists = []
    for name, every in (made | {"methods": own}).items():
        lines = (json.dumps({key: row[key] for key in KEPT[name] or row}) for row in every)
        lists.append(f'"{name}": [\n' + ",\n".join(lines) + "\n]")
    files = json.dumps({name: _count_files(name) for name in FOLDERS})
    return f'{{\n"files": {files},\n' + ",\n".join(lists) + "\n}\n"


def _count_files(name: str) -> int:
    spec = find_spec(FOLDERS[name])
    assert spec is not None and spec.submodule_search_locations is not None  # a folder of this package
    return sum(len(list(Path(folder).rglob("*.py"))) for folder in spec.submodule_search_locations)


def _methods() -> Rows:
    return [describe(name, cls) for name, cls in duet_vlm.list_methods().items()]


def describe(name: str, cls: type[duet_vlm.Reducer]) -> dict[str, Any]:
    """A method as plain values."""
    places = (("before the decoder", duet_vlm.EncoderReducer), ("inside the decoder", duet_vlm.DecoderReducer))
    in_tower, usual = issubclass(cls, duet_vlm.TowerReducer), cls()
    reads = sorted(need.value for need in usual.requires - UNLISTED)
    stages = ["inside the tower"] if in_tower else [word for word, base in places if issubclass(cls, base)]
    return {
        "name": name,
        "summary": cls.summary,
        "stage": " + ".join(stages) or "-",
        "needs_text": usual.uses_text_queries() or "question" in reads,
        "paper": cls.paper,
        "settings": [field.name for field in dataclasses.fields(cls)],
        "options": list(usual.known_options()),
        "idea": _paragraphs(
            cls, lambda text: not text.startswith(("Cost", "Parameters", "Differences", "From the paper"))
        ),
        "cost": _paragraphs(cls, lambda text: text.startswith("Cost")),
        "needs": reads,
        "families_without": _refusing(cls),
    }


def _paragraphs(cls: type[duet_vlm.Reducer], wanted: Callable[[str], bool]) -> str:
    """Paragraphs of a method's docstring before its parameters, or (of the rest) in the paragraphs that are wanted."""
    whole = [" ".join(text.split()) for text in (inspect.getdoc(cls) or "").split("\n\n")]
    first = next(
        (i for i, text in enumerate(whole) if text.startswith(("Parameters", "Cost", "Differences", "From the paper"))),
        len(whole),
    )
    told = [text for text in whole[:first] if wanted(text)] or [text for text in whole[first:] if wanted(text)][:1]
    return " ".join(told)


def _refusing(cls: type[duet_vlm.Reducer]) -> list[dict[str, Any]]:
    """Reasons why families cannot run a method with its usual settings, or a preset of its authors' code, as far as
    that is known without a model."""
    from duet_vlm.models.lookup import families

    presets = [name for name in dir(cls) if name.startswith("official")]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name in ("", *presets):
        try:
            reducer = getattr(cls, name)() if name else cls()
        except TypeError:  # a preset that has to be told which one
            continue
        for family, adapter in families().items():
            if why := _why_not(adapter, reducer):
                by_reason.setdefault((name, why), []).append(family)
    return [{"preset": name, "why": why, "families": listed} for (name, why), listed in by_reason.items()]


def _why_not(adapter: Any, reducer: duet_vlm.Reducer) -> str:
    if reducer.options.positions == "compact" and adapter.mrope:
        return "positions are grids (M-RoPE) and cannot be compact"
    lacking = sorted({need.value for need in reducer.requires} & adapter.unsupported.keys())
    if lacking:
        return adapter.unsupported[lacking[0]]
    bare = object.__new__(adapter)  # what a family refuses whatever the model, it refuses without one
    asks = [bare.blocks_to_reduce] if reducer.reduces_in_tower else []
    asks += [bare.cls_module] if reducer.options.cls_token else []
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
