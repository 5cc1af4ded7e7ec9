"""Sizes of a model that cost predictions need, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

FULL, SLIDING, LINEAR = "full", "sliding", "linear"
KINDS = {"full_attention": FULL, "sliding_attention": SLIDING, "chunked_attention": SLIDING, "linear_attention": LINEAR}


@dataclass(frozen=True)
class ExpertDims:
    """A mixture in place of the MLP: every row visits ``active`` of ``count`` experts of width ``mlp``, and a shared
    one of width ``shared``."""

    count: int
    active: int
    mlp: int
    shared: int = 0


@dataclass(frozen=True)
class LinearAttentionDims:
    """A layer with a state instead of a cache (gated delta rule).

    Attributes
    ----------
    key_heads, value_heads : int
        Number of heads.
    key_dim, value_dim : int
        The state holds ``key_dim`` x ``value_dim`` numbers per value head.
    kernel : int
        Width of the short convolution.
    chunk : int
        Rows per update of the state.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    chunk: int = 64

    @property
    def mixed(self) -> int:
        """Channels of queries, keys and values together, which a short convolution runs over."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of a decoder.

    Attributes
    ----------
    layers, hidden : int
        Number and width of the layers.
    heads, kv_heads, head_dim : int
        Query heads, key heads, and width of each.
    mlp, vocab : int
        Width of the gated MLP; size of the vocabulary.
    kinds : tuple of str
        Attention type of each layer: "full", "sliding" (within ``window`` rows) or "linear"; empty: all are full.
    window : int or None
        Rows of a sliding window.
    linear : LinearAttentionDims or None
        Sizes of "linear" layers.
    experts : ExpertDims or None
        Sizes of the mixture of experts, if there is one.
    routed : tuple of bool
        True for layers with ``experts`` in place of the MLP; empty: all, where there are experts.
    gated : bool
        The query projection also makes a gate of the attention's output, so it is twice as wide.
    tied : bool
        The head is the embedding table.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    kinds: tuple[str, ...] = ()
    window: int | None = None
    linear: LinearAttentionDims | None = None
    experts: ExpertDims | None = None
    routed: tuple[bool, ...] = ()
    gated: bool = False
    tied: bool = False

    @property
    def wide(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def narrow(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """Output width of the query projection."""
        return self.wide * (1 + self.gated)

    def kind(self, layer: int) -> str:
        return self.kinds[layer] if self.kinds else FULL

    @property
    def attends(self) -> tuple[bool, ...]:
        """Per layer, True if it has attention, not a state."""
        return tuple(self.kind(layer) != LINEAR for layer in range(self.layers))

    def seen(self, rows: int, layer: int) -> int:
        """Number of ``rows`` that the newest one attends to in a layer."""
        return min(rows, self.window) if self.kind(layer) == SLIDING and self.window is not None else rows

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and (self.routed[layer] if self.routed else True)


def probed_layer(attends: Sequence[bool], drop: int, last: bool) -> int:
    """The layer through which the prediction's gradient runs, for a drop before layer ``drop``: the next one that
    ``attends``, or (``last``) the one before; -1 if there is none.

    A value written to a state fades on its way to the predicting positions, until rounding is all that comes back.
    """
    candidates = range(max(0, drop - 1), -1, -1) if last else range(drop, len(attends))
    return next((layer for layer in candidates if attends[layer]), -1)


@dataclass(frozen=True)
class VisionDims:
    """Sizes of a vision tower and its projector.

    Attributes
    ----------
    layers, width, mlp, mlp_matrices : int
        Number and width of the layers; width and number of matrices of their MLP.
    patches_per_token : int
        Patches that make one visual token.
    extra_rows : int
        CLS-like rows per image.
    patch_inputs : int
        Input numbers of a patch.
    projector : tuple of (int, int)
        (in, out) of its linear maps, those of further mergers included.
    full_layers : int or None
        Layers that attend to whole images; the others attend within windows. None: every layer does.
    window : int or None
        Patches of a window.
    towers : int
        Towers of this shape in the model (images and videos may have their own); an image passes through one.
    unread : int
        Last layers without use: stock models run them, an attached model does not (outside of training).
    deeper : tuple of int
        For each further merger: number of layers whose attention has run at its input.
    joined : bool
        All images of a call are concatenated in one row, over the whole of which every layer attends under a mask.
    """

    layers: int
    width: int
    mlp: int
    mlp_matrices: int
    patches_per_token: int
    extra_rows: int
    patch_inputs: int
    projector: tuple[tuple[int, int], ...]
    full_layers: int | None = None
    window: int | None = None
    towers: int = 1
    unread: int = 0
    deeper: tuple[int, ...] = ()
    joined: bool = False

    def read(self) -> VisionDims:
        """The tower without its unused last layers."""
        return replace(self, layers=self.layers - self.unread, unread=0)


def decoder_dims(config: Any) -> DecoderDims:
    """The sizes of a text config of the Llama layout: experts, windows and linear layers where it names them.

    Raises
    ------
    ValueError
        If a layer is of an unknown kind.
    """
    return DecoderDims(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=_first(config, "intermediate_size", "moe_intermediate_size") or 0,
        vocab=config.vocab_size,
        kinds=_kinds(config),
        window=_first(config, "sliding_window", "attention_chunk_size"),
        linear=_linear(config),
        experts=_experts(config),
        routed=_routed(config),
        gated=bool(getattr(config, "attn_output_gate", _linear(config) is not None)),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def _first(config: Any, *names: str) -> Any:
    """The first of these settings in the config."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _kinds(config: Any) -> tuple[str, ...]:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        return (SLIDING,) * config.num_hidden_layers if windowed else ()
    unknown = sorted(set(layer_types) - set(KINDS))
    if unknown:
        raise ValueError(f"decoder layers of kind {', '.join(unknown)}: costs are known for {', '.join(KINDS)} only")
    kinds = tuple(KINDS[name] for name in layer_types)
    return kinds if set(kinds) != {FULL} else ()


def _linear(config: Any) -> LinearAttentionDims | None:
    if LINEAR not in _kinds(config):
        return None
    return LinearAttentionDims(
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        kernel=config.linear_conv_kernel_dim,
    )


def _experts(config: Any) -> ExpertDims | None:
    count, active = (
        _first(config, "num_experts", "num_local_experts", "n_routed_experts"),
        getattr(config, "num_experts_per_tok", None),
    )
    if not count or not active:
        return None
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    shared = (
        getattr(config, "shared_expert_intermediate_size", None)
        or (getattr(config, "n_shared_experts", None) or 0) * width
    )
    return ExpertDims(count, active, width, shared)


def _routed(config: Any) -> tuple[bool, ...]:
    """Per layer, True if it has experts, from any of the three config styles; empty: all."""
    depth, layer_types = config.num_hidden_layers, getattr(config, "mlp_layer_types", None)
    if layer_types is not None:
        routed = tuple(name == "sparse" for name in layer_types)
    else:
        dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", None) or 1
        first = getattr(config, "first_k_dense_replace", None) or 0
        routed = tuple(i >= first and i not in dense and (i + 1) % step == 0 for i in range(depth))
    return () if all(routed) else routed
