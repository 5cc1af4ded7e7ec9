"""The tables of docs/tiny-chain.md: how the model learned so far, and when it needs its picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from duet_vlm.evaluate.curve import curve_of
from duet_vlm.evaluate.report.markdown import table
from duet_vlm.evaluate.results import load

HOME = Path(__file__).resolve().parent.parent / "comparison" / "tiny-chain"
KINDS = ("attribute", "read_digit", "read_word", "existence", "compare", "spatial", "count", "hop1", "hop2", "hop3", "pair_compare", "pair_count")
LESSONS = ("cell", "paint", "twin", "there")


def learned() -> str:
    """Validation accuracy on whole pictures, as training went on: every other line."""
    lines = json.loads((HOME / "curve.json").read_text())["validation"]
    kinds = (*KINDS, *LESSONS, "all")
    rows = [[f"{line['step']:,}", f"{line['answers']:,}", *(f"{line[kind]:.2f}" if kind in line else "-" for kind in kinds)] for line in lines[2::3]]
    return table(["step", "answers", *kinds], rows)


def drops() -> str:
    """The drop curve by kind of question."""
    found = curve_of(load(HOME / "drop-curve.json"))
    assert found is not None
    head = ["no visual token from layer", *(str(point.layer) for point in found.points), "full model"]
    lines = [["all", *(f"{point.accuracy:.2f}" for point in found.points), f"{found.full:.2f}"]]
    lines += [[kind, *(f"{point.kinds[kind]:.2f}" for point in found.points), f"{full:.2f}"] for kind, full in found.kinds.items()]
    return table(head, lines)


def moves() -> str:
    """Chains by their moves."""
    found = json.loads((HOME / "moves.json").read_text())["accuracy"]
    chains = {name: row for name, row in found.items() if name.startswith("hop")}
    return table(["chain", "accuracy", "questions"], [[name, f"{row['accuracy']:.2f}", f"{row['questions']}"] for name, row in chains.items()])


BLOCKS: dict[str, Callable[[], str]] = {"chain_learned": learned, "chain_drops": drops, "chain_moves": moves}
