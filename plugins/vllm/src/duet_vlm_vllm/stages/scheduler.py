"""The scheduler of an engine whose decoder drops rows (``--scheduler-cls``): prompts with images go in one step, and
the managers of later stages know how many rows a request has."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from duet_vlm.serve.kv_groups import PICTURE, describe_pool
from duet_vlm.serve.served_method import ARCHITECTURES, PREFIX
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.stages.kv_cache import StageManager
from duet_vlm_vllm.stages.running_step import prompt_of

logger = init_logger(f"vllm.{__name__}")  # loggers of other names are not shown by vLLM


class StagedScheduler(AsyncScheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.stage_managers = [manager for manager in managers if isinstance(manager, StageManager)]
        config = self.vllm_config.model_config.hf_config
        method = served(config, ARCHITECTURES[config.architectures[0].removeprefix(PREFIX)])
        plan = method.example(PICTURE)
        logger.info("%s", describe_pool(method.stages, plan, self.kv_cache_config.num_blocks, self.block_size))

    def add_request(self, request: Any) -> None:
        if request.resumable:
            raise ValueError(
                "a prompt that grows while it is read would add text behind rows that have left: send it as a whole"
            )
        prompt = prompt_of(request.num_prompt_tokens, request.mm_features)
        prompt.check(self.max_num_scheduled_tokens)
        for manager in self.stage_managers:
            manager.prompts[request.request_id] = prompt
        super().add_request(request)

    def _free_blocks(self, request: Any) -> None:
        super()._free_blocks(request)  # not where it is only preempted
        for manager in self.stage_managers:
            manager.prompts.pop(request.request_id, None)

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A spent budget of the tower, or a full cache of its outputs, cuts a prompt in front of an image, also without
        chunked prefill. Here it waits for the next step."""
        found = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )
        return found if found[1] == num_new_tokens else ([], 0, encoder_compute_budget, [], [])
