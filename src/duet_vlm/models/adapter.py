"""The interface of a model family: everything the runtime needs to know of it."""

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
# what a decoder does to hidden states [B, T, D] of some tokens between two layers
StateChange = Callable[[Tensor, TokenMap], Tensor]
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class RecordedQK:
    """Queries and keys of one call of the recorded vision attention.

    Attributes
    ----------
    query, key : Tensor [B, H, N, d]
        Before the product; keys are grouped if the tower groups them.
    scaling : float
        Factor of the product.
    segments : Tensor or None
        Lengths along N of segments that do not attend to each other (several images packed in one row); None: one
        segment per row.
    sample : int or None
        Number of query positions that represent all of them where tokens are ranked by the attention they receive;
        None: all are queries.
    size : Tensor [B, N] or None
        In a reduced tower: number of patches that each position represents, 0 for dropped ones.
    """

    query: Tensor
    key: Tensor
    scaling: float
    segments: Tensor | None = None
    sample: int | None = None
    size: Tensor | None = None


@dataclass(frozen=True)
class BlockModules:
    """One block of a vision tower: the block, its attention, the norm after the attention (its input is the residual
    stream), and its MLP."""

    block: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class TowerBlocks:
    """The part of a vision tower in which patches can be dropped, for towers with a batch of P images of N patches
    each.

    Attributes
    ----------
    tower : nn.Module
        The module around the stack; its output holds the last hidden states and those of every layer.
    patches : nn.Module
        Makes patch embeddings [P, D, h, w].
    stack : nn.Module
        Runs the blocks on [P, num_cls + N, D].
    block_modules : tuple of BlockModules
        The blocks in order.
    output_block : int
        The first block whose output is used outside the stack.
    num_cls : int
        Number of CLS positions before the patches.
    patch_grid : int
        ``patch_grid`` x ``patch_grid`` patches become one token; they are dropped or kept together.
    takes_mask : bool
        The stack passes an attention mask to its blocks.
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
    """Blocks of a tower that concatenates images of any size along the sequence, in a batch of one.

    Attributes
    ----------
    grids : callable
        ``grids(call)``: rows and columns of patches of each image.
    patch : int
        A patch is ``patch`` x ``patch`` pixels.
    """

    grids: Callable[[EncoderCall], list[tuple[int, int]]] = field(kw_only=True)
    patch: int = field(kw_only=True)


@dataclass(frozen=True)
class VarlenTower:
    """A tower that packs the patches of all pictures into one row.

    Attributes
    ----------
    module : nn.Module
        The tower.
    unit : int
        Patches of a token, which stand side by side.
    steps : int
        Frames in a patch.
    patch : int
        A patch is ``patch`` x ``patch`` pixels of each frame.
    tables : callable
        ``tables(grid, units, counts)``, of the units that are left [K] (ascending; ``counts`` of each picture): what
        the tower's forward takes ready-made, the places of these units in the order that the blocks work in [K], and
        the places that the blocks, in their order, would have given them in the whole row [K]. ``grid`` is the tower's
        own argument, on the host.
    block_modules : tuple of BlockModules
        The blocks in order.
    mergers : tuple of nn.Module
        Modules that make one row of each unit, in the order of the blocks.
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
        """The first block whose output is used outside the stack."""
        return len(self.block_modules) - 1


@dataclass(frozen=True)
class EncoderCall:
    """One encoder call: its modality, the size of each span on the host as the family's processor writes it, and all
    its arguments."""

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
    """One kind of visual input.

    Attributes
    ----------
    name : str
        Its name in ``mm_encoder_outputs``.
    encode : str
        The method of ``base`` that encodes it.
    token_id : int
        Placeholder id in ``input_ids``.
    pixels : str
        The argument with its pixels.
    sizes : str or None
        The argument with its sizes, where they are free.
    each : bool
        The encoder stage reduces the parts of a span (crops, frames) one by one unless the method's settings say
        otherwise.
    """

    name: str
    encode: str
    token_id: int
    pixels: str
    sizes: str | None = None
    each: bool = False

    def encoding(self, arguments: dict[str, Any]) -> EncoderCall:
        """The encoder call with these arguments; the sizes are copied from the device here, once."""
        sizes = arguments.get(self.sizes) if self.sizes else None
        return EncoderCall(self.name, [] if sizes is None else torch.as_tensor(sizes, device="cpu").tolist(), arguments)


