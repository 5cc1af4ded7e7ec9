"""The worker of an engine whose decoder drops rows (``--worker-cls``): its runner says which requests a step holds."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from duet_vlm.serve.staged_prompt import StagedPrompt
from duet_vlm.serve.staged_step import StagedStep
from duet_vlm_vllm.stages.decoder import put_in_front
from duet_vlm_vllm.stages.running_step import RunningStep, prompt_of

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as StockWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as StockWorker


class StagedRunner:
    """In front of vLLM's first model runner: the one method that knows the requests and runs before tables are built."""

    def _build_attention_metadata(
        self, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any
    ) -> Any:
        running: RunningStep = self.get_model().running
        running.step = None if num_scheduled_tokens is None else self._step(running, num_scheduled_tokens)
        return super()._build_attention_metadata(*args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)

    def _step(self, running: RunningStep, scheduled: dict[str, int]) -> StagedStep:
        batch = self.input_batch
        prompts = [
            self._prompt(name, int(length))
            for name, length in zip(batch.req_ids, batch.num_prompt_tokens, strict=False)
        ]
        computed = batch.num_computed_tokens_cpu[: len(prompts)]
        return StagedStep(running.stages, prompts, computed, [scheduled[name] for name in batch.req_ids])

    def _prompt(self, name: str, length: int) -> StagedPrompt:
        """Of a request, counted once."""
        request = self.requests[name]
        if not hasattr(request, "duet_prompt"):
            request.duet_prompt = prompt_of(length, request.mm_features)
        return request.duet_prompt


class StagedWorker(StockWorker):
    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:  # which asks the model (model_state)
            put_in_front(StagedRunner, self.model_runner)
