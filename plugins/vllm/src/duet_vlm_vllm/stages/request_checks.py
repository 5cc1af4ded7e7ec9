"""Requests that cannot be served with drops inside the decoder, refused where they come in: an error further on would
end the engine."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor


class RequestChecks(LogitsProcessor):
    """Given as ``--logits-processors``: vLLM shows it the parameters of each request at admission. It changes no
    logits."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: visual tokens that leave inside the decoder have none, leave it out")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits
