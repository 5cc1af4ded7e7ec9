"""What a handle will make of a prompt that nobody has run yet, in the words of the reports and of the roofline."""

from __future__ import annotations

from duet_vlm.attach import Handle
from duet_vlm.measure.report import Sample
from duet_vlm.measure.roofline import Workload
from duet_vlm.reducer import DecoderReducer


def planned_sample(handle: Handle, tokens: int, text: int, parts: int = 1) -> tuple[Sample, list[int]]:
    """One picture of ``tokens`` in ``parts`` equal parts and ``text`` further tokens as the current settings plan it; the layers that rank."""
    plan, reducer = handle.plan(tokens), handle.reducer
    counts = (plan.entry, *plan.counts)
    drops = [i for i in range(len(plan.counts)) if counts[i + 1] != counts[i]]
    ranked = isinstance(reducer, DecoderReducer) and reducer.uses_text
    scored = [i - reducer.score_before for i in drops if plan.counts[i]] if isinstance(reducer, DecoderReducer) and ranked else []
    rows = tuple(text + count for count in plan.counts)
    queries = 1 if getattr(reducer, "text_query", "") == "last" else text
    passes = tuple(tokens * (i + 1) // parts - tokens * i // parts for i in range(parts))
    return Sample(text, (tokens,), (passes,), (plan,), queries, (plan.counts, rows)), scored


def workload(handle: Handle, tokens: int, text: int, new: int, parts: int = 1) -> Workload:
    """The same as a request to predict."""
    sample, scored = planned_sample(handle, tokens, text, parts)
    return Workload(sample, new, tuple(scored), handle.projects_all, *handle.selection_cost([sample]))
