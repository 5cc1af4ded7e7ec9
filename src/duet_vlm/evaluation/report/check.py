"""Check that a result is complete enough for a report. A result file may come from anyone, so its types are checked
too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import duet_vlm
from duet_vlm.utils.renamed_settings import check_renamed

AGAIN = "run the experiment again to make it anew"
Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_count, value))


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_object, value))


# what each test wants, in words; below, the tests of every entry that is shown, by its place
WANTED: dict[Test, str] = {
    _text: "text",
    _number: "a finite number",
    _positive: "a number above 0",
    _share: "a number from 0 to 1",
    _flag: "true or false",
    _count: "a count, 0 or more",
    _list: "a list",
    _interval: "two numbers, low and high",
    _counts: "a list of counts",
    _object: "an object",
    _rows: "a list of runs, the full model first",
}
TOP = {
    "name": _text,
    "task": _text,
    "experiment": _object,
    "environment": _object,
    "model": _object,
    "questions": _object,
    "runs": _rows,
}
ASKED = {"count": _count, "per_seed": _count, "kinds": _object}
RUN = {"id": _text, "label": _text, "method": _text, "status": _text, "settings": _object}
TOKENS = {"unreduced": _positive, "nominal": _number, "measured": _positive}
OK = {
    "accuracy": _share,
    "interval": _interval,
    "tokens": _object,
    "kinds": _object,
    "flops": _number,
    "flops_share": _number,
    "kv_bytes": _number,
}
KIND = {"n": _count, "accuracy": _share}
# may be absent or null; where it is there, it has this shape
OPTIONAL = {
    "budget": _number,
    "kept": _number,
    "kept_interval": _interval,
    "kv_share": _number,
    "of_oracle": _number,
    "floor": _number,
}
OPTIONAL |= {
    "message": _text,
    "seeds": _object,
    "solved": _object,
    "prefill": _object,
    "recall": _object,
    "against": _object,
    "preset": _text,
}
SOLVED = {"tokens": _count, "entry": _count, "dominant": _count, "contextual": _count, "counts": _counts}
PREFILL = {
    "ms": _positive,
    "low": _positive,
    "high": _positive,
    "ratio": _number,
    "ratio_interval": _interval,
    "rounds": _count,
    "batch": _count,
}
RECALL = {"entry": _share, "entry_or_merged": _share, "middle": _share}
AGAINST = {
    "run": _text,
    "difference": _number,
    "interval": _interval,
    "wins": _count,
    "losses": _count,
    "p_value": _number,
    "p_adjusted": _number,
}
NESTED: dict[str, Mapping[str, Test]] = {"solved": SOLVED, "prefill": PREFILL, "recall": RECALL, "against": AGAINST}


def check(result: dict[str, Any], source: str) -> None:
    """Check that every entry of tables and plots exists and is of the right kind.

    Raises
    ------
    ValueError
        Naming the file (``source``), the run, the entry, its value and the expected kind.
    """
    problem = next(_problems(result), None)
    if problem:
        raise ValueError(f"{source}: {problem}; {AGAIN}")
    for number, run in enumerate(result["runs"]):
        parts = run["method"].split("+")
        known = duet_vlm.list_methods()
        own = [field.name for part in parts if part in known for field in fields(known[part])]
        try:
            check_renamed(run["method"], run["settings"], [*own, *(f"{part}_{name}" for part in parts for name in own)])
        except ValueError as error:
            raise ValueError(f"{source}: run {number} ({run['id']!r}): {error}, in this file too") from None


def _problems(result: dict[str, Any]) -> Iterator[str]:
    yield from _wrong(result, TOP, "the result")
    yield from _wrong(result["experiment"], {"seeds": _list}, "the experiment", optional=True)
    yield from _wrong(result["questions"], ASKED, "questions")
    names: set[str] = set()
    for number, run in enumerate(result["runs"]):
        where = f"run {number} ({run.get('id')!r})"
        yield from _wrong(run, RUN, where)
        yield from _wrong(run, OPTIONAL, where, optional=True)
        if run["id"] in names:
            yield f"{where}: there are two of this id"
        names.add(run["id"])
        if number == 0 and (run["status"] != "ok" or run["method"] != "none"):
            yield f"{where}: the first run is to be the full model (method 'none', status 'ok'), found {run['method']!r}, {run['status']!r}"
        if run["status"] == "ok":
            yield from _measured(run, where)


def _measured(run: dict[str, Any], where: str) -> Iterator[str]:
    yield from _wrong(run, OK, where)
    yield from _wrong(run["tokens"], TOKENS, f"{where}, tokens")
    for kind, entry in run["kinds"].items():
        if not _object(entry):
            yield f"{where}, kinds: {kind!r} is {_shown(entry)}, wanted an object"
        yield from _wrong(entry, KIND, f"{where}, kinds, {kind!r}")
        yield from _wrong(
            entry, {"kept": _number, "kept_interval": _interval}, f"{where}, kinds, {kind!r}", optional=True
        )
    for name, shape in NESTED.items():
        if run.get(name) is not None:
            yield from _wrong(run[name], shape, f"{where}, {name}")
    if run.get("against") is not None:  # of later versions
        yield from _wrong(run["against"], {"p_holm": _number, "level": _flag}, f"{where}, against", optional=True)


def _wrong(entry: dict[str, Any], shape: Mapping[str, Test], where: str, optional: bool = False) -> Iterator[str]:
    for key, test in shape.items():
        if optional and entry.get(key) is None:
            continue
        if key not in entry:
            yield f"{where} lacks {key!r}, wanted {WANTED[test]}"
        elif not test(entry[key]):
            yield f"{where}: {key!r} is {_shown(entry[key])}, wanted {WANTED[test]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
