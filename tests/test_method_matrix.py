"""The cells of the default tier: every pair of values of two dimensions is in it, and always the same cells are."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from families import FAMILIES
from method_matrix import OTHERS, PARTS, REDUCING, USUAL, allowed, covering, design, dimensions, tier_families

PAIRS = list(itertools.combinations(dimensions(), 2))


def possible(one: str, a: object, two: str, b: object) -> bool:
    """Whether two values of two dimensions may be together."""
    values = {one: a, two: b}
    return "family" not in values or allowed(values["family"], values.get("method", ""), values.get("positions", "keep"))


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_every_pair_is_covered(one: str, two: str, record_property: pytest.RecordProperty) -> None:
    wanted = {(a, b) for a, b in itertools.product(dimensions()[one], dimensions()[two]) if possible(one, a, two, b)}
    found = {(getattr(cell, one), getattr(cell, two)) for cell in design()}
    record_property(f"{one} x {two}", f"{len(found & wanted)} of {len(wanted)}")
    print(f"{one} x {two}: {len(found & wanted)} of {len(wanted)} pairs")
    assert found == wanted


def test_every_part_is_run_by_one_test() -> None:
    """A part that no test runs would leave its pairs of family and method out; one that two run would be a mistake."""
    calls = [re.findall(r"^@(?:matrix|pairs)\(.*?part=(\d+|\([\d, ]+\))", path.read_text(), re.M) for path in Path(__file__).parent.glob("test_*.py")]
    parts = [int(number) for found in calls for call in found for number in re.findall(r"\d+", call)]
    assert sorted(parts) == list(range(PARTS))


def test_a_part_has_every_family_and_every_method_and_little_more() -> None:
    for part in range(PARTS):
        cells = [cell for cell in design() if cell.part == part]
        assert {cell.family for cell in cells} == set(FAMILIES) and {cell.method for cell in cells} == set(REDUCING)
        assert len(cells) <= len(REDUCING) + 2


def test_a_new_method_moves_no_cell() -> None:
    assert next(iter(dimensions()["method"])) == next(reversed(REDUCING))
    assert design() == design.__wrapped__()


def test_small_products_are_covered_by_few_rows() -> None:
    factors = {"family": ["a", "b", "c"], "method": ["x", "y"], "attention": ["s", "e"], "other": list(range(OTHERS))}
    rows = covering(factors)
    assert rows == covering(factors) and len(rows) <= 14
    for one, two in itertools.combinations(factors, 2):
        assert {(row[one], row[two]) for row in rows} == set(itertools.product(factors[one], factors[two]))


def test_a_test_of_families_runs_on_the_usual_ones_and_a_further_one() -> None:
    chosen = [tier_families(FAMILIES, f"test_{number}") for number in range(200)]
    assert all(len(families) == 3 and set(USUAL) < set(families) for families in chosen)
    assert {family for families in chosen for family in families} == set(FAMILIES)
    assert tier_families(["llava_next", "internvl"], "test") in (["llava_next"], ["internvl"])
