"""duet-vlm: vision-language models made faster by spending fewer visual tokens, on stock transformers.

Importing this loads nothing: each name below is loaded when it is first used, so that the command line can list and
help without torch.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duet_vlm.api.attach import attach, detach, handle_of, save_to_config
    from duet_vlm.api.handle import Handle
    from duet_vlm.api.presets import preset
    from duet_vlm.methods.compose import compose
    from duet_vlm.methods.lookup import get_method, list_methods, make_method
    from duet_vlm.planning.budget import BudgetError, SpanPlan
    from duet_vlm.planning.tokens import Selection, Span, SpanTrace, StageTrace
    from duet_vlm.profiling.report import Report
    from duet_vlm.reducers.base import Reducer
    from duet_vlm.reducers.compressor import NewWeights
    from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
    from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
    from duet_vlm.reducers.inputs import Input
    from duet_vlm.reducers.options import TokenOptions
    from duet_vlm.reducers.persistence import load_from_config
    from duet_vlm.reducers.registry import register
    from duet_vlm.reducers.scheduled import ScheduledReducer
    from duet_vlm.reducers.score import ScoreReducer
    from duet_vlm.reducers.vision_tower import MergePairs, ThresholdReducer, TowerReducer, TowerView

try:
    __version__ = version("duet-vlm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

# where each public name is found; the block above says the same to type checkers, and a test that both agree
_HOMES = {
    "BudgetError": "planning.budget",
    "DecoderReducer": "reducers.decoder",
    "DecoderView": "reducers.decoder",
    "EncoderReducer": "reducers.encoder",
    "EncoderView": "reducers.encoder",
    "Handle": "api.handle",
    "Input": "reducers.inputs",
    "MergePairs": "reducers.vision_tower",
    "NewWeights": "reducers.compressor",
    "Reducer": "reducers.base",
    "Report": "profiling.report",
    "ScheduledReducer": "reducers.scheduled",
    "ScoreReducer": "reducers.score",
    "Selection": "planning.tokens",
    "Span": "planning.tokens",
    "SpanPlan": "planning.budget",
    "SpanTrace": "planning.tokens",
    "StageTrace": "planning.tokens",
    "ThresholdReducer": "reducers.vision_tower",
    "TokenOptions": "reducers.options",
    "TowerReducer": "reducers.vision_tower",
    "TowerView": "reducers.vision_tower",
    "attach": "api.attach",
    "compose": "methods.compose",
    "detach": "api.attach",
    "get_method": "methods.lookup",
    "handle_of": "api.attach",
    "list_methods": "methods.lookup",
    "load_from_config": "reducers.persistence",
    "make_method": "methods.lookup",
    "preset": "api.presets",
    "register": "reducers.registry",
    "save_to_config": "api.attach",
}

__all__ = [
    "BudgetError",
    "DecoderReducer",
    "DecoderView",
    "EncoderReducer",
    "EncoderView",
    "Handle",
    "Input",
    "MergePairs",
    "NewWeights",
    "Reducer",
    "Report",
    "ScheduledReducer",
    "ScoreReducer",
    "Selection",
    "Span",
    "SpanPlan",
    "SpanTrace",
    "StageTrace",
    "ThresholdReducer",
    "TokenOptions",
    "TowerReducer",
    "TowerView",
    "attach",
    "compose",
    "detach",
    "get_method",
    "handle_of",
    "list_methods",
    "load_from_config",
    "make_method",
    "preset",
    "register",
    "save_to_config",
]


if not TYPE_CHECKING:  # a checker would take every name for granted

    def __getattr__(name):
        if name in _HOMES:
            found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = found
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
