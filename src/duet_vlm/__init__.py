"""duet-vlm: vision-language models made faster by spending fewer visual tokens, on stock transformers."""

from duet_vlm.attach import Handle, attach
from duet_vlm.budget import BudgetError, SpanPlan
from duet_vlm.measure.report import Report
from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer, TextView, VisionView
from duet_vlm.registry import get, methods, register
from duet_vlm.tokens import Selection, Span, SpanTrace, StageTrace

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
    "get",
    "methods",
    "register",
]
