"""duet-vlm: vision-language models made faster by spending fewer visual tokens, on stock transformers.

Importing this loads nothing: each name below is loaded when it is first used, so that the command line can list and help without torch.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duet_vlm.attach import attach, detach, handle_of, remember
    from duet_vlm.budget import BudgetError, SpanPlan
    from duet_vlm.compressor import NewWeights
    from duet_vlm.handle import Handle
    from duet_vlm.measure.report import Report
    from duet_vlm.memory import remembered
    from duet_vlm.methods.compose import compose
    from duet_vlm.methods.named import get, methods
    from duet_vlm.presets import preset
    from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer, TextView, VisionView
    from duet_vlm.registry import register
    from duet_vlm.stages import StagedReducer
    from duet_vlm.tokens import Selection, Span, SpanTrace, StageTrace
    from duet_vlm.tower import Merged, ThresholdReducer, TowerReducer, TowerView

try:
    __version__ = version("duet-vlm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

_HOMES = {  # where each public name is found; the block above says the same to type checkers, and a test that both agree
    "BudgetError": "budget",
    "DecoderReducer": "reducer",
    "EncoderReducer": "reducer",
    "Handle": "handle",
    "Merged": "tower",
    "NewWeights": "compressor",
    "Reducer": "reducer",
    "Report": "measure.report",
    "Selection": "tokens",
    "Span": "tokens",
    "SpanPlan": "budget",
    "SpanTrace": "tokens",
    "StageTrace": "tokens",
    "StagedReducer": "stages",
    "TextView": "reducer",
    "ThresholdReducer": "tower",
    "TowerReducer": "tower",
    "TowerView": "tower",
    "VisionView": "reducer",
    "attach": "attach",
    "compose": "methods.compose",
    "detach": "attach",
    "get": "methods.named",
    "handle_of": "attach",
    "methods": "methods.named",
    "preset": "presets",
    "register": "registry",
    "remember": "attach",
    "remembered": "memory",
}
_ROOMS = frozenset(
    {
        "budget", "checks", "contrastive", "flow", "handle", "measure", "memory", "models", "ops", "parts", "presets", "reducer", "registry", "text",
        "tokens", "tower", "vision",
    }  # fmt: skip
)

__all__ = [
    "BudgetError",
    "DecoderReducer",
    "EncoderReducer",
    "Handle",
    "Merged",
    "NewWeights",
    "Reducer",
    "Report",
    "Selection",
    "Span",
    "SpanPlan",
    "SpanTrace",
    "StageTrace",
    "StagedReducer",
    "TextView",
    "ThresholdReducer",
    "TowerReducer",
    "TowerView",
    "VisionView",
    "attach",
    "compose",
    "detach",
    "get",
    "handle_of",
    "methods",
    "preset",
    "register",
    "remember",
    "remembered",
]


class _Package(ModuleType):
    """Two files are called as what they define, ``attach`` and the folder ``methods``: loading them must not replace the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


if not TYPE_CHECKING:  # a checker would take every name for granted

    def __getattr__(name):
        if name in _HOMES:
            found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = found
            return found
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})

    sys.modules[__name__].__class__ = _Package
