"""Requests that cannot be served with drops inside the decoder, refused where they come in: an error further on would
end the engine."""

from __future__ import annotations

import threading
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor

# Parameters are looked at when images have been processed: those of a refused request are in the front end's cache, and
# the engine never saw them. Whoever processes the next prompt empties the cache, so that images are sent again.
LEFT_BEHIND = threading.Event()


class RequestChecks(LogitsProcessor, SecondLogitsProcessor):
    """Given as ``--logits-processors``: vLLM shows it the parameters of each request at admission. It changes no logits,
    in either of the two model runners."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if reason := unserved(sampling_params):
            LEFT_BEHIND.set()
            raise ValueError(reason)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, *args: Any) -> Any:
        return logits


def unserved(params: Any) -> str | None:
    """Return the reason for which a request with these sampling parameters is refused, None if it is served."""
    if params.prompt_logprobs is not None:
        return "prompt_logprobs: visual tokens that leave inside the decoder have none, leave it out"
    # vLLM asks for a step of its beams like this, and nobody who comes over HTTP can
    if params.max_tokens == 1 and params.logprobs and not params.detokenize:
        return (
            "beam search: each step would be a prompt that ends in what a beam wrote, and that would rank visual tokens, too: "
            "leave use_beam_search out"
        )
    return None
