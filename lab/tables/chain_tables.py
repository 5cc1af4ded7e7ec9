"""Tables of lab/NOTEBOOK.md: how the embedded model learned, and whether it is fit to compare methods on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from folders import COMPARISON

from duet_vlm.evaluation.report.markdown import table
from duet_vlm_lab.tasks import chain

HOME = COMPARISON / "tiny-chain"
KINDS = (
    "attribute", "read_digit", "read_word", "existence", "compare", "spatial", "count", "hop1", "hop2", "hop3", "pair_compare", "pair_count",
)  # fmt: skip
LINES = 14  # of the learning curve, about


def accepted() -> dict[str, Any]:
    return json.loads((HOME / "acceptance.json").read_text())


def acceptance() -> str:
    """The conditions."""
    found = accepted()["conditions"]
    rows = [
        [name, f"{row['found']:.3f}", f"{row['at_least']}", "yes" if row["holds"] else "**no**"]
        for name, row in found.items()
    ]
    return table(["", "found", "at least", "holds"], rows)


def by_kind() -> str:
    """Accuracy of the full model, without visual tokens from a layer on, and of the references."""
    found = accepted()["accuracy"]
    kinds = [kind for kind in ("all", *KINDS) if kind in next(iter(found.values()))]
    return table(["accuracy", *kinds], [[name, *(f"{row[kind]:.2f}" for kind in kinds)] for name, row in found.items()])


def learned() -> str:
    """Validation accuracy on whole pictures, as training went on."""
    log = json.loads((chain.path() / "training_log.json").read_text())["curve"]
    lines = [log[round(i * (len(log) - 1) / (LINES - 1))] for i in range(LINES)]
    kinds = [kind for kind in KINDS if f"val_{kind}" in log[-1]]
    rows = [
        [f"{line['step']:,}", f"{line['answers']:,}", *(f"{line[f'val_{kind}']:.2f}" for kind in kinds)]
        for line in lines
    ]
    return table(["step", "answers", *kinds], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "chain_acceptance": acceptance,
    "chain_kinds": by_kind,
    "chain_learned": learned,
}
