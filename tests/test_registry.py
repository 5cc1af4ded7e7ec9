"""Methods by name: registering, finding, and methods that live in other packages."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
from torch import Tensor

import duet_vlm
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.reducers import registry


@dataclass(frozen=True)
class Outside(duet_vlm.DecoderReducer):
    """A method of some other package."""

    paper = "-"
    summary = "keeps everything, elsewhere"

    def plan(self, tokens: int, depth: int, budget: object) -> SpanPlan:
        return SpanPlan(tokens, tokens, 0, (tokens,) * depth)

    def prune_tokens(self, view: duet_vlm.DecoderView) -> Tensor:
        return view.valid


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that has loaded nothing but knows the package's own methods."""
    monkeypatch.setattr(registry, "_methods", dict(duet_vlm.list_methods()))


def test_the_package_brings_its_methods() -> None:
    assert set(duet_vlm.list_methods()) >= {"duet", "visionzip", "pyramiddrop", "fastv", "random", "uniform", "none"}
    assert all(cls.name == name and cls.paper and cls.summary for name, cls in duet_vlm.list_methods().items())


def test_entry_points_of_other_packages(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("outside", f"{__name__}:Outside", registry.ENTRY_POINT_GROUP)
    broken = EntryPoint("broken", "no_such_package:Method", registry.ENTRY_POINT_GROUP)
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [point, broken])
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry, "_offered", functools.cache(registry._offered.__wrapped__))
    assert duet_vlm.get_method("outside").summary == Outside.summary  # and nothing else is imported
    assert duet_vlm.get_method("duet") and asked == [registry.ENTRY_POINT_GROUP]
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        duet_vlm.list_methods()


def test_a_name_belongs_to_one_class(fresh: None) -> None:
    with pytest.raises(ValueError, match="already registered by duet_vlm.methods.two_stage.duet.Duet"):
        duet_vlm.register("duet")(Outside)
    duet_vlm.register("mine")(Outside)
    assert duet_vlm.register("mine")(Outside) is Outside  # the same class again, as a reloaded module does


@pytest.mark.parametrize("name", ["Duet", "my method", "1st", ""])
def test_names_are_plain(name: str, fresh: None) -> None:
    with pytest.raises(ValueError, match="lower-case letters"):
        duet_vlm.register(name)(Outside)


def test_only_reducers_register(fresh: None) -> None:
    with pytest.raises(TypeError, match="is not a Reducer"):
        duet_vlm.register("thing")(dict)
