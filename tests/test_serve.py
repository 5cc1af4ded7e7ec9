"""What a server is told and what it counts, without any server: settings, counts, rows. The engine itself is tested under plugins/vllm."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import duet_vlm
from duet_vlm.flow.choose import sizes_of
from duet_vlm.serve.rows import reduced
from duet_vlm.serve.settings import ARCHITECTURES, NOTHING_ASKED, Served

BEYOND = {"cdpruner", "hired", "vscan", "zoo_prune"}  # read more of tower or prompt than the plug-in makes
FIRST_STAGES = sorted(
    name
    for name, cls in duet_vlm.methods().items()
    if issubclass(cls, duet_vlm.EncoderReducer) and not issubclass(cls, duet_vlm.TowerReducer) and name not in BEYOND
)


# ---- settings


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("duet", "give a dictionary"),
        ({"method": "duett", "budget": 9}, "did you mean 'duet'"),
        ({"method": "fastv", "budget": 9}, "fastv: it drops inside the decoder"),
        ({"method": "visionzip+pyramiddrop", "budget": 9}, "pyramiddrop: it drops inside"),
        ({"method": "contrast", "budget": 9}, "contrast: it works inside the vision tower"),
        ({"method": "none"}, "none: it reduces nothing"),
        ({"method": "duet_plus"}, "needs a budget"),
        ({"budget": 0}, "at least 1"),
        ({"budget": 1.5}, "a float is a fraction"),
        ({"budget": "64"}, "must be an int"),
        ({"method": "duet", "budget": 64, "dominant": 5}, "either budget= or the method's own"),
        ({"method": "visionzip", "domnant": 5}, "did you mean 'dominant'"),
        ({"method": "duet", "dominant": 5, "schedule": [[4, 0.5]]}, "schedule: a setting of what is dropped inside"),
        ({"method": "frames+duet_plus", "budget": 9, "duet_plus_schedule": [[4, 0.5]]}, "duet_plus_schedule: a setting of what"),
        ({"method": "duet_plus", "budget": 9, "text_query": "last"}, "text_query: a setting of what"),
        ({"method": "duet_plus", "budget": 9, "positions": "keep"}, "'compact' positions"),
        ({"method": "visionzip", "dominant": 9, "cls_token": True}, "leave it out"),
        ({"method": "divprune", "keep": 0}, "leave none of an image's 1024"),
    ],
)
def test_settings_that_no_server_can_run_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        Served.of(given, "compact")


@pytest.mark.parametrize("name", sorted(BEYOND & set(duet_vlm.methods())))
def test_a_method_that_reads_more_than_the_plug_in_makes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: it reads .*choose another"):
        Served.of({"method": name, "budget": 64}, "compact")


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_every_method_with_a_first_stage_is_served_at_its_budget(name: str) -> None:
    served = Served.of({"method": name, "budget": 64}, "compact")
    for tokens in (1, 63, 64, 65, 576, 2880):
        assert served.span((tokens,)).entry == min(tokens, 64)
        assert served.span((tokens,), asked=served.asked({"duet_budget": 5})).entry == min(tokens, 5)
        assert served.span((tokens,), asked=served.asked({"duet_budget": 0.01})).entry == max(1, tokens // 100)
    assert served.span((576,) * 3, 48).entry == 64
    assert served.span((10,) * 3, 48).entry == 30  # newlines leave first


def test_a_request_may_ask_for_less_and_is_told_when_it_asks_for_more() -> None:
    served = Served.of({"method": "divprune", "budget": 64}, "compact")
    assert served.asked({}) == served.asked({"duet_budget": None}) == NOTHING_ASKED
    one, whole = served.asked({"duet_budget": 1}), served.asked({"duet_budget": 1.0})  # a token, and all tokens
    assert served.span((576,), asked=one).entry == 1 and served.span((60,), asked=whole).entry == 60
    with pytest.raises(ValueError, match="duet_budget=1.0: 576 of 576 visual tokens, but this server allows 64 at most"):
        served.span((576,), asked=whole)
    for bad in (0, -3, 1.5, "64", True, [64]):
        with pytest.raises(ValueError, match="duet_budget="):
            served.asked({"duet_budget": bad})
    with pytest.raises(ValueError, match="has counts of its own"):
        Served.of({"method": "duet", "dominant": 54, "contextual": 10}, "compact").asked({"duet_budget": 4})


def test_other_settings_are_another_salt() -> None:
    given: list[dict[str, Any]] = [{"budget": 64}, {"budget": 65}, {"method": "duet_plus", "budget": 64}, {"budget": 64, "cluster_width": 5}]
    assert len({Served.of(each, "compact").salt for each in given} | {Served.of(given[0], "keep").salt}) == 5
    assert Served.of(given[0], "compact").salt == Served.of(dict(given[0]), "compact").salt


def test_the_plug_in_has_a_model_for_each_architecture_that_the_command_line_offers() -> None:
    sources = Path(__file__).parent.parent / "plugins" / "vllm" / "src" / "duet_vlm_vllm"
    (places,) = [
        ast.literal_eval(node.value)
        for node in ast.parse((sources / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES"
    ]
    assert set(places) == set(ARCHITECTURES)
    for place in places.values():
        file, name = place.split(":")
        assert f"class {name}(" in (sources / f"{file}.py").read_text()


# ---- rows


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_span_in_a_batch_becomes_what_it_becomes_alone(name: str) -> None:
    torch.manual_seed(0)
    served = Served.of({"method": name, "budget": 9}, "keep")
    rows = [torch.randn(n, 8) for n in (16, 25, 9, 4)]
    parts = [torch.zeros(16).long(), torch.tensor([0] * 12 + [-1] + [1] * 12), torch.zeros(9).long(), torch.zeros(4).long()]
    signals = [torch.rand(len(row)) for row in rows], [torch.randn(len(row), 6) for row in rows]
    asked = [NOTHING_ASKED, NOTHING_ASKED, 6.0, NOTHING_ASKED]  # the third asks for five
    together = reduced(served, rows, parts, asked, signals)
    for i, (kept, source) in enumerate(together):
        ((alone, place),) = reduced(served, rows[i : i + 1], parts[i : i + 1], asked[i : i + 1], ([signals[0][i]], [signals[1][i]]))
        assert torch.equal(source, place) and torch.allclose(kept, alone, atol=1e-6)
        assert len(kept) == [9, 9, 5, 4][i] == served.span(*sizes_of(parts[i]), asked[i]).entry
        assert source.tolist() == sorted(set(source.tolist())) and not (parts[i][source] < 0).any()
    assert torch.equal(together[3][0], rows[3])  # smaller than the budget: whole


def test_a_method_without_its_signals_is_an_error() -> None:
    served = Served.of({"budget": 4}, "compact")
    with pytest.raises(RuntimeError, match="duet ranks by the attention of the vision tower"):
        reduced(served, [torch.randn(9, 4)], [torch.zeros(9).long()], [NOTHING_ASKED], None)
