"""The matrix: which methods with which settings are tried on which families. One line here gives a new one every invariant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from families import FAMILIES, build, shared
from torch import nn

import duet_vlm
from duet_vlm.methods.apet import ApET
from duet_vlm.methods.cdpruner import CDPruner
from duet_vlm.methods.divprune import DivPrune
from duet_vlm.methods.duet import Duet
from duet_vlm.methods.evs import EVS
from duet_vlm.methods.fastervlm import FasterVLM
from duet_vlm.methods.fastv import FastV
from duet_vlm.methods.fastvid import FastVID
from duet_vlm.methods.hired import HiRED
from duet_vlm.methods.holitom import HoliTom
from duet_vlm.methods.holov import HoloV
from duet_vlm.methods.prumerge import PruMerge
from duet_vlm.methods.prumerge_plus import PruMergePlus
from duet_vlm.methods.prunesid import PruneSID
from duet_vlm.methods.prunevid import PruneVid
from duet_vlm.methods.pyramiddrop import PyramidDrop
from duet_vlm.methods.sparsevlm import SparseVLM
from duet_vlm.methods.tome import ToMe
from duet_vlm.methods.vidcom2 import VidCom2
from duet_vlm.methods.visionzip import VisionZip
from duet_vlm.methods.vispruner import VisPruner
from duet_vlm.methods.vqtoken import VQToken
from duet_vlm.methods.vscan import VScan

# reducing settings that bite at every stage of an 8-layer decoder, whatever the image size
REDUCING: dict[str, dict[str, Any]] = {
    "d2pruner": {"schedule": ((3, 0.4),), "semantic": 0.5},
    "cdpruner": {"keep": 0.4},
    "adsc": {"schedule": ((2, 0.5), (4, 0.25), (6, 0.1))},
    "apet": {"keep": 0.5, "schedule": ((4, 0.2),), "basis": 3},
    "custom": {"keep": 0.5, "selector": "nms", "alike": 0.5, "merger": "local", "compare": "keys", "schedule": ((3, 0.6), (5, 0.25), (7, 0.0))},
    "dart": {"schedule": ((3, 0.4),), "visual_pivots": 2, "text_pivots": 2},
    "divprune": {"keep": 0.4},
    "duet": {"dominant": 0.4, "contextual": 0.2, "schedule": ((3, 0.6), (5, 0.25), (7, 0.0))},
    "duet_plus": {"keep": 0.5, "pool": 0.6, "tau": -1.0, "schedule": ((3, 0.6), (5, 0.25), (7, 0.0))},
    "dycoke": {"keep": 0.4},
    "evs": {"keep": 0.4},
    "fastervlm": {"keep": 0.4},
    "fastv": {"layers": 2, "keep": 0.4},
    "fitprune": {"schedule": ((2, 0.8), (3, 0.6), (5, 0.4), (7, 0.2))},
    "fastvid": {"keep": 0.4},
    "frames": {"keep": 0.4},
    "frames+visionzip+pyramiddrop": {
        "frames_keep": 0.7,
        "visionzip_dominant": 0.4,
        "visionzip_contextual": 0.2,
        "pyramiddrop_schedule": ((2, 0.5), (4, 0.25), (6, 0.1)),
    },
    "hired": {"keep": 0.4},
    "holitom": {"keep": 0.6, "schedule": ((4, 0.5),)},
    "holov": {"keep": 0.4, "num_crops": 3},
    "metok": {"keep": 0.6, "schedule": ((3, 0.6), (5, 0.25), (7, 0.1)), "trim_kv_cache": False},
    "pio": {"schedule": ((2, 0.6), (4, 0.3), (6, 0.1))},
    "pool": {"keep": 0.4},
    "prumerge": {"keep": 0.3, "neighbours": 3},
    "prumerge_plus": {"keep": 0.3, "neighbours": 3},
    "prunesid": {"keep": 0.6},
    "prunevid": {"keep": 0.6, "schedule": ((4, 0.4),), "trim_kv_cache": False},
    "pyramiddrop": {"schedule": ((2, 0.5), (4, 0.25), (6, 0.1))},
    "quecc": {"keep": 0.4, "kernel": 2},
    "random": {"entry": 0.6, "schedule": ((4, 0.3),)},
    "resampler": {"keep": 0.4},
    "scope": {"keep": 0.4},
    "sieve": {"schedule": ((2, 0.5), (4, 0.25), (6, 0.1)), "heads": 2},
    "sparsevlm": {"schedule": ((2, 0.6), (3, 0.5), (5, 0.3))},
    "stateful": {"power": 0.7, "end": 0.1},
    "tokencarve": {"schedule": ((3, 0.4),), "trim_kv_cache": False},
    "tome": {"keep": 0.4},
    "uniform": {"entry": 0.6, "schedule": ((4, 0.3),)},
    "vidcom2": {"keep": 0.4},
    "visionzip": {"dominant": 0.3, "contextual": 0.2},
    "vqtoken": {"keep": 0.4},
    "v2drop": {"schedule": ((2, 0.6), (4, 0.3), (6, 0.1))},
    "vispruner": {"keep": 0.4, "important": 0.4},
    "vscan": {"keep": 0.5, "window": 2, "schedule": ((4, 0.5),)},
    "zoo_prune": {"keep": 0.4, "directions": 3},
}

# methods whose usual drops come before the first attention of some families: a clear error
TOO_EARLY = {name: ("qwen3_5", "qwen3_5_moe") for name in ("dart", "fitprune", "sparsevlm")}


def _by_text(name: str) -> bool:
    """Whether a method's drops keep the largest attention from text, and nothing else matters."""
    second = duet_vlm.list_methods()[name.rpartition("+")[2]]
    return issubclass(second, duet_vlm.DecoderReducer) and second.uses_text and not second.needs


