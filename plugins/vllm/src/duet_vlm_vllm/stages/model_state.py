"""State of requests in vLLM's second model runner (the usual one on GPUs), for a decoder that drops rows. The runner asks
the model for this class, so that nothing of the runner is wrapped."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from duet_vlm.serve.staged_prompt import StagedPrompt
from duet_vlm.serve.staged_step import StagedStep
from duet_vlm_vllm.stages.running_step import prompt_of


class StagedModelState(DefaultModelState):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: dict[str, StagedPrompt] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Also one that was preempted: it comes with its prompt, and what was written counts as read."""
        super().add_request(req_index, new_req_data)
        self.prompts[new_req_data.req_id] = prompt_of(new_req_data.prompt_len, new_req_data.mm_features)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.prompts.pop(req_id, None)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.model.running.step = self._step(input_batch)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _step(self, batch: Any) -> StagedStep | None:
        """None for a run without requests, which measures memory or warms up."""
        if not all(name in self.prompts for name in batch.req_ids):
            return None
        prompts = [self.prompts[name] for name in batch.req_ids]
        count = len(prompts)
        return StagedStep(
            self.model.running.stages, prompts, batch.num_computed_tokens_np[:count], batch.num_scheduled_tokens[:count]
        )
