"""The cells of the default tier: every pair of values of two dimensions is in it, and always the same cells are."""

from __future__ import annotations

import ast
import itertools

import pytest
from families import FAMILIES
from method_matrix import (
    OTHERS,
    REDUCING,
    USUAL,
    asked_parts,
    covered_pairs,
    covering,
    dealt_parts,
    design,
    dimensions,
    num_parts,
    tier_families,
)
from mutants import MUTANTS, ROOT, Mutant

PAIRS = list(itertools.combinations(dimensions(), 2))


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_every_pair_is_covered(one: str, two: str) -> None:
    wanted, found = covered_pairs(one, two)
    assert found == wanted


def test_every_part_is_dealt_once() -> None:
    """One that no test runs would leave its pairs of family and method out; with more parts than families some of a
    test's cells would be missing."""
    dealt = [number for numbers in dealt_parts().values() for number in numbers]
    assert dealt == list(range(num_parts())) and 20 <= num_parts() <= len(FAMILIES)


def test_parts_are_read_from_the_decorators_of_tests() -> None:
    text = "@matrix(parts=1)\ndef test_a(): ...\n@pairs(ROWS, parts=2)\ndef test_b(): ...\n@matrix('duet')\ndef test_c(): ...\ndef test_d(parts=3): ..."
    assert asked_parts(ast.parse(text)) == {"test_a": 1, "test_b": 2}


def test_a_part_has_every_family_and_every_method_and_little_more() -> None:
    for part in range(num_parts()):
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


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.file)
def test_a_mutant_is_one_place_of_the_source(mutant: Mutant) -> None:
    """``make mutants`` takes half an hour and is in no tier; here at least what it changes is there."""
    assert (ROOT / "src/duet_vlm" / mutant.file).read_text().count(mutant.old) == 1
    assert all((ROOT / path).exists() for path in mutant.tests.split())
