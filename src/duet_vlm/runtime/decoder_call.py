"""One call of the decoder stack: the stock path, a prompt, or a step on the cache of one."""

from __future__ import annotations

from typing import Any

from duet_vlm.models.adapter import Adapter
from duet_vlm.runtime.context import ForwardContext
from duet_vlm.runtime.decode.step import DecodePass
from duet_vlm.runtime.prefill.entry import begin_prompt
from duet_vlm.runtime.prefill.layers import PrefillPass
from duet_vlm.runtime.pruned_cache import PrunedCacheMixin, unbind_prompt


def begin_decoder(
    adapter: Adapter, context: ForwardContext, kwargs: dict[str, Any], tokenizer: Any = None
) -> DecodePass | PrefillPass | None:
    """Prepare one call of the decoder stack; ``kwargs`` are changed in place. None: the stock path runs."""
    cache = kwargs.get("past_key_values")
    filled = cache is not None and int(cache.get_seq_length()) > 0
    if not filled:
        unbind_prompt(cache)
    if isinstance(cache, PrunedCacheMixin):
        if context.received:
            raise ValueError("new image on a reduced cache: start a new conversation (no past_key_values) or detach")
        cache.duet_prompt_state.continuation.num_decoded += kwargs["inputs_embeds"].shape[1]
        return DecodePass(adapter, cache, context.call.attention_mask, kwargs)
    config = next(
        (received.decisions.config for received in context.received.values() if received.decisions is not None),
        context.config,
    )
    if config is None:
        return None
    if filled and context.received:
        raise ValueError(
            "new image on a cache that already holds tokens: start a new conversation (no past_key_values) or detach"
        )
    if not context.placeholders or filled:
        return None
    return begin_prompt(adapter, config, context, kwargs, tokenizer)