BY_TEXT = tuple(filter(_by_text, REDUCING))

# settings that keep every token, in as many ways as there are
KEEP_ALL: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("apet", {"budget": 1.0}),
    ("apet", {"keep": 1.0, "schedule": ()}),
    ("custom", {"keep": 1.0, "selector": "coverage", "merger": "weighted"}),
    ("custom", {"budget": 1.0, "merger": "peaks", "schedule": "tapered"}),
    ("divprune", {"keep": 1.0}),
    ("divprune", {"budget": 1.0}),
    ("duet", {"dominant": 1.0, "contextual": 0, "schedule": ()}),
    ("duet", {"schedule": ((3, 1.0), (5, 1.0))}),
    ("duet", {"budget": 1.0}),
    ("duet", {"budget": 100_000}),
    ("duet_plus", {"keep": 1.0, "schedule": ()}),
    ("duet_plus", {"budget": 1.0}),
    ("dycoke", {"keep": 1.0}),
    ("evs", {"budget": 1.0}),
    ("fastervlm", {"keep": 1.0}),
    ("fastv", {"keep": 1.0}),
    ("fastv", {"budget": 1.0}),
    ("fastvid", {"keep": 1.0}),
    ("frames", {"keep": 1.0}),
    ("frames", {"budget": 1.0}),
    ("frames+visionzip+pyramiddrop", {"budget": 1.0}),
    ("frames+duet", {"budget": 100_000}),
    ("holitom", {"budget": 1.0}),
    ("holitom", {"schedule": ((4, 1.0),)}),
    ("metok", {"keep": 1.0}),
    ("metok", {"budget": 100_000}),
    ("prumerge", {"keep": 1.0}),
    ("prumerge_plus", {"budget": 100_000}),
    ("prunevid", {"keep": 1.0}),
    ("prunevid", {"keep": 1.0, "schedule": ((4, 1.0),)}),
    ("pyramiddrop", {"schedule": ((2, 1.0), (4, 1.0))}),
    ("random", {"entry": 1.0}),
    ("scope", {"keep": 1.0}),
    ("scope", {"budget": 100_000}),
    ("stateful", {"budget": 1.0}),
    ("stateful", {"end": 1.0, "power": 2.0}),
    ("tome", {"keep": 1.0}),
    ("uniform", {"budget": 1.0}),
    ("vidcom2", {"budget": 100_000}),
    ("visionzip", {"dominant": 1.0}),
    ("cdpruner", {"keep": 1.0}),
    ("hired", {"budget": 1.0}),
    ("holov", {"keep": 1.0}),
    ("prunesid", {"budget": 100_000}),
    ("vscan", {"budget": 1.0}),
    ("vscan", {"schedule": ((4, 1.0),)}),
    ("zoo_prune", {"keep": 1.0}),
    ("vispruner", {"budget": 1.0}),
    ("vispruner", {"keep": 1.0, "important": 0.0}),
    ("pool", {"keep": 1.0}),
    ("quecc", {"budget": 1.0}),
    ("resampler", {"budget": 100_000}),
    ("vqtoken", {"keep": 1.0}),
]

