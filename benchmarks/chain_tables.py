"""The tables of docs/tiny-chain.md: how the model learned so far, and when it needs its picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from comparison_tables import curve

from duet_vlm.evaluate.report.markdown import table

HOME = Path(__file__).resolve().parent.parent / "comparison" / "tiny-chain"
KINDS = ("attribute", "read_digit", "read_word", "existence", "compare", "spatial", "count", "hop1", "hop2", "hop3", "pair_compare", "pair_count")
LESSONS = ("cell", "paint", "twin", "there")


def learned() -> str:
    """Validation accuracy on whole pictures, as training went on: every other line."""
    lines = json.loads((HOME / "curve.json").read_text())["validation"]
    kinds = (*KINDS, *LESSONS, "all")
    rows = [[f"{line['step']:,}", f"{line['answers']:,}", *(f"{line[kind]:.2f}" if kind in line else "-" for kind in kinds)] for line in lines[2::3]]
    return table(["step", "answers", *kinds], rows)


def moves() -> str:
    """Chains by their moves."""
    found = json.loads((HOME / "moves.json").read_text())["accuracy"]
    chains = {name: row for name, row in found.items() if name.startswith("hop")}
    return table(["chain", "accuracy", "questions"], [[name, f"{row['accuracy']:.2f}", f"{row['questions']}"] for name, row in chains.items()])


BLOCKS: dict[str, Callable[[], str]] = {"chain_learned": learned, "chain_drops": lambda: curve("tiny-chain/drop-curve.json"), "chain_moves": moves}
