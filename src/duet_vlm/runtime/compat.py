"""Every fact about a transformers version that the runtime depends on, in one place (tests/test_compat.py fails loudly
when one changes).

Oldest supported: 5.21; the rest of the package takes 5.16, as vLLM holds transformers back. From 5.18 on generate()
encodes images before prefill and hands the output on, and M-RoPE tables reach the layers mixed; from 5.19 on beams
repeat the images of a sample as a group (before, several images in one sample reached the wrong beams); before 5.21
encoders of Video-LLaVA, Idefics3 and Qwen3.5 ask for or hand out other things.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OLDEST = (5, 21)
STORED = ("keys", "values", "_quantized_keys", "_quantized_values")  # attributes of a cache layer
PREPARE = "_prepare_multimodal_encoder_kwargs_for_generation"  # the step of generate() that runs the encoders
PREFILL = "_prefill"  # the step of generate() that may cut a prompt into chunks; gets the merged generation config

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def check_version() -> None:
    """Raise an ImportError where transformers is older than attaching works on."""
    there = transformers.__version__
    if tuple(int(number) for number in there.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"attach() needs transformers >= {'.'.join(map(str, OLDEST))}, and here is {there}: upgrade it, or, beside a vLLM that holds it back, "
            "serve through vLLM's plug-in ('duet-vlm serve') and attach in an environment of its own"
        )


def decoder_mask(config: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
    """The causal mask that the decoder would build for one layer: ``mask`` is 2-D [B, keys] or None, sizes come from
    that layer's cache.

    Position ids are never handed over: without a cache and mask, gaps in them would be read as packed sequences. Where
    padding is known the mask is made here, as the stock function would read the device to find it out.
    """
    if mask is not None and makes_masks(config):
        keys, rows = mask.shape[1], hidden.shape[1]
        column = torch.arange(keys, device=hidden.device)
        allowed = mask.bool()[:, None, None, :] & (column <= column[keys - rows :, None])
        return prepared_mask(
            config, hidden, torch.nn.functional.pad(allowed, (0, max(0, capacity(cache, layer) - keys)))
        )
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=mask,
        past_key_values=cache,
        position_ids=None,
        layer_idx=layer,
    )


def makes_masks(config: Any) -> bool:
    """True if the attention implementation takes 4-D masks."""
    return config._attn_implementation in ("sdpa", "eager")


def prepared_mask(config: Any, hidden: Tensor, allowed: Tensor) -> Tensor:
    """``allowed`` [B, 1, rows, keys] bool in the form that the implementation takes."""
    if config._attn_implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, torch.finfo(hidden.dtype).min)


def is_allowed(mask: Tensor) -> Tensor:
    """The bool form of a prepared mask."""
    return mask if mask.dtype == torch.bool else mask == 0


def new_cache(config: Any) -> DynamicCache:
    return DynamicCache(config=config)


def is_static(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False))


def capacity(cache: Any, layer: int) -> int:
    """Keys that one layer hands to attention whatever it holds: those that its tensors have room for.

    0 where they grow.
    """
    held = None if cache is None else cache.layers[layer]
    return int(held.max_cache_len) if isinstance(held, StaticLayer) else 0


def fixed_cache(cache: Any, new: int) -> Cache:
    """The rows of ``cache`` in tensors that do not grow: for each layer as many as it holds, and ``new`` more.

    Raises
    ------
    ValueError
        If a layer does not hold keys and values as they are, or does not grow itself.
    """
    for held in cache.layers:
        if isinstance(held, StaticLayer) or not isinstance(getattr(held, "keys", None), Tensor) or held.keys.ndim != 4:
            raise ValueError(
                f"a static cache is made of a dynamic one that holds a prompt as it is, and {type(held).__name__} does not"
            )
    made = Cache(layers=[StaticLayer(int(held.keys.shape[2]) + new) for held in cache.layers])
    for index, held in enumerate(cache.layers):
        made.update(held.keys, held.values, index)
    return made


def cache_bytes(cache: Any) -> tuple[int, ...] | None:
    """Bytes of keys and values per layer, read from the tensors' shapes (no device access); a linear layer's state has
    neither, nor has a layer that was not filled (recomputed layers pass the cache over). A quantised layer's are its
    packed numbers, their scales and what it has not packed yet. None where a layer holds rows, but not where any known
    layer has them.
    """
    stored = tuple(sum(_bytes(getattr(layer, name, None)) for name in STORED) for layer in cache.layers)
    unknown = any(
        size == 0 and getattr(layer, "get_seq_length", int)() > 0
        for layer, size in zip(cache.layers, stored, strict=True)
    )
    return None if unknown else stored


def _bytes(held: Any) -> int:
    if hasattr(held, "__tensor_flatten__"):  # a packed tensor states the size of what it stands for
        return sum(_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
    if isinstance(held, Tensor):
        return held.nbytes
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, tuple | list) else ()
    return sum(map(_bytes, parts))


def cached_rows(cache: Any, layer: int) -> int:
    """Keys that one layer's cache holds: sliding layers forget."""
    return int(cache.layers[layer].keys.shape[2])


