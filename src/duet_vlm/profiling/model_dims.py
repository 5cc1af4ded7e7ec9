"""The sizes that cost predictions need, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

FULL, SLIDING, LINEAR = "full", "sliding", "linear"
KINDS = {"full_attention": FULL, "sliding_attention": SLIDING, "chunked_attention": SLIDING, "linear_attention": LINEAR}


@dataclass(frozen=True)
class ExpertDims:
    """A mixture in place of the MLP: every row visits ``active`` of ``count`` experts of width ``mlp``, and a shared one of width ``shared``."""

    count: int
    active: int
    mlp: int
    shared: int = 0


@dataclass(frozen=True)
class LinearAttentionDims:
    """A layer with a state instead of a cache (gated delta rule): per value head ``key_dim`` x ``value_dim`` numbers, updated by ``chunk`` rows."""

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
    """A decoder: ``layers`` of width ``hidden``, ``heads`` query and ``kv_heads`` key heads of ``head_dim``, gated MLP of ``mlp``.

    Attributes
    ----------
    kinds : tuple of str
        What each layer's attention is: "full", "sliding" (within ``window`` rows) or "linear"; empty: all are full.
    routed : tuple of bool
        Which layers have ``experts`` in place of the MLP; empty: all, where there are experts.
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
        """What the query projection makes of one row."""
        return self.wide * (1 + self.gated)

    def kind(self, layer: int) -> str:
        return self.kinds[layer] if self.kinds else FULL

    @property
    def attends(self) -> tuple[bool, ...]:
        """Which layers have attention, and no state."""
        return tuple(self.kind(layer) != LINEAR for layer in range(self.layers))

    def seen(self, rows: int, layer: int) -> int:
        """How many of ``rows`` the newest one sees in a layer."""
        return min(rows, self.window) if self.kind(layer) == SLIDING and self.window is not None else rows

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and (self.routed[layer] if self.routed else True)


def probed_layer(attends: Sequence[bool], drop: int, last: bool) -> int:
    """The layer that a gradient in front of layer ``drop`` goes through: the next one that ``attends``, or (``last``) the one that did before; -1 if
    there is none. What a row writes into a state fades on its way to the rows that predict, until rounding is all that comes back."""
    way = range(max(0, drop - 1), -1, -1) if last else range(drop, len(attends))
    return next((layer for layer in way if attends[layer]), -1)


@dataclass(frozen=True)
class VisionDims:
    """A vision tower and its projector.

    ``patches_per_token`` patches make one visual token; ``extra_rows`` are CLS-like rows; ``projector`` lists (in, out) of its linear maps,
    those of further mergers included; all but ``full_layers`` layers attend within windows of ``window`` patches (None: every layer is full).
    The model holds ``towers`` of this shape (images and clips may have their own); a picture goes through one. Nobody reads its last
    ``unread`` layers: stock models run them all the same, an attached model does not (outside of training). ``deeper``: the attention of how many
    layers has run where each of the further mergers looks. ``joined``: all pictures of a call stand in one row, over the whole of which every layer
    attends under a mask.
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
    """Read the sizes from a text config of the Llama layout: experts, windows and linear layers where it names them.

    Raises
    ------
    ValueError
        If a layer is of a kind that is not known here.
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
    """The first of these settings that the config has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _kinds(config: Any) -> tuple[str, ...]:
    named = getattr(config, "layer_types", None)
    if named is None:
        windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        return (SLIDING,) * config.num_hidden_layers if windowed else ()
    unknown = sorted(set(named) - set(KINDS))
    if unknown:
        raise ValueError(f"decoder layers of kind {', '.join(unknown)}: costs are known for {', '.join(KINDS)} only")
    kinds = tuple(KINDS[name] for name in named)
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
    count, active = _first(config, "num_experts", "num_local_experts", "n_routed_experts"), getattr(config, "num_experts_per_tok", None)
    if not count or not active:
        return None
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    shared = getattr(config, "shared_expert_intermediate_size", None) or (getattr(config, "n_shared_experts", None) or 0) * width
    return ExpertDims(count, active, width, shared)


def _routed(config: Any) -> tuple[bool, ...]:
    """Which layers have experts, as configs say it in three ways; empty: all."""
    depth, named = config.num_hidden_layers, getattr(config, "mlp_layer_types", None)
    if named is not None:
        routed = tuple(name == "sparse" for name in named)
    else:
        dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", None) or 1
        first = getattr(config, "first_k_dense_replace", None) or 0
        routed = tuple(i >= first and i not in dense and (i + 1) % step == 0 for i in range(depth))
    return () if all(routed) else routed
