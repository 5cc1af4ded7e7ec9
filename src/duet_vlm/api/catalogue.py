"""Lists that ``methods``, ``presets`` and ``models`` print, kept as data beside this file, since making them takes
torch, which takes seconds to load.

``make tables`` writes the file, a test holds it equal to what the package says of itself. Where more is installed than
the package ships (methods of other packages, a file that somebody adds to the source), the package is asked.
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
from duet_vlm.planning.budget import NoBudget, check_keep
from duet_vlm.reducers import method_files
from duet_vlm.reducers.inputs import FEATURE_INPUTS, TOWER_INPUTS, Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.utils import lab
from duet_vlm.utils.field_types import DECLARED, check_names, check_type
from duet_vlm.utils.suggest import did_you_mean
from duet_vlm.utils.suggest import unknown as not_known

FILE = Path(__file__).with_name("catalogue.json")
ENTRY_POINTS = "duet_vlm.methods"  # where other packages name their methods, see duet_vlm.reducers.registry
CHECKED = {*DECLARED, "Keep"}  # types of settings whose values are told apart without the method
USUAL = (576, 32)  # visual tokens and decoder layers (LLaVA-1.5-7B) that a method is asked to plan for
FOLDERS = {"methods": "duet_vlm.methods", "models": "duet_vlm.models"}  # a file in these makes a row of that list

Rows = list[dict[str, Any]]
UNLISTED = FEATURE_INPUTS | TOWER_INPUTS | {Input.SCORES, Input.TOKENS}  # every model has them


def rows(name: str, others: bool = False) -> Rows:
    """A list by its name: "methods", "presets" or "models"; ``others``: with the methods of other packages, which are
    imported for it."""
    kept = json.loads(FILE.read_text())
    more = others and name == "methods" and offered() or name in FOLDERS and kept["files"][name] != _files(name)
    if more or "torch" in sys.modules:  # asking costs nothing any more, and knows what this process has registered
        return MADE[name]()
    return kept[name]


def offered() -> set[str]:
    """Names of the methods that other installed packages offer; nothing is imported."""
    return {entry.name for entry in entry_points(group=ENTRY_POINTS)}


def chosen(name: str, key: str, wanted: list[str] | None) -> Rows:
    """The rows whose ``key`` is ``wanted``; all of them where nothing is.

    Raises
    ------
    ValueError
        An unknown name; the nearest ones are named.
    """
    found = {row[key]: row for row in rows(name)}
    if wanted is None or not found.keys() >= set(wanted):
        found = {row[key]: row for row in rows(name, others=True)}
    for each in wanted or ():
        if each not in found:
            raise unknown(name, each, found)
    return [found[each] for each in wanted or found]


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
    """Refuse settings that a method of this package does not have, and values that are not of a setting's type; of
    others and of compositions it is not known before they are loaded.

    Raises
    ------
    ValueError, TypeError
        As the method itself, made with them.
    """
    row = (
        None
        if "+" in text or text in method_files.names()
        else next((row for row in rows("methods") if row["name"] == text), None)
    )
    if row is None:
        return
    check_names(text, settings, row["settings"])
    for name in TokenOptions.of(settings.get("options")).given():
        if name not in row["options"]:
            raise ValueError(f"{text} has no option {name!r}; its options: {', '.join(row['options'])}")
    for name, value in settings.items():
        kind = row["types"].get(name, "")
        value = check_type(name, kind, value)
        if value is not None and kind.removesuffix(" | None") == "Keep":
            check_keep(name, value)


def needs_budget(text: str, settings: Iterable[str]) -> bool:
    """True if a method has nothing in place of a budget among these settings; False where only the method itself can
    tell."""
    parts = text.split("+")
    given = {name for setting in settings for name in (setting, *(setting.removeprefix(f"{part}_") for part in parts))}
    found = {row["name"]: row["instead"] for row in rows("methods")}
    return all((instead := found.get(part)) and not given & set(instead) for part in parts)


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
    """Text of the file, made from the package itself."""
    # other packages differ by machine
    own = [row for row in _methods() if duet_vlm.get_method(row["name"]).__module__.startswith("duet_vlm.")]
    found = {
        "files": {name: _files(name) for name in FOLDERS},
        "methods": own,
        "presets": _presets(),
        "models": _models(),
    }
    return json.dumps(found, indent=1) + "\n"


def _files(name: str) -> list[str]:
    spec = find_spec(FOLDERS[name])
    assert spec is not None and spec.submodule_search_locations is not None  # a folder of this package
    return sorted(path.stem for place in spec.submodule_search_locations for path in Path(place).rglob("*.py"))


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
        "types": {
            field.name: kind
            for field in dataclasses.fields(cls)
            if (kind := _kind(field)).removesuffix(" | None") in CHECKED
        },
        "instead": _instead(usual),
        "calibrated": hasattr(cls, "observer"),
        "idea": _paragraphs(
            cls, lambda text: not text.startswith(("Cost", "Parameters", "Differences", "From the paper"))
        ),
        "cost": _paragraphs(cls, lambda text: text.startswith("Cost")),
        "needs": reads,
        "families_without": _refusing(cls),
    }


def _kind(field: dataclasses.Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def _instead(usual: duet_vlm.Reducer) -> list[str]:
    """The settings that a method takes in place of a budget; none where it runs without either."""
    try:
        usual.plan(*USUAL, None)
    except NoBudget as error:
        return list(error.instead)
    except ValueError:  # it wants something else first
        return []
    return []


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
    found: dict[tuple[str, str], list[str]] = {}
    for name in ("", *presets):
        try:
            reducer = getattr(cls, name)() if name else cls()
        except TypeError:  # a preset that has to be told which one
            continue
        for family, adapter in families().items():
            if why := _why_not(adapter, reducer):
                found.setdefault((name, why), []).append(family)
    return [{"preset": name, "why": why, "families": listed} for (name, why), listed in found.items()]


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