def keep_cached(cache: Any, layer: int, rows: int, index: Tensor) -> None:
    """Of one layer's ``rows`` keys and values only rows ``index`` [B, n] stay."""
    held = cache.layers[layer]
    for name in ("keys", "values"):
        stored = getattr(held, name, None)
        if not isinstance(stored, Tensor) or stored.ndim != 4 or stored.shape[2] != rows:
            raise ValueError(
                f"trim_kv_cache=True needs a cache that holds keys and values as they are, {type(held).__name__} does not: use trim_kv_cache=False"
            )
        wanted = index.to(stored.device)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
        setattr(held, name, stored.gather(2, wanted))


def attention_function(module: nn.Module, implementation: str) -> AttentionFunction:
    """The attention function that ``module`` would call under ``implementation``."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def register_attention(name: str, function: AttentionFunction) -> None:
    """Make ``function`` selectable by name; known names stay."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function)


def use_attention(config: Any, name: str) -> None:
    """Set the implementation on a private config copy without the validation that the public setter runs."""
    config._attn_implementation_internal = name


def is_assistant_call(options: dict[str, Any]) -> bool:
    """True if a call of generate() runs the assistant of another model (assisted decoding)."""
    return bool(getattr(options.get("generation_config"), "is_assistant", None))


def uses_cache(text_model: nn.Module, use_cache: bool | None) -> bool:
    """True if the text model will create a cache when none is given (its own rule)."""
    if text_model.training and getattr(text_model, "gradient_checkpointing", False):
        return False
    return bool(text_model.config.use_cache if use_cache is None else use_cache)


def is_eager(layer: nn.Module) -> bool:
    """True if a layer runs as plain Python, so that its modules can be changed from call to call."""
    return layer._compiled_call_impl is None and not hasattr(layer.forward, "_torchdynamo_orig_callable")


def refuse_graph(module: nn.Module) -> None:
    """Raise a ValueError where ``module``, whose hooks call this, is being traced by torch.compile."""
    if torch.compiler.is_compiling():
        _in_a_graph(type(module).__name__)


def _in_a_graph(name: str) -> None:
    raise ValueError(
        f"this {name} is compiled as a whole while a reducer is attached, whose hooks cannot be part of a graph: compile the decoder layers instead "
        "(layer.forward = torch.compile(layer.forward) for each of them), or detach() first. In training leave torch_compile out"
    )


_in_a_graph._torchdynamo_disable = True  # type: ignore[attr-defined]  # else torch forgets the error and goes on without a graph
_in_a_graph._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "a reducer is attached, and its hooks cannot be part of a graph: compile layers, or detach"
)


def is_dispatched(layer: nn.Module) -> bool:
    """True if accelerate's device map moves the layer's input; else it runs on the device of its input."""
    return hasattr(layer, "_hf_hook")


def finite(x: Tensor) -> Tensor:
    """0-dim bool tensor: every entry is finite (one reduction, no mask of the size of ``x``)."""
    return x.detach().sum(dtype=torch.float32) * 0 == 0


def free_bytes(device: torch.device) -> int | None:
    """Memory that an accelerator has left, what torch holds and does not use included.

    None on the CPU and where it is unknown.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which tokens are ranked in float32 although bf16 training runs around it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def uncached_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The running autocast (or none) without its cache of casted weights: up to torch 2.9 the casts that ranking made
    under no_grad were handed to the layer's own pass, whose weights then got no gradient."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
