"""What the flow must know about a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from duet_vlm.ops.ragged import upload
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims, decoder_dims, probed_layer
from duet_vlm.utils.hooks import Hooks

Rotary = tuple[Tensor, Tensor]
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class RecordedQK:
    """One call of the recorded vision attention: query, key [B, H, N, d] (keys grouped if the tower groups them) and its scaling.

    ``segments`` are lengths along N that do not see each other (several images packed in one row), None for one segment per row. ``sample``:
    how many query rows of each stand for all, where tokens are ranked by what they receive; None: all ask. ``size`` [B, N]: in a tower that
    was reduced, how many rows each one stands for, 0 for those that are gone.
    """

    query: Tensor
    key: Tensor
    scaling: float
    segments: Tensor | None = None
    sample: int | None = None
    size: Tensor | None = None


@dataclass(frozen=True)
class BlockModules:
    """One block of a vision tower, and inside it: its attention, the norm behind that, which is given the residual stream, and its MLP."""

    block: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class TowerBlocks:
    """The part of a vision tower that works on rows, where patches can leave: P pictures of N patches each, row by row.

    ``patches`` makes patch embeddings [P, D, h, w]; ``stack`` runs the blocks on [P, extra + N, D];
    ``tower`` is the module around it, whose output holds the last rows and those of every layer. ``extra`` rows (CLS) stand in front of the
    patches; ``cell`` x ``cell`` patches later become one token, and leave or stay together. ``inside``: the blocks; ``read``: the first whose
    rows somebody reads. ``takes_mask``: the stack hands its blocks a mask.
    """

    tower: nn.Module
    patches: nn.Module
    stack: nn.Module
    block_modules: tuple[BlockModules, ...]
    output_block: int
    num_cls: int = 0
    patch_grid: int = 1
    takes_mask: bool = True


@dataclass(frozen=True)
class ConcatenatedBlocks(TowerBlocks):
    """The same of a tower whose pictures, of any size, stand one behind the other in a batch of one. ``grids(call)``: rows and columns of
    patches of each, of ``patch`` x ``patch`` pixels."""

    grids: Callable[[Encoding], list[tuple[int, int]]] = field(kw_only=True)
    patch: int = field(kw_only=True)


@dataclass(frozen=True)
class VarlenTower:
    """A tower that packs the patches of all pictures into one row, the ``unit`` patches of a token beside each other, each of ``steps`` frames of
    ``patch`` x ``patch`` pixels.

    ``tables(grid, units, counts)`` makes of the units that are left [K] (ascending; ``counts`` of each picture) what the tower's forward takes
    ready-made, where these units stand in the order that the blocks work in [K], and where the blocks, in their order, would have had them in the
    whole row [K]; ``grid`` is the tower's own argument, on the host. ``mergers`` make one row of each unit, in the order of the blocks.
    """

    module: Any
    unit: int
    steps: int
    patch: int
    tables: Callable[[Tensor, Tensor, tuple[int, ...]], tuple[dict[str, Any], Tensor, Tensor]]
    block_modules: tuple[BlockModules, ...]
    mergers: tuple[nn.Module, ...]

    @property
    def output_block(self) -> int:
        """The first block whose rows somebody reads."""
        return len(self.block_modules) - 1


@dataclass(frozen=True)
class Encoding:
    """One encoder call: its stream, on the host the size of each span as the family's processor writes it, and all its arguments."""

    stream: str
    sizes: list[list[int]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    _read: dict[str, list[int]] = field(default_factory=dict, compare=False)

    def numbers(self, name: str) -> list[int] | None:
        """An argument that is a few numbers; read from the device once."""
        if self.arguments.get(name) is None:
            return None
        if name not in self._read:
            self._read[name] = torch.as_tensor(self.arguments[name], device="cpu").tolist()
        return self._read[name]


@dataclass(frozen=True)
class Modality:
    """One kind of visual input: its name in ``mm_encoder_outputs``, the method of ``base`` that encodes it, the placeholder id in
    ``input_ids``, the argument that brings its pixels and, where sizes are free, the argument that brings those. ``each``: V2V takes the
    parts of a span (crops, frames) one by one unless the method's settings say otherwise."""

    name: str
    encode: str
    token_id: int
    pixels: str
    sizes: str | None = None
    each: bool = False

    def encoding(self, arguments: dict[str, Any]) -> Encoding:
        """What is to be known of a call with these arguments; sizes are read from the device here, once."""
        sizes = arguments.get(self.sizes) if self.sizes else None
        return Encoding(self.name, [] if sizes is None else torch.as_tensor(sizes, device="cpu").tolist(), arguments)


class Adapter(ABC):
    """A family. Subclasses say in their attributes and methods what differs from the usual; nothing else knows the family.

    Attributes
    ----------
    model, base, text_model : nn.Module
        The model with head, the multimodal model inside it, and its decoder stack.
    decoder : str
        What the multimodal model calls its decoder stack.
    layers : nn.ModuleList
        Decoder layers.
    image_token_id : int
        Placeholder id of images in ``input_ids``.
    streams : tuple of Stream
        The visual inputs; images unless the family says more.
    pointwise : nn.Module or None
        Point-wise projector, where there is one: V2V then runs before it. None: V2V runs after the encoder call (grid mergers).
    fixed_tokens : int or None
        Visual tokens per image where the tower fixes them.
    lacks : dict
        What methods may ask for (the values of ``reducers.inputs.Input``) and this family cannot give, with the reason.
    has_cls : bool
        The tower has a CLS row (importance = CLS attention); otherwise column sums.
    feeds_cls : bool
        The stock model feeds the CLS row to the decoder as first visual token.
    feeds_padding : bool
        Patches that are nothing but padding become tokens, too.
    mrope : bool
        Positions have several rows (time, height, width) and cannot be renumbered.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    video: ClassVar[bool | str] = False  # "as images": the processor hands frames over as images
    notes: ClassVar[str] = ""
    unsupported: ClassVar[dict[str, str]] = {"text_similarity": "its vision tower is no CLIP tower, so no text tower shares a space with its tokens"}
    example: ClassVar[str] = ""

    decoder: ClassVar[str] = "language_model"

    pointwise_projector: nn.Module | None = None
    fixed_tokens: int | None = None
    has_cls = False
    feeds_cls = False
    feeds_padding = False
    mrope = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.base: Any = model.model
        self.text_model: Any = getattr(self.base, self.decoder)
        self.layers: nn.ModuleList = self.text_model.layers
        self.config: Any = model.config
        self.image_token_id: int = self.config.image_token_id

    # ---- which models

    @classmethod
    def serves(cls, config: Any) -> bool:
        """Whether models with this config are of this family."""
        return getattr(config, "model_type", None) in cls.model_types

    @abstractmethod
    def check(self) -> None:
        """Raise a clear error for configurations of this family that cannot be right."""

    def install(self, hooks: Hooks, running: Callable[[], TokenMap | None]) -> None:
        """More hooks, where a family does something else with rows; ``running`` is the map of the decoder layer that just ran."""
        return None

    # ---- the prompt

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (Modality("image", "get_image_features", self.image_token_id, "pixel_values"),)

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Tensor]:
        """Per stream [B, S] bool: rows that will hold its visual tokens, by id or (as the stock model does) by embedding."""
        if input_ids is not None:
            return {stream.name: input_ids == stream.token_id for stream in self.modalities}
        assert inputs_embeds is not None
        embed, device = self.base.get_input_embeddings(), inputs_embeds.device
        tokens = {stream.name: embed(upload(stream.token_id, device)) for stream in self.modalities}
        return {name: (inputs_embeds == token).all(-1) for name, token in tokens.items()}

    def placeholder_ids(self, stream: Modality, tokens: int, parts: tuple[int, ...]) -> list[int]:
        """Token ids that a prompt shows a span of ``tokens`` with, whose parts (crops, frames) the tower saw as ``parts``."""
        return [stream.token_id] * tokens

    # ---- the tower

    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower, without the projector."""

    @abstractmethod
    def projector(self) -> nn.Module:
        """What maps vision features to the decoder's width."""

    def unused_tower_layers(self) -> Sequence[nn.Module]:
        """Layers of the tower behind the one that the features come from: stock models run them for nothing."""
        return ()

    def uses_default_layers(self, call: Encoding) -> bool:
        """Whether an encoder call takes its features where the config says, and the caller did not request the layers' own outputs."""
        return True

    def layers_before_signals(self) -> Sequence[nn.Module]:
        """Vision layers whose outputs neither the features nor any default signal reads: the same for every method on the same pictures."""
        return ()

    def cls_module(self) -> nn.Module:
        """The vision layer whose output's first row is the CLS feature."""
        raise TypeError(f"{self.family}: this vision tower has no CLS row, so cls_token=True (official LLaVA presets) cannot work")

    def blank_image(self) -> dict[str, Tensor]:
        """The encoder call's arguments for one small blank image: here of the one size that the tower takes."""
        vision, weight = self.config.vision_config, next(self.tower().parameters())
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.zeros(size, dtype=weight.dtype, device=weight.device)}

    def blocks_to_reduce(self) -> tuple[TowerBlocks | VarlenTower, ...]:
        """Where patches can leave inside the tower, one for each tower; a TypeError says why not."""
        raise TypeError(f"{self.family}: reducing inside this vision tower is not supported; use a method that reduces behind it (duet, visionzip)")

    def cell_of(self, call: Encoding, blocks: TowerBlocks) -> int:
        """How many patches high and wide what later becomes one token is."""
        return blocks.patch_grid

    def attends_globally(self, layer: int) -> bool:
        """Whether a tower layer attends to whole pictures, not within windows."""
        return True

    def images_of(self, call: Encoding, count: int, tokens: int) -> list[tuple[int, ...]]:
        """Per span the tokens of each of the ``count`` pictures that stand in the tower's batch, each of ``tokens``: one picture a span unless
        the family says more."""
        together = self.projected_together(call)
        return [(tokens,) * together] * (count // together)

    def num_separator_rows(self, call: Encoding, spans: int) -> list[int]:
        """Per span the rows that show no picture (newlines)."""
        return [0] * spans

    def num_cls_rows(self, call: Encoding) -> int:
        """How many rows of each picture that are no patches (CLS) become tokens."""
        return int(self.feeds_cls)

    def patches_to_tokens(self, patches: Tensor, call: Encoding) -> list[Tensor]:
        """Numbers of patches [P, N, c] as those of the tokens that they become: per span [n, c], means where several make one, ones for
        rows that are no patches."""
        return list(nn.functional.pad(patches, (0, 0, self.num_cls_rows(call), 0), value=1.0))

    def real_patches(self, call: Encoding, pictures: int) -> Tensor | None:
        """[P, N] bool, False for patches that are nothing but padding, or that no token shows; None where there are none."""
        return None

    # ---- what ranks and merges before the decoder

    @abstractmethod
    def vision_attention(self, layer: int | None) -> nn.Module:
        """The attention module to record; ``layer`` None leaves the choice to the family."""

    def vision_attentions(self, layer: int | None) -> list[nn.Module]:
        """All modules to record: one in each tower, where images and clips have their own."""
        return [self.vision_attention(layer)]

    @abstractmethod
    def importance_and_keys(self, calls: list[RecordedQK], call: Encoding, segmented: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Per span, in call order: importance [n] and mean keys [n, d] of its rows (a CLS row excluded; anything for structure rows).

        ``segmented`` keeps the tower's own attention segments.
        """

    def token_rows(self, rows: Tensor, call: Encoding) -> list[Tensor]:
        """Rows as the tower's blocks have them [P, R, c] (CLS in front) as those of the tokens that they become: per span [n, c], means where
        several make one, anything for structure rows."""
        return self.patches_to_tokens(rows[:, int(self.has_cls) :], call)

    def unpack_to_spans(self, projected: Tensor, call: Encoding) -> list[Tensor]:
        """What the projector made [..., c] as rows of spans [n, c], anything for structure rows: one picture a span unless the family says
        more."""
        return list(projected)

    # ---- what a call made: spans, their parts and their grids

    def tokens_per_crop(self, call: Encoding, counts: list[int]) -> list[tuple[int, ...]]:
        """Per span: visual tokens of each part that the tower looks at by itself (crops, frames). One part unless the family says more."""
        return [(count,) for count in counts]

    def spare(self, call: Encoding) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per span, of each part: patches that become no token, and patches of padding around it that are embedded with it. Empty: there are none."""
        return ()

    def projected_rows(self, call: Encoding, counts: list[int]) -> list[int]:
        """Per span: rows that the projector works on where V2V leaves them all to it: what the tower made, unless the family pools first."""
        return [sum(sizes) for sizes in self.tokens_per_crop(call, counts)]

    @abstractmethod
    def grids(self, call: Encoding, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        """(rows, columns) of each span's token grid, None where it has none."""

    def grid_sizes(self, call: Encoding, counts: list[int]) -> list[tuple[int, int]]:
        """Per span: rows and columns of each of its parts, in tokens where nothing is cut off."""
        grids, parts = self.grids(call, counts), self.tokens_per_crop(call, counts)
        if None in grids:
            raise TypeError(f"{self.family}: what this model makes of a picture has no grid; use a method that needs none (duet, vispruner)")
        return [(grid[0] // len(sizes), grid[1]) for grid, sizes in zip(grids, parts, strict=True) if grid is not None]

    def token_coords(self, call: Encoding, counts: list[int]) -> list[Tensor]:
        """Per span, on the host: row and column of each of its rows within its part [n, 2], -1 for those that show no patch of a picture."""
        fed, places = self.num_cls_rows(call), []
        for (_, columns), numbers in zip(self.grid_sizes(call, counts), self.parts(call, counts), strict=True):
            number, part = np.arange(len(numbers)), numbers.numpy()
            begins = np.maximum.accumulate(np.where(np.diff(part, prepend=-2) != 0, number, 0))
            place = number - begins - fed
            shows = (place >= 0) & (part >= 0)
            places.append(torch.from_numpy(np.where(shows[:, None], np.stack([place // columns, place % columns], 1), -1)))
        return places

    def temporal_patch_size(self) -> int:
        """How many frames of a clip the tower looks at as one step of time, each step by itself: a clip then goes through it in pieces. A TypeError
        says why it cannot."""
        why = "takes frames as images" if self.video else "takes no clips"
        raise TypeError(f"{self.family} {why}, so frames cannot go through its tower some at a time: leave chunk_frames and still_frames out")

    def steps(self, call: Encoding) -> list[Tensor]:
        """Of each clip of a call the pixels of its steps of time, patch by patch: [t, n, m]."""
        raise NotImplementedError

    def slice_frames(self, call: Encoding, clip: int, chosen: Sequence[int]) -> Encoding:
        """A call that shows only the ``chosen`` steps of one clip."""
        raise NotImplementedError

    def crop_grids(self, call: Encoding, counts: list[int]) -> list[tuple[int, int]]:
        """Per span: rows and columns of the crops that follow its first part, (0, 0) where it was not cut."""
        return [(0, 0)] * len(counts)

    def parts(self, call: Encoding, counts: list[int]) -> list[Tensor]:
        """Per span, on the host: the part (crop, frame) that each of its rows shows [n], -1 for structure rows (newlines)."""
        return [torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)) for sizes in self.tokens_per_crop(call, counts)]

    def spans(self, output: Any, call: Encoding) -> list[Tensor]:
        """The projected rows of each span, as ``output.pooler_output`` holds them (families that return frames one by one join them there)."""
        return list(output.pooler_output)

    def projected_together(self, call: Encoding) -> int:
        """How many consecutive rows of the projector's batch (frames) make one span."""
        return 1

    # ---- the decoder, and what ranks inside it

    @property
    def layer_types(self) -> list[str]:
        """What mixes the rows of each decoder layer, in transformers' words: full_attention, sliding_attention, linear_attention, ..."""
        config = self.text_model.config
        usual = FULL if getattr(config, "sliding_window", None) is None else SLIDING  # configs that name no types window every layer
        return list(getattr(config, "layer_types", None) or [usual] * len(self.layers))

    def ranking_layer(self, layer: int, states: bool = False) -> int:
        """The last layer up to ``layer`` whose attention can rank tokens, or (``states``) what is read out of whose state; -1 if there is none."""
        kinds, able = self.layer_types, (FULL, SLIDING, LINEAR) if states else (FULL, SLIDING)
        return next((index for index in range(layer, -1, -1) if kinds[index] in able), -1)

    def probed_layer(self, drop: int, last: bool) -> int:
        """The layer that a gradient in front of layer ``drop`` goes through (``measure.shapes.probed_layer``)."""
        return probed_layer([kind != LINEAR for kind in self.layer_types], drop, last)

    @property
    def first_attention(self) -> int:
        """The first layer with keys and values: its cache is as long as the sequence."""
        return next(index for index, kind in enumerate(self.layer_types) if kind in (FULL, SLIDING))

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str) -> Rotary:
        """(cos, sin) of a layer of type ``kind`` for 1-D positions [B, n]."""
        return self.text_model.rotary_emb(hidden, position_ids)

    @abstractmethod
    def project(self, layer: nn.Module, hidden: Tensor, rotary: Rotary, asking: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows ``hidden`` [B, n, D] entering ``layer``: rotated queries [B, H, q, d] of rows ``asking`` [B, q], rotated keys
        [B, Hkv, n, d] of all."""

    def linear_attention_scores(self, layer: nn.Module, hidden: Tensor, valid: Tensor, asking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows ``hidden`` [B, n, D] entering a layer with a state, of which ``valid`` [B, n] are real: what rows ``asking`` [B, q] read it with
        [B, H, q, d], at what the rows write into it [B, H, n, d], and how strongly [B, H, n], all float32. The product of the three, without what
        fades in between, says how much of a row's own value one that asks can read."""
        raise TypeError(f"{self.family}: what its layers with a state read is not known here; use a method that ranks by attention")

    rotate: Callable[[Tensor, Rotary], Tensor]  # rows [B, H, n, d] of queries or keys to their positions, as the decoder's layers do it

    @abstractmethod
    def key_projection(self, layer: nn.Module) -> nn.Module | None:
        """The module that ``project`` and the layer itself call for keys and nothing else; None if there is none."""

    @abstractmethod
    def modules_run_for_scores(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that ``project`` runs on all rows, and the layer itself on those that are left, once each."""

    @abstractmethod
    def scaling(self, layer: nn.Module) -> float:
        """What the layer multiplies products of queries and keys by."""

    # ---- sizes, for cost predictions

    def decoder_dims(self) -> DecoderDims:
        """Sizes of the decoder, for cost predictions."""
        return decoder_dims(self.config.text_config)

    @abstractmethod
    def vision_dims(self) -> VisionDims:
        """Sizes of tower and projector, for cost predictions."""
