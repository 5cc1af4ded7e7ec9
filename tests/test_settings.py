"""Settings of every method: plain Python values whatever they were given as, and refused where they are of another
kind."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, ONE, build

import duet_vlm
from duet_vlm.planning.budget import SpanPlan, check_schedule
from duet_vlm.reducers import registry
from duet_vlm.reducers.persistence import to_record
from duet_vlm.utils.field_types import flattened, nested, to_plain

ALL_STAGES = "contrast+duet"  # has every option


def kind_of(field: Any) -> str:
    return str(field.type).removesuffix(" | None")


SETTINGS = [
    *((name, field.name, kind_of(field)) for name, cls in duet_vlm.list_methods().items() for field in fields(cls)),
    *(
        (name, f"{part}_{field.name}", kind_of(field))
        for name in ("frames+duet", "scope+pyramiddrop", "frames+visionzip+fastv")
        for part in name.split("+")
        for field in fields(duet_vlm.get_method(part))
    ),
]
SETTINGS = [row for row in SETTINGS if not row[1].endswith("options")]
SETTINGS += [(ALL_STAGES, f"options.{field.name}", kind_of(field)) for field in fields(duet_vlm.TokenOptions)]

# kind -> (value as numpy gives it, the same in Python)
SAME: dict[str, list[tuple[Any, Any]]] = {
    "int": [(np.int64(2), 2), (np.int32(2), 2), (np.uint8(2), 2)],
    "float": [(np.float64(0.7), 0.7), (np.float32(0.7), 0.7), (np.int64(1), 1)],
    "bool": [(np.bool_(True), True), (np.bool_(False), False)],
    "Keep": [(np.float64(0.3), 0.3), (np.float32(0.3), 0.3), (np.float16(0.3), 0.3), (np.int64(3), 3)],
    "tuple[int, ...]": [([np.int64(1), 2], (1, 2))],
    "Schedule": [([[np.int64(2), np.float32(0.6)], [np.int64(3), np.int64(0)]], ((2, 0.6), (3, 0)))],
    "Schedule | str": [([[np.int64(2), np.float32(0.6)]], ((2, 0.6),))],
    "Layer": [(np.int64(2), 2), (np.float32(0.25), 0.25)],
    "str": [],  # words; numpy's are some already
}
WRONG: dict[str, list[Any]] = {
    "int": [2.5, 2.0, True, "2", np.float64(2), np.bool_(True), [2], (2,)],
    "float": [True, "0.5", np.bool_(True), [0.5], 1j],
    "bool": [1, 0, "False", 0.0, np.int64(1), "yes"],
    "Keep": [True, np.bool_(True), "0.5", -1, 1.5, np.float64(1.5), np.int64(-1), [0.5]],
    "tuple[int, ...]": [3, (1.5,), (True,), ("a",), "ab"],
    "Schedule": [
        ((2.5, 0.5),),
        ((True, 0.5),),
        ((np.bool_(True), 0.5),),
        ((np.float64(2), 0.5),),
        ((2, True),),
        ((2, "half"),),
        ((2,),),
        3,
        "ab",
    ],
    "Schedule | str": [((2.5, 0.5),), ((True, 0.5),), ((2, True),), ((2, "half"),), ((2,),), 3, "ab"],
    "Layer": [True, np.bool_(True), "2", [2]],
    "str": [3, True, ("keep",), b"keep"],
}


def made(method: str, name: str, value: Any) -> duet_vlm.Reducer:
    """The method with one setting, and what that setting needs beside it."""
    beside: dict[str, Any] = {name.replace("contextual", "dominant"): 5} if name.endswith("contextual") else {}
    if name == "options.cls_token" and bool(value):
        beside = {"options.positions": "compact"}
    return duet_vlm.make_method(method, **nested({**beside, name: value}))


def test_every_kind_of_setting_is_known_here() -> None:
    assert {kind for *_, kind in SETTINGS} == set(SAME) == set(WRONG)
    assert sum(kind == "int" for *_, kind in SETTINGS) >= 7 and len(SETTINGS) > 100


@pytest.mark.parametrize(("method", "name", "kind"), SETTINGS)
def test_numbers_of_numpy_become_pythons(method: str, name: str, kind: str) -> None:
    for given, meant in SAME[kind]:
        if name == "own_share" and meant == 1:  # less than all of it
            continue
        reducer, wanted = made(method, name, given), made(method, name, meant)
        assert reducer == wanted and hash(reducer) == hash(wanted)
        value = flattened(reducer.settings())[name]
        assert value == meant and type(value) is type(meant)
        assert json.dumps(reducer.settings()) == json.dumps(wanted.settings())
        assert json.dumps(to_record(reducer, np.float32(0.3))) == json.dumps(to_record(wanted, 0.3))  # type: ignore[arg-type]
        assert pickle.loads(pickle.dumps(reducer)) == reducer


@pytest.mark.parametrize(("method", "name", "kind"), SETTINGS)
def test_settings_of_another_kind_are_refused_by_name(method: str, name: str, kind: str) -> None:
    for value in WRONG[kind]:
        with pytest.raises((TypeError, ValueError)) as caught:
            made(method, name, value)
        message = str(caught.value)
        stage = next((f"{part}_" for part in method.split("+") if name.startswith(f"{part}_")), "options.")
        own = name.removeprefix(stage)
        assert len(message.splitlines()) == 1
        # in a composition the stage speaks, of its own setting
        if kind in ("Keep", "Schedule", "Schedule | str", "str"):
            assert message.startswith(own)
        else:
            assert isinstance(caught.value, TypeError) and message.startswith(f"{own}={to_plain(value)!r}: give ")


def test_methods_of_others_are_held_to_what_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", dict(duet_vlm.list_methods()))

    @duet_vlm.register("theirs")
    @dataclass(frozen=True)
    class Theirs(duet_vlm.DecoderReducer):
        """A method whose author checks nothing."""

        paper = summary = "-"
        width: int = 3
        when: int | None = None
        weight: float | None = None
        table: tuple[float, ...] = ()

        def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
            return SpanPlan(tokens, tokens, 0, (tokens,) * depth)

        def prune_tokens(self, view: duet_vlm.DecoderView) -> torch.Tensor:
            return view.valid

    made = duet_vlm.get_method("theirs")(width=np.int64(4), when=None, weight=np.float32(0.1), table=[np.float64(1), 2])
    assert made == Theirs(width=4, weight=0.1, table=(1.0, 2)) and json.loads(json.dumps(made.settings()))["table"] == [
        1.0,
        2,
    ]
    for wrong in ({"width": None}, {"width": 2.5}, {"when": True}, {"weight": "much"}):
        with pytest.raises(TypeError, match=rf"{next(iter(wrong))}=.*: give a"):
            Theirs(**wrong)  # type: ignore[arg-type]


def test_check_schedule_alone() -> None:
    stages = check_schedule([(np.int64(3), np.float32(0.7)), [5, np.int64(2)]])
    assert stages == ((3, 0.7), (5, 2)) and json.dumps(stages) == "[[3, 0.7], [5, 2]]"
    for wrong in (((1.5, 0.5),), ((True, 0.5),), np.array([[3, 0.5]])):
        with pytest.raises(ValueError, match=r"layer .* must be an int >= 0"):
            check_schedule(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("duet", {"budget": np.int64(9)}),
        ("duet_plus", {"budget": np.float32(0.4), "alpha": np.float64(1.5), "tau": np.float32(0.5)}),
        ("duet", {"dominant": np.int64(5), "contextual": np.int32(2), "schedule": [[np.int64(3), np.float32(0.7)]]}),
        ("frames+duet", {"budget": np.float64(0.4), "duet_cluster_width": np.int64(3)}),
    ],
)
def test_reports_and_checkpoints_of_numpys_numbers(method: str, options: dict[str, Any]) -> None:
    """What is measured and remembered equals what plain numbers give."""
    model = build("llava")
    written = []
    for given in (options, {name: to_plain(value) for name, value in options.items()}):
        with duet_vlm.attach(model, method, **given) as handle, torch.no_grad():
            model(**FAMILIES["llava"].inputs([ONE]))
            duet_vlm.save_to_config(handle)
            report = json.loads(handle.report().to_json())
            written.append(
                (
                    {k: report[k] for k in ("settings", "budget", "measured_mean")},
                    json.loads(model.config.to_json_string())["duet_vlm"],
                )
            )
    assert written[0] == written[1]
