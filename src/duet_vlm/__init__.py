"""duet-vlm: vision-language models made faster by spending fewer visual tokens, on stock transformers."""

from importlib.metadata import PackageNotFoundError, version

import duet_vlm.methods as _files  # noqa: F401  bound first: imported later, the folder would replace the function methods() below
from duet_vlm.attach import attach, detach, handle_of, remember
from duet_vlm.budget import BudgetError, SpanPlan
from duet_vlm.handle import Handle
from duet_vlm.measure.report import Report
from duet_vlm.memory import remembered
from duet_vlm.methods.compose import compose
from duet_vlm.methods.named import get
from duet_vlm.presets import preset
from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer, TextView, VisionView
from duet_vlm.registry import methods, register
from duet_vlm.tokens import Selection, Span, SpanTrace, StageTrace

try:
    __version__ = version("duet-vlm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = [
    "BudgetError",
    "DecoderReducer",
    "EncoderReducer",
    "Handle",
    "Reducer",
    "Report",
    "Selection",
    "Span",
    "SpanPlan",
    "SpanTrace",
    "StageTrace",
    "TextView",
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
