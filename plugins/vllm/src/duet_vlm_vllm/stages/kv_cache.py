"""The KV cache of a later stage: a spec of its own, so that vLLM gives it a group of its own, and blocks for the rows
that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from duet_vlm.serve.staged_prompt import StagedPrompt

NO_IMAGES = StagedPrompt(0)
_FRESH: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def fresh_blocks(pool: Any) -> set[int]:
    """Numbers of the blocks of a pool that the step being scheduled is the first to fill. vLLM lets other requests of
    the step read them, as each layer writes before it reads; rows are ranked in front of a layer, where nothing is
    written yet, so hits end before them here."""
    return _FRESH.setdefault(pool, set())


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Cache of the layers of one stage. Not a ``FullAttentionSpec``: vLLM merges those into one group, and nothing
    would be saved."""

    stage: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request: one of text alone drops nothing."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class StageManager(FullAttentionManager):
    """Blocks for the rows that a stage has. The managers see ids of requests only, so the scheduler fills ``prompts``."""

    def __init__(self, kv_cache_spec: StageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.prompts: dict[str, StagedPrompt] = {}

    def dropped(self, request_id: str) -> int:
        """Rows of a request that the stage does not have."""
        return self.prompts.get(request_id, NO_IMAGES).dropped(self.kv_cache_spec.stage)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return super().get_num_blocks_to_allocate(request_id, num_tokens - self.dropped(request_id), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        gone = self.dropped(request_id)
        return super().allocate_new_blocks(request_id, num_tokens - gone, num_tokens_main_model - gone)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Blocks in front of the first image only: behind it rows depend on the question. A hit is the shortest of all
        groups, so it ends there in every group."""
        name, prompt = request.request_id, self.prompts.get(request.request_id, NO_IMAGES)
        known = self.num_cached_block.get(name, 0)
        super().cache_blocks(
            request, min(num_tokens, prompt.first_visual) if prompt.spans else num_tokens, *args, **kwargs
        )

        blocks = self.req_to_blocks[name][known : self.num_cached_block.get(name, 0)]
        fresh_blocks(self.block_pool).update(block.block_id for block in blocks)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        fresh_blocks(self.block_pool).clear()

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, kv_cache_spec: StageSpec, block_pool: Any, **kwargs: Any) -> Any:
        """The parent's, which asks for a spec of full attention; up to the first fresh block."""
        full = replace_as(kv_cache_spec, FullAttentionSpec, drop=("stage",))
        groups, length = super().find_longest_cache_hit(*args, kv_cache_spec=full, block_pool=block_pool, **kwargs)
        fresh = fresh_blocks(block_pool)
        filled = next(
            (
                place
                for place, blocks in enumerate(zip(*groups, strict=True))
                if any(b.block_id in fresh for b in blocks)
            ),
            None,
        )
        if filled is None:
            return groups, length
        return tuple(blocks[:filled] for blocks in groups), min(length, filled * kv_cache_spec.block_size)


# vLLM's own specs first: it registers them only while the registry is empty
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)
