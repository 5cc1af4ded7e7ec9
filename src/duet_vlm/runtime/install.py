"""Every hook on one model, in the order in which they must stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from duet_vlm.models.adapter import ConcatenatedBlocks, TowerBlocks, VarlenTower
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.vision_tower import tower_of
from duet_vlm.runtime import compat
from duet_vlm.runtime.encode.attention_intercept import QKRecorder, SizeBias
from duet_vlm.runtime.encode.build_view import QuestionTextEncoder, named_layers
from duet_vlm.runtime.encode.encoder import EncoderHooks
from duet_vlm.runtime.encode.video_chunks import ChunkConfig
from duet_vlm.runtime.model_hooks import ModelHooks
from duet_vlm.runtime.prefill.entry import refuse_chunked_prefill
from duet_vlm.runtime.salient_processor import SalientProcessor, accept_salient
from duet_vlm.runtime.training.compressor_module import install_module
from duet_vlm.runtime.training.labels import gather_labels
from duet_vlm.runtime.vision_tower.block_hooks import BlockHooks, depth_of
from duet_vlm.runtime.vision_tower.concatenated import ConcatenatedTowerHooks
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks, names_of
from duet_vlm.runtime.vision_tower.varlen import VarlenTowerHooks
from duet_vlm.utils.hooks import Hooks


def install(
    traffic: ModelHooks, reducer: Reducer, processor: Any, text_tower: Any, facts: dict[str, Any], pieces: ChunkConfig | None = None
) -> None:
    """Put the hooks that ``reducer`` needs on the model, and its module if it has one; ``traffic.hooks`` takes them off again. ``facts`` are what
    weights must have been trained for."""
    traffic.module = install_module(traffic.adapter, reducer, facts, traffic.hooks)
    _on_tower(traffic, reducer, QuestionTextEncoder(text_tower, getattr(processor, "tokenizer", None)), pieces or ChunkConfig())
    _on_model(traffic)
    _on_decoder(traffic)
    if processor is not None:
        traffic.hooks.on_undo(SalientProcessor(processor, traffic.adapter.image_token_id).remove)
    model, hooks = traffic.adapter.model, traffic.hooks
    if processor is not None or isinstance(reducer, DecoderReducer):
        hooks.shadow(model, "prepare_inputs_for_generation", accept_salient(model.prepare_inputs_for_generation))


def _on_tower(traffic: ModelHooks, reducer: Reducer, words: QuestionTextEncoder, pieces: ChunkConfig) -> None:
    adapter, hooks = traffic.adapter, traffic.hooks
    encoder = EncoderHooks(adapter, traffic.state, traffic.begin, words, pieces)
    named = encoder.signal_layers = named_layers(adapter, reducer)
    encoder.module = traffic.module
    for attention in dict.fromkeys(module for modules in named.attentions for module in modules):
        hooks.on_undo(QKRecorder(attention, traffic.state).remove)
        hooks.add(attention.register_forward_hook, encoder.after_attention)
    for block in dict.fromkeys(module for modules in named.blocks for module in modules):
        hooks.add(block.register_forward_hook, encoder.after_block)
    if Input.PROJECTOR in reducer.requires:
        hooks.add(adapter.projector().register_forward_pre_hook, encoder.asks_projector, with_kwargs=True)
    unread = adapter.unused_tower_layers()
    if not named.requested(unread):
        encoder.skips_unused_layers = bool(unread)
        for layer in map(_inside, unread):
            hooks.shadow(layer, "forward", encoder.instead_of(layer.forward))
    if reducer.cls_token:
        hooks.add(adapter.cls_module().register_forward_hook, traffic.record_cls)
    if adapter.pointwise_projector is not None:
        hooks.add(adapter.pointwise_projector.register_forward_pre_hook, encoder.before_projector)
        hooks.add(adapter.pointwise_projector.register_forward_hook, encoder.after_projector)
    if isinstance(reducer, EncoderReducer) and reducer.tower_reducer is not None:
        _in_tower(traffic, reducer)
    for stream in adapter.modalities:
        hooks.shadow(adapter.base, stream.encode, encoder.wrap(getattr(adapter.base, stream.encode), stream))


def _in_tower(traffic: ModelHooks, reducer: EncoderReducer) -> None:
    adapter, state, hooks = traffic.adapter, traffic.state, traffic.hooks
    batch, joined, packed = TowerHooks(adapter, state), ConcatenatedTowerHooks(adapter, state), VarlenTowerHooks(adapter, state)
    for blocks in adapter.blocks_to_reduce():
        depth = depth_of(blocks, adapter, reducer)
        tower = tower_of(reducer)
        within = tower is not None and tower.prunes_inside
        if within or isinstance(blocks, VarlenTower) or not blocks.takes_mask:
            for number, inside in enumerate(blocks.block_modules):
                hooks.on_undo(SizeBias(inside.attention, state, number).remove)
        if isinstance(blocks, VarlenTower):
            tower = blocks.module
            hooks.shadow(tower, "forward", packed.around(blocks, depth, tower.forward, tower.patch_embed))
            hooks.shadow(tower.patch_embed, "forward", packed.embedding(tower.patch_embed.forward))
        else:
            flow = joined if isinstance(blocks, ConcatenatedBlocks) else batch
            hooks.add(blocks.patches.register_forward_hook, flow.embedded)
            hooks.add(blocks.stack.register_forward_pre_hook, flow.enter, blocks, depth, names_of(blocks.stack), with_kwargs=True)
            hooks.add(blocks.tower.register_forward_hook, flow.leave)
        if within:
            _in_blocks(hooks, blocks, depth, BlockHooks(batch))
            hand_over = packed.hand_over if isinstance(blocks, VarlenTower) else joined.hand_over
            for inside in blocks.block_modules[1:] if isinstance(blocks, VarlenTower | ConcatenatedBlocks) else ():
                hooks.add(inside.block.register_forward_pre_hook, hand_over, with_kwargs=True)
            for merger in blocks.mergers if isinstance(blocks, VarlenTower) else ():
                hooks.add(merger.register_forward_hook, packed.merged)


def _in_blocks(hooks: Hooks, blocks: TowerBlocks | VarlenTower, depth: int, flow: BlockHooks) -> None:
    for number, inside in enumerate(blocks.block_modules[:depth]):
        hooks.add(inside.norm.register_forward_pre_hook, flow.before_mlp, number)
        hooks.add(inside.mlp.register_forward_hook, flow.after_block, number)
        hooks.add(inside.block.register_forward_hook, flow.end, number)


def _on_model(traffic: ModelHooks) -> None:
    adapter, hooks = traffic.adapter, traffic.hooks
    for module in (adapter.model, adapter.base):
        hooks.add(module.register_forward_pre_hook, traffic.before_forward, with_kwargs=True)
        hooks.add(module.register_forward_hook, traffic.after_forward, always_call=True)
        hooks.shadow(module, "forward", traffic.forward(module, module.forward))
    if not traffic.align:  # the public setter keeps the loss in this one instance attribute
        hooks.shadow(adapter.model, "_loss_function", gather_labels(adapter.model.loss_function, traffic.state))
    steps: dict[str, Callable[[Any], Any]] = {
        "generate": traffic.generate, compat.PREPARE: traffic.prepare, compat.PREFILL: lambda plain: refuse_chunked_prefill(plain, traffic.begin),
    }  # fmt: skip
    for name, around in steps.items():
        if hasattr(adapter.model, name):
            hooks.shadow(adapter.model, name, around(getattr(adapter.model, name)))


def _on_decoder(traffic: ModelHooks) -> None:
    adapter, hooks = traffic.adapter, traffic.hooks
    adapter.install(hooks, traffic.current_tokens)
    hooks.add(adapter.text_model.register_forward_pre_hook, traffic.before_decoder, with_kwargs=True, prepend=True)
    hooks.add(adapter.text_model.register_forward_hook, traffic.after_decoder, with_kwargs=True)
    if isinstance(getattr(adapter.text_model, "rotary_emb", None), nn.Module):
        hooks.add(adapter.text_model.rotary_emb.register_forward_hook, traffic.tabled, with_kwargs=True)
    for index, layer in enumerate(adapter.layers):
        hooks.add(_inside(layer).register_forward_pre_hook, traffic.before_layer, index, with_kwargs=True)


def _inside(layer: nn.Module) -> nn.Module:
    """A layer inside torch's checkpointing wrapper, where FSDP gathers its weights and where hidden states are captured."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)