# presets with the released code's quirks: CLS row as a token, compact order, sums instead of means
OFFICIAL: dict[str, duet_vlm.Reducer] = {
    "duet": Duet.official_llava(9, 3, 2, schedule=((3, 0.6), (5, 0.25))),
    "visionzip": VisionZip.official(8, 3),
    "pyramiddrop": PyramidDrop.official(schedule=((2, 0.5), (4, 0.25))),
    "divprune": DivPrune.official(0.4),
    "fastv": FastV.official("lmms"),
    "fastervlm": FasterVLM.official(9),
    "hired": HiRED.official(0.4),
    "holov": HoloV.official(9),
    "prunesid": PruneSID.official(9),
    "vscan": VScan.official(9, ((4, 5),), shallow=1, window=2, local="limit"),
    "cdpruner": CDPruner.official(9, relevance="decoder"),
    "vispruner": VisPruner.official(9, 0.4),
    "prumerge": PruMerge.official(4, neighbours=3),
    "prumerge_plus": PruMergePlus.official(0.25, neighbours=3),
    "sparsevlm": SparseVLM.official(version="2.0", schedule=((2, 8), (3, 3))),
    "tome": ToMe.official(6),
    "evs": EVS.official(0.6),
    "fastvid": FastVID.official(0.4),
    "holitom": HoliTom.official(0.6, ((4, 0.5),)),
    "prunevid": PruneVid.official(0.6, ((4, 0.4),), trim_kv_cache=False),
    "vidcom2": VidCom2.official(0.4),
    "apet": ApET.official(9, 5, 4, basis=3),
    "vqtoken": VQToken.official(9),
}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    family: str
    attention: str
    method: str
    positions: str

    def __str__(self) -> str:
        return f"{self.family}-{self.attention}-{self.method}-{self.positions}"

    def model(self) -> nn.Module:
        return shared(self.family, self.attention)

    def fresh(self) -> nn.Module:
        return build(self.family, self.attention)

    def attach(self, model: nn.Module | None = None, **changes: Any) -> duet_vlm.Handle:
        settings = REDUCING[self.method] | {"positions": self.positions} | changes
        return duet_vlm.attach(self.model() if model is None else model, self.method, **settings)


def matrix(*methods: str, attention: tuple[str, ...] = ("sdpa", "eager")) -> pytest.MarkDecorator:
    """The cells of the given methods (default: all): Duet and FastV on every family, the others on two; "compact" wherever it can be.

    conftest.py says which cells of the further families are in the default tier.
    """
    cases = [
        pytest.param(Case(family, implementation, method, positions), id=f"{family}-{implementation}-{method}-{positions}")
        for family in FAMILIES
        for implementation in attention
        for method in methods or tuple(REDUCING)
        if family in ("llava", "qwen2_5_vl") or method in ("duet", "fastv")
        for positions in (("keep",) if FAMILIES[family].mrope else ("keep", "compact"))
    ]
    return pytest.mark.parametrize("case", cases)
