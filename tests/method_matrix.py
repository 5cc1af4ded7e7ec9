"""The matrix: methods with their settings, families, attention, positions; and the cells of it that the default tier
runs.

One line in ``REDUCING`` gives a new method every invariant. ``make test-all`` runs the products. The default tier runs
a covering design: any two values of two dimensions meet in some test. The tests themselves are one of the dimensions
(``part``), so that each runs every family and every method once, and all of them together every family with every
method. A test says how many ``parts`` it takes; which ones is dealt in the order of files and lines.
"""

from __future__ import annotations

import ast
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from families import FAMILIES, build, shared
from torch import nn

import duet_vlm
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.decoder.sparsevlm import SparseVLM
from duet_vlm.methods.encoder.cdpruner import CDPruner
from duet_vlm.methods.encoder.divprune import DivPrune
from duet_vlm.methods.encoder.fastervlm import FasterVLM
from duet_vlm.methods.encoder.hired import HiRED
from duet_vlm.methods.encoder.holov import HoloV
from duet_vlm.methods.encoder.prumerge import PruMerge
from duet_vlm.methods.encoder.prumerge_plus import PruMergePlus
from duet_vlm.methods.encoder.prunesid import PruneSID
from duet_vlm.methods.encoder.tome import ToMe
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.encoder.vispruner import VisPruner
from duet_vlm.methods.trained.vqtoken import VQToken
from duet_vlm.methods.two_stage.apet import ApET
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.methods.two_stage.vscan import VScan
from duet_vlm.methods.video.evs import EVS
from duet_vlm.methods.video.fastvid import FastVID
from duet_vlm.methods.video.holitom import HoliTom
from duet_vlm.methods.video.prunevid import PruneVid
from duet_vlm.methods.video.vidcom2 import VidCom2
from duet_vlm.reducers.inputs import DECODER_INPUTS
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.utils.field_types import merged

