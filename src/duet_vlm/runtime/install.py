"""Install every hook of one model, in the required order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from duet_vlm.models.adapter import ConcatenatedBlocks, TowerBlocks, VarlenTower
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.vision_tower import tower_of
from duet_vlm.runtime import compat
from duet_vlm.runtime.encode.attention_intercept import QKRecorder, SizeBias
from duet_vlm.runtime.encode.build_view import QuestionTextEncoder, find_signal_layers
from duet_vlm.runtime.encode.encoder import EncoderHooks
from duet_vlm.runtime.encode.video_chunks import ChunkConfig
from duet_vlm.runtime.model_hooks import ModelHooks
from duet_vlm.runtime.prefill.entry import refuse_chunked_prefill
from duet_vlm.runtime.training.compressor_module import install_module
from duet_vlm.runtime.training.labels import gather_labels
from duet_vlm.runtime.vision_tower.block_hooks import BlockHooks, depth_of
from duet_vlm.runtime.vision_tower.concatenated import ConcatenatedTowerHooks
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks, parameter_names
from duet_vlm.runtime.vision_tower.varlen import VarlenTowerHooks
from duet_vlm.utils.hooks import Hooks


def install(
    model_hooks: ModelHooks,
    reducer: Reducer,
    processor: Any,
    text_tower: Any,
    facts: dict[str, Any],
    chunks: ChunkConfig | None = None,
) -> None:
    """Install the hooks that ``reducer`` needs, and its module if it has one; ``model_hooks.hooks`` undoes them.

    ``facts`` describe the model that saved weights must have been trained for.
    """
    model_hooks.module = install_module(model_hooks.adapter, reducer, facts, model_hooks.hooks)
    model_hooks.tokenizer = getattr(processor, "tokenizer", None)
    _on_tower(model_hooks, reducer, QuestionTextEncoder(text_tower, model_hooks.tokenizer), chunks or ChunkConfig())
    _on_model(model_hooks)
    _on_decoder(model_hooks)


def _on_tower(
    model_hooks: ModelHooks, reducer: Reducer, text_encoder: QuestionTextEncoder, chunks: ChunkConfig
) -> None:
    """Hooks on the encoder calls, the vision tower and the projector."""
    adapter = model_hooks.adapter
    hooks = model_hooks.hooks
    encoder = EncoderHooks(adapter, model_hooks.state, model_hooks.begin, text_encoder, chunks)
    signal_layers = encoder.signal_layers = find_signal_layers(adapter, reducer)
    encoder.module = model_hooks.module
    for attention in dict.fromkeys(module for modules in signal_layers.attentions for module in modules):
        hooks.on_undo(QKRecorder(attention, model_hooks.state).remove)
        hooks.add(attention.register_forward_hook, encoder.after_attention)
    for block in dict.fromkeys(module for modules in signal_layers.blocks for module in modules):
        hooks.add(block.register_forward_hook, encoder.after_block)
    if Input.PROJECTOR in reducer.requires:
        hooks.add(adapter.projector().register_forward_pre_hook, encoder.record_projector_args, with_kwargs=True)
    unused = adapter.unused_tower_layers()
    if not signal_layers.requested(unused):
        encoder.skips_unused_layers = bool(unused)
        for layer in map(_unwrapped, unused):
            hooks.shadow(layer, "forward", encoder.skippable(layer.forward))
    if reducer.options.cls_token:
        hooks.add(adapter.cls_module().register_forward_hook, model_hooks.record_cls)
    if adapter.pointwise_projector is not None:
        hooks.add(adapter.pointwise_projector.register_forward_pre_hook, encoder.before_projector)
        hooks.add(adapter.pointwise_projector.register_forward_hook, encoder.after_projector)
    if isinstance(reducer, EncoderReducer) and reducer.tower_reducer is not None:
        _in_tower(model_hooks, reducer)
    for modality in adapter.modalities:
        hooks.shadow(adapter.base, modality.encode, encoder.wrap(getattr(adapter.base, modality.encode), modality))


def _in_tower(model_hooks: ModelHooks, reducer: EncoderReducer) -> None:
    """Hooks inside the vision tower, for methods that drop patches there."""
    adapter = model_hooks.adapter
    state = model_hooks.state
    hooks = model_hooks.hooks
    batched = TowerHooks(adapter, state)
    concatenated = ConcatenatedTowerHooks(adapter, state)
    varlen = VarlenTowerHooks(adapter, state)
    for blocks in adapter.blocks_to_reduce():
        depth = depth_of(blocks, adapter, reducer)
        tower_reducer = tower_of(reducer)
        prunes_inside = tower_reducer is not None and tower_reducer.prunes_inside
        if prunes_inside or isinstance(blocks, VarlenTower) or not blocks.takes_mask:
            for number, modules in enumerate(blocks.block_modules):
                hooks.on_undo(SizeBias(modules.attention, state, number).remove)
        if isinstance(blocks, VarlenTower):
            tower = blocks.module
            hooks.shadow(tower, "forward", varlen.around(blocks, depth, tower.forward, tower.patch_embed))
            hooks.shadow(tower.patch_embed, "forward", varlen.embedding(tower.patch_embed.forward))
        else:
            tower_hooks = concatenated if isinstance(blocks, ConcatenatedBlocks) else batched
            hooks.add(blocks.patches.register_forward_hook, tower_hooks.embedded)
            hooks.add(
                blocks.stack.register_forward_pre_hook,
                tower_hooks.enter,
                blocks,
                depth,
                parameter_names(blocks.stack),
                with_kwargs=True,
            )
            hooks.add(blocks.tower.register_forward_hook, tower_hooks.leave)
        if prunes_inside:
            _in_blocks(hooks, blocks, depth, BlockHooks(batched))
            hand_over = varlen.hand_over if isinstance(blocks, VarlenTower) else concatenated.hand_over
            for modules in blocks.block_modules[1:] if isinstance(blocks, VarlenTower | ConcatenatedBlocks) else ():
                hooks.add(modules.block.register_forward_pre_hook, hand_over, with_kwargs=True)
            for merger in blocks.mergers if isinstance(blocks, VarlenTower) else ():
                hooks.add(merger.register_forward_hook, varlen.merged)


def _in_blocks(hooks: Hooks, blocks: TowerBlocks | VarlenTower, depth: int, block_hooks: BlockHooks) -> None:
    """Hooks inside the first ``depth`` blocks."""
    for number, modules in enumerate(blocks.block_modules[:depth]):
        hooks.add(modules.norm.register_forward_pre_hook, block_hooks.before_mlp, number)
        hooks.add(modules.mlp.register_forward_hook, block_hooks.after_mlp, number)
        hooks.add(modules.block.register_forward_hook, block_hooks.after_block, number)


def _on_model(model_hooks: ModelHooks) -> None:
    """Hooks on the model's forward, its loss and generate()."""
    adapter = model_hooks.adapter
    hooks = model_hooks.hooks
    for module in (adapter.model, adapter.base):
        hooks.add(module.register_forward_pre_hook, model_hooks.before_forward, with_kwargs=True)
        hooks.add(module.register_forward_hook, model_hooks.after_forward, always_call=True)
        hooks.shadow(module, "forward", model_hooks.forward(module, module.forward))
    if not model_hooks.align:  # the public setter keeps the loss in this one instance attribute
        hooks.shadow(adapter.model, "_loss_function", gather_labels(adapter.model.loss_function, model_hooks.state))
    steps: dict[str, Callable[[Any], Any]] = {
        "generate": model_hooks.generate, compat.PREPARE: model_hooks.prepare, compat.PREFILL: lambda original: refuse_chunked_prefill(original, model_hooks.begin),
    }  # fmt: skip
    for name, wrapper in steps.items():
        if hasattr(adapter.model, name):
            hooks.shadow(adapter.model, name, wrapper(getattr(adapter.model, name)))


def _on_decoder(model_hooks: ModelHooks) -> None:
    """Hooks on the decoder and its layers."""
    adapter = model_hooks.adapter
    hooks = model_hooks.hooks
    adapter.install(hooks, model_hooks.current_tokens, model_hooks.change_sleeping)
    hooks.add(adapter.text_model.register_forward_pre_hook, model_hooks.before_decoder, with_kwargs=True, prepend=True)
    hooks.add(adapter.text_model.register_forward_hook, model_hooks.after_decoder, with_kwargs=True)
    if isinstance(getattr(adapter.text_model, "rotary_emb", None), nn.Module):
        hooks.add(adapter.text_model.rotary_emb.register_forward_hook, model_hooks.record_rotary, with_kwargs=True)
    for index, layer in enumerate(adapter.layers):
        hooks.add(_unwrapped(layer).register_forward_pre_hook, model_hooks.before_layer, index, with_kwargs=True)


def _unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside torch's checkpointing wrapper: there FSDP gathers weights and hidden states are captured."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)