class Adapter(ABC):
    """A family. Subclasses say in their attributes and methods what differs from the usual; nothing else knows the
    family.

    A family must have ``family``, ``model_types``, ``example``, ``notes``, the methods marked abstract and ``rotate``
    (``LlamaLike`` has one); everything else has the usual value.

    Attributes
    ----------
    family : str
        Name of the family, as users write it.
    model_types : tuple of str
        ``model_type`` of the configurations that it serves.
    example : str
        A checkpoint of the family on a model hub.
    video : bool or str
        Clips are visual inputs; "as images": the processor hands frames over as images.
    notes : str
        A sentence for the list of families: what is special.
    model, base, text_model : nn.Module
        The model with head, the multimodal model inside it, and its decoder stack.
    decoder : str
        What the multimodal model calls its decoder stack.
    layers : nn.ModuleList
        Decoder layers.
    image_token_id : int
        Placeholder id of images in ``input_ids``.
    modalities : tuple of Modality
        The visual inputs; images unless the family says more.
    pointwise_projector : nn.Module or None
        Projector that maps each token by itself: methods before the decoder then reduce its input. None: they reduce
        the output of the encoder call (grid mergers).
    fixed_tokens : int or None
        Visual tokens per image where the tower fixes them.
    unsupported : dict
        Inputs of methods (values of ``reducers.inputs.Input``) that this family cannot make, with the reason.
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
    video: ClassVar[bool | str] = False
    notes: ClassVar[str] = ""
    unsupported: ClassVar[dict[str, str]] = {
        "text_similarity": "its vision tower is no CLIP tower, so no text tower shares a space with its tokens"
    }
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
        """True if models with this config belong to this family."""
        return getattr(config, "model_type", None) in cls.model_types

    @abstractmethod
    def check(self) -> None:
        """Raise a clear error for configurations of this family that cannot be right."""

    def install(
        self, hooks: Hooks, running: Callable[[], TokenMap | None], change_sleeping: Callable[[StateChange], None]
    ) -> None:
        """Install further hooks, for families that compute with hidden states elsewhere; ``running`` returns the map of
        the layer that just ran, ``change_sleeping`` applies a change to the tokens that it left out and that may come
        back."""
        return None

    # ---- the prompt

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (Modality("image", "get_image_features", self.image_token_id, "pixel_values"),)

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Tensor]:
        """Per modality [B, S] bool: positions of its visual tokens, by id or (as the stock model does) by embedding."""
        if input_ids is not None:
            return {stream.name: input_ids == stream.token_id for stream in self.modalities}
        assert inputs_embeds is not None
        embed, device = self.base.get_input_embeddings(), inputs_embeds.device
        tokens = {stream.name: embed(upload(stream.token_id, device)) for stream in self.modalities}
        return {name: (inputs_embeds == token).all(-1) for name, token in tokens.items()}

    def placeholder_ids(self, modality: Modality, tokens: int, parts: tuple[int, ...]) -> list[int]:
        """Token ids of a span of ``tokens`` in a prompt; ``parts``: tokens of each of its parts (crops, frames)."""
        return [modality.token_id] * tokens

    # ---- the tower

    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower, without the projector."""

    @abstractmethod
    def projector(self) -> nn.Module:
        """The module that maps vision features to the decoder's width."""

    def unused_tower_layers(self) -> Sequence[nn.Module]:
        """Layers of the tower after the one that the features come from; stock models run them without use."""
        return ()

    def uses_default_layers(self, call: EncoderCall) -> bool:
        """True if an encoder call takes its features from the config's layer, and the caller did not request the
        layers' own outputs."""
        return True

    def layers_before_signals(self) -> Sequence[nn.Module]:
        """Vision layers that neither the features nor any default signal come from: their outputs are the same for
        every method on the same images."""
        return ()

    def cls_module(self) -> nn.Module:
        """The vision layer whose output holds the CLS feature in its first position."""
        raise TypeError(
            f"{self.family}: this vision tower has no CLS row, so cls_token=True (official LLaVA presets) cannot work"
        )

    def blank_image(self) -> dict[str, Tensor]:
        """Arguments of an encoder call for one small blank image: here of the one size that the tower takes."""
        vision, weight = self.config.vision_config, next(self.tower().parameters())
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.zeros(size, dtype=weight.dtype, device=weight.device)}

    def blocks_to_reduce(self) -> tuple[TowerBlocks | VarlenTower, ...]:
        """Blocks inside which patches can be dropped, one entry per tower; a TypeError gives the reason if there are
        none."""
        raise TypeError(
            f"{self.family}: reducing inside this vision tower is not supported; use a method that reduces behind it "
            "(duet, visionzip)"
        )

    def cell_of(self, call: EncoderCall, blocks: TowerBlocks) -> int:
        """Side, in patches, of the square that becomes one token."""
        return blocks.patch_grid

    def attends_globally(self, layer: int) -> bool:
        """True if a tower layer attends to whole images, not within windows."""
        return True

    def images_of(self, call: EncoderCall, count: int, tokens: int) -> list[tuple[int, ...]]:
        """Per span: tokens of each of its images in the tower's batch (``count`` images of ``tokens`` each); one image
        per span by default."""
        together = self.projected_together(call)
        return [(tokens,) * together] * (count // together)

    def num_separator_rows(self, call: EncoderCall, spans: int) -> list[int]:
        """Per span: number of tokens that show no part of the image (newlines)."""
        return [0] * spans

    def num_cls_rows(self, call: EncoderCall) -> int:
        """Number of tokens per image that come from no patch (CLS)."""
        return int(self.feeds_cls)

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        """Convert values of patches [P, N, c] to values of tokens: per span [n, c], means where several patches make
        one, ones for tokens that come from no patch."""
        return list(nn.functional.pad(patches, (0, 0, self.num_cls_rows(call), 0), value=1.0))

    def real_patches(self, call: EncoderCall, pictures: int) -> Tensor | None:
        """[P, N] bool, False for patches of padding alone and for those that become no token; None if there are
        none."""
        return None

    # ---- what ranks and merges before the decoder

    @abstractmethod
    def vision_attention(self, layer: int | None) -> nn.Module:
        """The attention module to record; with ``layer`` None the family chooses."""

    def vision_attentions(self, layer: int | None) -> list[nn.Module]:
        """All modules to record: one in each tower, where images and videos have their own."""
        return [self.vision_attention(layer)]

    @abstractmethod
    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Importance [n] and mean keys [n, d] of the tokens of each span, in call order (without CLS; any value for
        separators).

        ``segmented`` keeps the tower's own attention segments.
        """

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        """Convert hidden states of the tower's blocks [P, R, c] (CLS first) to those of tokens: per span [n, c], means
        where several patches make one, any value for separators."""
        return self.patches_to_tokens(rows[:, int(self.has_cls) :], call)

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        """Split the projector's output [..., c] into spans [n, c], any value for separators; one image per span by
        default."""
        return list(projected)

    # ---- what a call made: spans, their parts and their grids

    def tokens_per_crop(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, ...]]:
        """Per span: visual tokens of each part that the tower encodes independently (crops, frames). One part by
        default."""
        return [(count,) for count in counts]

    def spare(self, call: EncoderCall) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per span and part: patches that become no token, and patches of padding around it that are embedded with it.
        Empty: there are none."""
        return ()

    def projected_rows(self, call: EncoderCall, counts: list[int]) -> list[int]:
        """Per span: rows of the projector's input if the encoder stage drops nothing: all of the tower's, unless the
        family pools first."""
        return [sum(sizes) for sizes in self.tokens_per_crop(call, counts)]

    @abstractmethod
    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        """(rows, columns) of each span's token grid, None where it has none."""

    def grid_sizes(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, int]]:
        """Per span: rows and columns of each of its parts, in tokens where nothing is cut off."""
        grids, parts = self.grids(call, counts), self.tokens_per_crop(call, counts)
        if None in grids:
            raise TypeError(
                f"{self.family}: what this model makes of a picture has no grid; use a method that needs none (duet, "
                "vispruner)"
            )
        return [(grid[0] // len(sizes), grid[1]) for grid, sizes in zip(grids, parts, strict=True) if grid is not None]

    def token_coords(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        """Per span, on the host: row and column of each token within its part [n, 2], -1 for tokens that show no
        patch."""
        num_cls, coords = self.num_cls_rows(call), []
        for (_, columns), numbers in zip(self.grid_sizes(call, counts), self.parts(call, counts), strict=True):
            number, part = np.arange(len(numbers)), numbers.numpy()
            begins = np.maximum.accumulate(np.where(np.diff(part, prepend=-2) != 0, number, 0))
            index = number - begins - num_cls
            shows = (index >= 0) & (part >= 0)
            coords.append(
                torch.from_numpy(np.where(shows[:, None], np.stack([index // columns, index % columns], 1), -1))
            )
        return coords

    def temporal_patch_size(self) -> int:
        """Frames of a video that the tower encodes as one independent time step, so that a video can be encoded in
        chunks. A TypeError gives the reason where it cannot."""
        why = "takes frames as images" if self.video else "takes no clips"
        raise TypeError(
            f"{self.family} {why}, so frames cannot go through its tower some at a time: leave chunk_frames and "
            "still_frames out"
        )

    def steps(self, call: EncoderCall) -> list[Tensor]:
        """Per video of a call: the pixels of its time steps, patch by patch [t, n, m]."""
        raise NotImplementedError

    def slice_frames(self, call: EncoderCall, video: int, chosen: Sequence[int]) -> EncoderCall:
        """A call with only the ``chosen`` time steps of one video."""
        raise NotImplementedError

    def crop_grids(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, int]]:
        """Per span: rows and columns of the crops that follow its first part, (0, 0) where the image was not cut."""
        return [(0, 0)] * len(counts)

    def parts(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        """Per span, on the host: the part (crop, frame) of each token [n], -1 for separators (newlines)."""
        return [
            torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)) for sizes in self.tokens_per_crop(call, counts)
        ]

    def spans(self, output: Any, call: EncoderCall) -> list[Tensor]:
        """The projected rows of each span, from ``output.pooler_output`` (families that return frames one by one join
        them here)."""
        return list(output.pooler_output)

    def projected_together(self, call: EncoderCall) -> int:
        """Number of consecutive rows of the projector's batch (frames) that make one span."""
        return 1

    # ---- the decoder, and what ranks inside it

    @property
    def layer_types(self) -> list[str]:
        """Type of each decoder layer, in transformers' words: full_attention, sliding_attention, linear_attention,
        ..."""
        config = self.text_model.config
        # configs that name no types window every layer
        usual = FULL if getattr(config, "sliding_window", None) is None else SLIDING
        return list(getattr(config, "layer_types", None) or [usual] * len(self.layers))

    def ranking_layer(self, layer: int, states: bool = False) -> int:
        """The last layer up to ``layer`` whose attention (or, with ``states``, whose state) can rank tokens; -1 if
        there is none."""
        kinds, able = self.layer_types, (FULL, SLIDING, LINEAR) if states else (FULL, SLIDING)
        return next((index for index in range(layer, -1, -1) if kinds[index] in able), -1)

    def probed_layer(self, drop: int, last: bool) -> int:
        """The layer through which the prediction's gradient runs, for a drop before layer ``drop``
        (``profiling.model_dims.probed_layer``)."""
        return probed_layer([kind != LINEAR for kind in self.layer_types], drop, last)

    @property
    def first_attention(self) -> int:
        """The first layer with keys and values: its cache is as long as the sequence."""
        return next(index for index, kind in enumerate(self.layer_types) if kind in (FULL, SLIDING))

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str) -> Rotary:
        """(cos, sin) of a layer of type ``kind`` for 1-D positions [B, n]."""
        return self.text_model.rotary_emb(hidden, position_ids)

    @abstractmethod
    def project(
        self, layer: nn.Module, hidden: Tensor, rotary: Rotary, query_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, q, d] at ``query_positions`` [B, q] and rotated keys [B, Hkv, n, d] of all positions,
        of the hidden states [B, n, D] that enter ``layer``."""

    def linear_attention_scores(
        self, layer: nn.Module, hidden: Tensor, valid: Tensor, query_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and write strengths of a layer with a state, for hidden states [B, n, D] that enter it.

        ``valid`` [B, n] marks tokens that are not padding. Returned in float32: queries [B, H, q, d] at
        ``query_positions`` [B, q], keys [B, H, n, d] under which positions write to the state, and their strengths [B,
        H, n]. The product of the three, without the decay between the positions, is the share of a position's value
        that a query retrieves.
        """
        raise TypeError(
            f"{self.family}: what its layers with a state read is not known here; use a method that ranks by attention"
        )

    # rows [B, H, n, d] of queries or keys to their positions, as the decoder's layers do it
    rotate: Callable[[Tensor, Rotary], Tensor]

    @abstractmethod
    def key_projection(self, layer: nn.Module) -> nn.Module | None:
        """The module that ``project`` and the layer itself call for keys and nothing else; None if there is none."""

    @abstractmethod
    def modules_run_for_scores(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that ``project`` runs on all positions, and the layer itself on the kept ones, once each."""

    @abstractmethod
    def scaling(self, layer: nn.Module) -> float:
        """The layer's factor of the products of queries and keys."""

    # ---- sizes, for cost predictions

    def decoder_dims(self) -> DecoderDims:
        """Sizes of the decoder, for cost predictions."""
        return decoder_dims(self.config.text_config)

    @abstractmethod
    def vision_dims(self) -> VisionDims:
        """Sizes of tower and projector, for cost predictions."""
