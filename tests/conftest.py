"""Shared by all tests: one thread (the suite runs in parallel processes), the helper modules of this folder, no network."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import duet_vlm

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
gc.disable()  # until all tests are collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir", type=Path, default=Path(__file__).parent / "golden", help="folder of recorded cases for test_golden.py"
    )


@pytest.fixture(autouse=True)
def shared_models_come_back_plain() -> Iterator[None]:
    """Whoever leaves a reducer on one is told, and not the tests behind it."""
    yield
    families = sys.modules.get("families")
    lent = families.LENT if families else {}
    left = [name for name, model in lent.items() if duet_vlm.handle_of(model) is not None]
    for name in left:
        duet_vlm.detach(lent[name])
    lent.clear()
    assert not left, f"still attached: {left}"


USUAL = ("llava", "llava_gqa", "qwen2_5_vl")  # families whose every test is in the default tier
EVERY = (  # tests that the default tier runs on the other families, too: one cell per method
    "test_keeping_every_token_is_bit_equal",
    "test_padded_row_equals_row_alone",
    "test_greedy_equals_oracle",
    "test_forward_equals_oracle",
    "test_beam_search_equals_oracle",
    "test_survivors_are_those_with_the_largest_scores",
    "test_token_map_accounts_for_every_visual_token",
    "test_cache_and_report_match_the_schedule",
    "test_measured_mean_is_the_solved_budget",
    "test_detach_leaves_no_trace",
    "test_projections_equal_the_layers_own",
    "test_importance_equals_the_towers_attention",
    "test_every_part_keeps_its_own_best_rows",
    "test_generation_equals_the_oracle",
    "test_every_method_passes_wherever_it_runs",
    "test_every_tensor_names_its_device",
    "test_a_default_device_changes_nothing",
)
# methods that the default tier runs under eager attention and with renumbered positions, too: one of each shape
SHAPES = ("none", "duet", "duet_plus", "fastv", "frames+visionzip+pyramiddrop", "prumerge", "tokencarve", "visionzip")
CELLS = ("none", "duet", "fastv")  # and the methods that it runs on them
BEHIND = (  # tests of what comes behind the prompt: of methods that stay out of the decoder, too, one of each shape tells it all
    "test_beam_search_equals_oracle",
    "test_sampling_equals_oracle",
    "test_paused_is_bit_equal_and_resumes",
    "test_order_of_the_batch_does_not_matter",
)


@functools.cache
def only_in_front(method: str) -> bool:
    """Whether a method has nothing to do inside the decoder."""
    cls = duet_vlm.list_methods().get(method.rpartition("+")[2])
    return cls is not None and not issubclass(cls, duet_vlm.DecoderReducer)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are tests of further families but for the cells named above (sdpa, kept positions, left padding); of the usual ones those of
    methods whose shape another one has, but for that cell, and where the decoder alone is asked (on llava_gqa, which is llava but for that, and
    ``BEHIND`` the prompt) those that stay out of it."""
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        case = values.get("case")
        family = getattr(case, "family", values.get("family"))
        if family is None:
            continue
        attention, positions, method, side = cell = [getattr(case, name, values.get(name)) for name in ("attention", "positions", "method", "side")]
        if family in USUAL:
            other = attention not in ("sdpa", None) or positions not in ("keep", None)
            here = family == "llava_gqa" or getattr(item, "originalname", "") in BEHIND
            if method is not None and method not in SHAPES and (other or (here and only_in_front(str(method)))):
                item.add_marker(pytest.mark.slow)
            continue
        usual = (("sdpa", None), ("keep", None), (*CELLS, None), ("left", None))
        ordinary = all(value in allowed for value, allowed in zip(cell, usual, strict=True))
        if getattr(item, "originalname", "") not in EVERY or not ordinary:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Modules and tens of thousands of tests stay to the end: without this a tenth of the time goes into looking through them for garbage."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process what a launcher starts."""

    def become(rank: int, world: int) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process dies when it would record its second batch, in the middle of the line; as long as the list is not empty."""
    from duet_vlm.evaluation.journal import Journal

    real, alive, times = Journal.add, [1], []

    def add(self: Any, batch: str, page: dict[str, Any]) -> None:
        times.append(1)
        if alive and len(times) == 2:
            with self.path.open("a") as file:
                file.write('{"batch": "')
            raise KeyboardInterrupt
        real(self, batch, page)

    monkeypatch.setattr(Journal, "add", add)
    yield alive
