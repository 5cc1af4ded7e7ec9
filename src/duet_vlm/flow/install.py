"""Every hook on one model, in the order in which they must stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from duet_vlm.flow import compat
from duet_vlm.flow.encoder import EncoderFlow
from duet_vlm.flow.entry import whole_prompts
from duet_vlm.flow.loss import surviving_labels
from duet_vlm.flow.own import own_module
from duet_vlm.flow.pieces import Pieces
from duet_vlm.flow.processor import SalientProcessor, accept_salient
from duet_vlm.flow.shown import Words, named_layers
from duet_vlm.flow.signals import Recorder, Weigher
from duet_vlm.flow.tower.hooks import TowerFlow, names_of
from duet_vlm.flow.tower.inside import InsideFlow, depth_of
from duet_vlm.flow.tower.joined import JoinedFlow
from duet_vlm.flow.tower.packed import PackedFlow
from duet_vlm.flow.traffic import Traffic
from duet_vlm.hooks import Hooks
from duet_vlm.models.adapter import Blocks, JoinedBlocks, PackedTower
from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer
from duet_vlm.tower import TowerReducer


def install(
    traffic: Traffic, reducer: Reducer, processor: Any, text_tower: Any, facts: dict[str, Any], pieces: Pieces | None = None
) -> None:
    """Put the hooks that ``reducer`` needs on the model, and its module if it has one; ``traffic.hooks`` takes them off again. ``facts`` are what
    weights must have been trained for."""
    traffic.module = own_module(traffic.adapter, reducer, facts, traffic.hooks)
    _on_tower(traffic, reducer, Words(text_tower, getattr(processor, "tokenizer", None)), pieces or Pieces())
    _on_model(traffic)
    _on_decoder(traffic)
    if processor is not None:
        traffic.hooks.on_undo(SalientProcessor(processor, traffic.adapter.image_token_id).remove)
    model, hooks = traffic.adapter.model, traffic.hooks
    if processor is not None or isinstance(reducer, DecoderReducer):
        hooks.shadow(model, "prepare_inputs_for_generation", accept_salient(model.prepare_inputs_for_generation))


def _on_tower(traffic: Traffic, reducer: Reducer, words: Words, pieces: Pieces) -> None:
    adapter, hooks = traffic.adapter, traffic.hooks
    encoder = EncoderFlow(adapter, traffic.stacks, traffic.begun, words, pieces)
    named = encoder.named = named_layers(adapter, reducer)
    encoder.module = traffic.module
    for attention in dict.fromkeys(module for modules in named.attentions for module in modules):
        hooks.on_undo(Recorder(attention, traffic.stacks).remove)
        hooks.add(attention.register_forward_hook, encoder.after_attention)
    for block in dict.fromkeys(module for modules in named.blocks for module in modules):
        hooks.add(block.register_forward_hook, encoder.after_block)
    if "projector" in getattr(reducer, "reads", ()):
        hooks.add(adapter.projector().register_forward_pre_hook, encoder.asks_projector, with_kwargs=True)
    unread = adapter.unread_layers()
    if not named.read(unread):
        encoder.skipping = bool(unread)
        for layer in map(_inside, unread):
            hooks.shadow(layer, "forward", encoder.instead_of(layer.forward))
    if isinstance(reducer, EncoderReducer) and reducer.cls_token:
        hooks.add(adapter.cls_module().register_forward_hook, traffic.record_cls)
    if adapter.pointwise is not None:
        hooks.add(adapter.pointwise.register_forward_pre_hook, encoder.before_projector)
        hooks.add(adapter.pointwise.register_forward_hook, encoder.after_projector)
    if isinstance(reducer, EncoderReducer) and reducer.tower is not None:
        _in_tower(traffic, reducer)
    for stream in adapter.streams:
        hooks.shadow(adapter.base, stream.encode, encoder.wrap(getattr(adapter.base, stream.encode), stream))


def _in_tower(traffic: Traffic, reducer: EncoderReducer) -> None:
    adapter, stacks, hooks = traffic.adapter, traffic.stacks, traffic.hooks
    batch, joined, packed = TowerFlow(adapter, stacks), JoinedFlow(adapter, stacks), PackedFlow(adapter, stacks)
    for blocks in adapter.blocks_to_reduce():
        depth = depth_of(blocks, adapter, reducer)
        within = isinstance(reducer.tower, TowerReducer) and reducer.tower.inside
        if within or isinstance(blocks, PackedTower) or not blocks.takes_mask:
            for number, inside in enumerate(blocks.inside):
                hooks.on_undo(Weigher(inside.attention, stacks, number).remove)
        if isinstance(blocks, PackedTower):
            tower = blocks.module
            hooks.shadow(tower, "forward", packed.around(blocks, depth, tower.forward, tower.patch_embed))
            hooks.shadow(tower.patch_embed, "forward", packed.embedding(tower.patch_embed.forward))
        else:
            flow = joined if isinstance(blocks, JoinedBlocks) else batch
            hooks.add(blocks.patches.register_forward_hook, flow.embedded)
            hooks.add(blocks.stack.register_forward_pre_hook, flow.enter, blocks, depth, names_of(blocks.stack), with_kwargs=True)
            hooks.add(blocks.tower.register_forward_hook, flow.leave)
        if within:
            _in_blocks(hooks, blocks, depth, InsideFlow(batch))
            hand_over = packed.hand_over if isinstance(blocks, PackedTower) else joined.hand_over
            for inside in blocks.inside[1:] if isinstance(blocks, PackedTower | JoinedBlocks) else ():
                hooks.add(inside.block.register_forward_pre_hook, hand_over, with_kwargs=True)
            for merger in blocks.mergers if isinstance(blocks, PackedTower) else ():
                hooks.add(merger.register_forward_hook, packed.merged)


def _in_blocks(hooks: Hooks, blocks: Blocks | PackedTower, depth: int, flow: InsideFlow) -> None:
    for number, inside in enumerate(blocks.inside[:depth]):
        hooks.add(inside.norm.register_forward_pre_hook, flow.middle, number)
        hooks.add(inside.mlp.register_forward_hook, flow.spread, number)
        hooks.add(inside.block.register_forward_hook, flow.end, number)


def _on_model(traffic: Traffic) -> None:
    adapter, hooks = traffic.adapter, traffic.hooks
    for module in (adapter.model, adapter.base):
        hooks.add(module.register_forward_pre_hook, traffic.called, with_kwargs=True)
        hooks.add(module.register_forward_hook, traffic.answered, always_call=True)
        hooks.shadow(module, "forward", traffic.forward(module, module.forward))
    if not traffic.align:  # the public setter keeps the loss in this one instance attribute
        hooks.shadow(adapter.model, "_loss_function", surviving_labels(adapter.model.loss_function, traffic.stacks))
    steps: dict[str, Callable[[Any], Any]] = {
        "generate": traffic.generate, compat.PREPARE: traffic.prepare, compat.PREFILL: lambda plain: whole_prompts(plain, traffic.begun),
    }  # fmt: skip
    for name, around in steps.items():
        if hasattr(adapter.model, name):
            hooks.shadow(adapter.model, name, around(getattr(adapter.model, name)))


def _on_decoder(traffic: Traffic) -> None:
    adapter, hooks = traffic.adapter, traffic.hooks
    adapter.install(hooks, traffic.running)
    hooks.add(adapter.text_model.register_forward_pre_hook, traffic.enter, with_kwargs=True, prepend=True)
    hooks.add(adapter.text_model.register_forward_hook, traffic.leave, with_kwargs=True)
    if isinstance(getattr(adapter.text_model, "rotary_emb", None), nn.Module):
        hooks.add(adapter.text_model.rotary_emb.register_forward_hook, traffic.tabled, with_kwargs=True)
    for index, layer in enumerate(adapter.layers):
        hooks.add(_inside(layer).register_forward_pre_hook, traffic.at_layer, index, with_kwargs=True)


def _inside(layer: nn.Module) -> nn.Module:
    """A layer inside torch's checkpointing wrapper, where FSDP gathers its weights and where hidden states are captured."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)