# reducing settings that bite at every stage of an 8-layer decoder, whatever the image size
REDUCING: dict[str, dict[str, Any]] = {
    "d2pruner": {"schedule": ((3, 0.4),), "semantic": 0.5},
    "cdpruner": {"keep": 0.4},
    "alvts": {"keep": 0.4},
    "adsc": {"schedule": ((2, 0.5), (4, 0.25), (6, 0.1))},
    "apet": {"keep": 0.5, "schedule": ((4, 0.2),), "basis": 3},
    "custom": {
        "keep": 0.5,
        "selector": "nms",
        "alike": 0.5,
        "merger": "local",
        "compare": "keys",
        "schedule": ((3, 0.6), (5, 0.25), (7, 0.0)),
    },
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
    "metok": {"keep": 0.6, "schedule": ((3, 0.6), (5, 0.25), (7, 0.1)), "options": {"trim_kv_cache": False}},
    "pio": {"schedule": ((2, 0.6), (4, 0.3), (6, 0.1))},
    "pool": {"keep": 0.4},
    "prumerge": {"keep": 0.3, "neighbours": 3},
    "prumerge_plus": {"keep": 0.3, "neighbours": 3},
    "prunesid": {"keep": 0.6},
    "prunevid": {"keep": 0.6, "schedule": ((4, 0.4),), "options": {"trim_kv_cache": False}},
    "pyramiddrop": {"schedule": ((2, 0.5), (4, 0.25), (6, 0.1))},
    "quecc": {"keep": 0.4, "kernel": 2},
    "random": {"entry": 0.6, "schedule": ((4, 0.3),)},
    "resampler": {"keep": 0.4},
    "scope": {"keep": 0.4},
    "sieve": {"schedule": ((2, 0.5), (4, 0.25), (6, 0.1)), "heads": 2},
    "sparsevlm": {"schedule": ((2, 0.6), (3, 0.5), (5, 0.3))},
    "stateful": {"power": 0.7, "end": 0.1},
    "tokencarve": {"schedule": ((3, 0.4),), "options": {"trim_kv_cache": False}},
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
TOO_EARLY = {name: ("qwen3_5", "qwen3_5_moe") for name in ("alvts", "dart", "fitprune", "sparsevlm")}
# methods that plan crop by crop, so that ``Handle.plan`` of all tokens of a picture is another plan
PLANNED_BY_CROP = {name: ("llava_next", "llava_next_video", "llava_onevision") for name in ("pool", "quecc")}
# methods whose choice rests on rounding in some families: a gradient through a linear layer; a linear projector, which
# moves all rows equally far
ROUNDING = {"pio": ("qwen3_5", "qwen3_5_moe"), "zoo_prune": ("paligemma",)}


def _by_text(name: str) -> bool:
    """Whether a method's drops keep the largest attention from text, and nothing else matters."""
    second = duet_vlm.list_methods()[name.rpartition("+")[2]]
    return issubclass(second, duet_vlm.DecoderReducer) and second().requires & DECODER_INPUTS == {duet_vlm.Input.SCORES}


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
    "prunevid": PruneVid.official(0.6, ((4, 0.4),), options=TokenOptions(trim_kv_cache=False)),
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
        settings = merged(merged(REDUCING[self.method], {"options": {"positions": self.positions}}), changes)
        return duet_vlm.attach(self.model() if model is None else model, self.method, **settings)


# ---- cells of the default tier

# families of every test: 1-D positions behind a CLIP tower, 3-D positions behind a packed one
USUAL = ("llava", "qwen2_5_vl")
ATTENTION = ("sdpa", "eager")
POSITIONS = ("keep", "compact")
OTHERS = 4  # combinations of what else a test may vary
Test = TypeVar("Test", bound=Callable[..., Any])


class Cell(NamedTuple):
    """A row of the covering design; ``other`` numbers the combinations of what else a test varies."""

    part: int
    family: str
    method: str
    attention: str
    positions: str
    other: int


def allowed(family: str, method: str = "", positions: str = "keep") -> bool:
    """Whether a combination can be tried: 3-D positions are never compact, ``TOO_EARLY`` and ``PLANNED_BY_CROP`` have
    tests of their own, and of ``ROUNDING`` nothing can be said."""
    without = [name for known in (TOO_EARLY, PLANNED_BY_CROP, ROUNDING) for name in known.get(method, ())]
    return not (positions == "compact" and FAMILIES[family].mrope) and family not in without


def asked_parts(tree: ast.Module) -> dict[str, int]:
    """The number of ``parts`` by name of the test, of the tests in a module that ask for some."""
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    calls = [(test.name, call) for test in tests for call in test.decorator_list if isinstance(call, ast.Call)]
    ours = [
        (name, call) for name, call in calls if isinstance(call.func, ast.Name) and call.func.id in ("matrix", "pairs")
    ]
    return {name: ast.literal_eval(word.value) for name, call in ours for word in call.keywords if word.arg == "parts"}


@functools.cache
def dealt_parts() -> dict[str, range]:
    """The parts of each test that asks for some; read from the files, so that it does not depend on which of them are
    run."""
    dealt: dict[str, range] = {}
    for path in sorted(Path(__file__).parent.glob("**/test_*.py")):
        text = path.read_text()
        for name, number in asked_parts(ast.parse(text)).items() if "parts=" in text else ():
            begin = sum(map(len, dealt.values()))
            dealt[f"{path.stem}.{name}"] = range(begin, begin + number)
    return dealt


def num_parts() -> int:
    """Parts of the whole design; the design is complete with at most as many as there are families."""
    return sum(map(len, dealt_parts().values()))


def dimensions() -> dict[str, list[Any]]:
    """The values of every dimension of the covering design."""
    return {
        "part": list(range(num_parts())),
        "family": list(FAMILIES),
        # counted from the end: new methods come first, and move no cell of the others
        "method": list(reversed(REDUCING)),
        "attention": list(ATTENTION),
        "positions": list(POSITIONS),
        "other": list(range(OTHERS)),
    }


@functools.cache
def design() -> tuple[Cell, ...]:
    """Every family with every method, dealt to parts as in a Latin square; the other dimensions change along both.

    Where a family and a method cannot be together, each of them is with a neighbour of the other.
    """
    families, methods = dimensions()["family"], dimensions()["method"]
    cells = []
    for (i, family), (j, method) in itertools.product(enumerate(families), enumerate(methods)):
        part, attention, other = (i + j) % num_parts(), ATTENTION[(i + j // 2) % 2], (i // 2 + j // 3) % OTHERS
        together = [(family, method)]
        if not allowed(family, method):
            near = next(name for name in methods[j - 1 :: -1] if allowed(family, name))
            together = [
                (family, near),
                (next(name for name in families[i + 1 :] + families if allowed(name, method)), method),
            ]
        for one, two in together:
            positions = POSITIONS[(i // 2 + j) % 2]
            cells.append(
                Cell(part, one, two, attention, positions if allowed(one, positions=positions) else "keep", other)
            )
    return tuple(sorted(cells, key=lambda cell: cell.part))


def covered_pairs(one: str, two: str) -> tuple[set[tuple[Any, Any]], set[tuple[Any, Any]]]:
    """Pairs of values of two dimensions: those that can be together, and those that are together in a cell of the
    design."""

    def possible(values: dict[str, Any]) -> bool:
        return "family" not in values or allowed(
            values["family"], values.get("method", ""), values.get("positions", "keep")
        )

    product = itertools.product(dimensions()[one], dimensions()[two])
    return {pair for pair in product if possible(dict(zip((one, two), pair, strict=True)))}, {
        (getattr(cell, one), getattr(cell, two)) for cell in design()
    }


def coverage() -> str:
    """The pairs of values that the default tier covers, in one line."""
    pairs = [covered_pairs(one, two) for one, two in itertools.combinations(dimensions(), 2)]
    return f"{sum(len(wanted & found) for wanted, found in pairs)} of {sum(len(wanted) for wanted, _ in pairs)} pairs of {', '.join(dimensions())}"


def covering(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every two values of two factors are together; the same rows each time."""
    import covertable  # here, since environments that run a few files do without

    return [dict(row) for row in covertable.make(dict(factors))]


def one_of(values: Sequence[str], test: str) -> str:
    """A value that the name of a test chooses, so that tests choose different ones."""
    return values[zlib.crc32(test.encode()) % len(values)]


def tier_families(families: Iterable[str], test: str) -> list[str]:
    """Of the families that a test lists, those of the default tier: the usual ones, and one further."""
    listed = list(families)
    further = [family for family in listed if family not in USUAL]
    chosen = {*USUAL, *([one_of(further, test)] if further else [])}
    return [family for family in listed if family in chosen]


def _name(test: Callable[..., Any]) -> str:
    return f"{test.__module__}.{test.__name__}"


def _tier(
    test: str, methods: Sequence[str], attention: Sequence[str], others: int, parts: Sequence[int]
) -> set[tuple[Any, ...]]:
    """(family, attention, method, positions, number of the other values) of the default tier."""
    if parts:
        rows = [cell._asdict() for cell in design() if cell.part in parts and cell.method in methods]
    else:
        rows = covering(
            {
                "family": tier_families(FAMILIES, test),
                "method": list(methods),
                "attention": list(attention),
                "positions": list(POSITIONS),
                "other": list(range(others)),
            }
        )
    cells = set()
    for row in rows:
        implementation = row["attention"] if row["attention"] in attention else attention[0]
        positions = row["positions"] if allowed(row["family"], positions=row["positions"]) else "keep"
        cells.add((row["family"], implementation, row["method"], positions, row["other"] % others))
    return cells


def _parametrized(names: str, cells: Iterable[tuple[str, tuple[Any, ...], bool]]) -> pytest.MarkDecorator:
    """The parametrization of (id, values, whether the default tier has it)."""
    params = [
        pytest.param(*values, id=name, marks=() if default else pytest.mark.slow) for name, values, default in cells
    ]
    return pytest.mark.parametrize(names, params)


def matrix(
    *methods: str,
    attention: tuple[str, ...] = ATTENTION,
    parts: int = 0,
    beyond: bool = True,
    **others: Mapping[str, Any] | Iterable[Any],
) -> Callable[[Test], Test]:
    """Parametrize a test with a ``case`` and, by name, with ``others`` (values, or what to call them -> values).

    The product: Duet and FastV on every family, other methods on the two usual ones; "compact" positions wherever they
    can be. Of these the default tier has so many ``parts`` of the design (and adds its cells ``beyond`` the product),
    or, for tests of few ``methods``, every pair on the usual families and a further one.
    """
    tried = methods or tuple(REDUCING)
    named = [
        values if isinstance(values, Mapping) else {str(value): value for value in values} for values in others.values()
    ]
    combined = list(itertools.product(*(values.items() for values in named)))

    def decorate(test: Test) -> Test:
        tier = _tier(_name(test), tried, attention, len(combined), dealt_parts()[_name(test)] if parts else ())
        cells = []
        for family, implementation, method, positions in itertools.product(FAMILIES, attention, tried, POSITIONS):
            usual = (family in USUAL or method in ("duet", "fastv")) and not (
                positions == "compact" and FAMILIES[family].mrope
            )
            for number, more in enumerate(combined):
                default = (family, implementation, method, positions, number) in tier
                if usual or (default and beyond):
                    name = "-".join([family, implementation, method, positions, *(name for name, _ in more)])
                    cells.append(
                        (
                            name,
                            (Case(family, implementation, method, positions), *(value for _, value in more)),
                            default,
                        )
                    )
        return _parametrized(",".join(["case", *others]), cells)(test)

    return decorate


def pairs(
    methods: Iterable[Any] = tuple(REDUCING), families: Iterable[str] = tuple(FAMILIES), *, parts: int = 0
) -> Callable[[Test], Test]:
    """Parametrize a test with every ``family`` and ``method``. The default tier has so many ``parts`` of the design;
    without any, a diagonal of the product: every family and every method at least once."""
    rows, columns = list(families), list(methods)
    step = min(len(rows), len(columns))

    def decorate(test: Test) -> Test:
        mine = dealt_parts()[_name(test)] if parts else ()
        chosen = {(cell.family, cell.method) for cell in design() if cell.part in mine}
        first = zlib.crc32(_name(test).encode())
        cells = []
        for (j, method), (i, family) in itertools.product(enumerate(columns), enumerate(rows)):
            if not mine:
                default = (i + j + first) % step == 0
            else:
                default = (family, method) in chosen if method in REDUCING else family in USUAL
            name = "-".join(map(str, method)) if isinstance(method, tuple) else str(method)
            cells.append((f"{name}-{family}", (family, method), default))
        return pytest.mark.every_family(_parametrized("family,method", cells)(test))

    return decorate
