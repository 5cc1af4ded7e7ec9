"""Prompts for any supported model without a processor: images of noise, placeholders, random words. Content does not
change the time."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, EncoderCall, Modality

BOS = 1
USUAL = 256  # tokens of an image (of a step of time), where its size is free and nobody says how many


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt of a benchmark.

    Attributes
    ----------
    stream : str
        Its modality.
    text : dict
        Arguments of the model besides the image.
    picture : dict
        Arguments of the encoder.
    spans : tuple of int
        Visual tokens of each span of a row.
    """

    stream: str
    text: dict[str, Tensor]
    picture: dict[str, Any]
    spans: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Visual tokens per row."""
        return sum(self.spans)

    @property
    def rows(self) -> int:
        return self.text["input_ids"].shape[1]

    @property
    def batch(self) -> int:
        return self.text["input_ids"].shape[0]

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments of the image that the model takes beside its features (grids)."""
        return {name: value for name, value in self.picture.items() if not name.startswith("pixel_")}


def prompt_for(
    adapter: Adapter, batch: int, text: int, tokens: int | None = None, frames: int = 0, picture: Any = None
) -> BenchPrompt:
    """One image and ``text`` words per row.

    Parameters
    ----------
    tokens : int, optional
        Visual tokens per image, where the family leaves its size free: the nearest square is taken (per time step, with
        ``frames``), or the nearest size among whole crops.
    frames : int
        Time steps of a video; 0 for an image.
    picture : dict, optional
        The encoder's arguments for one image, instead of a square of noise.

    Raises
    ------
    ValueError
        If the family has no such input, or none of that size.
    """
    name = "video" if frames else "image"
    stream = next((s for s in adapter.modalities if s.name == name), None)
    if stream is None:
        raise ValueError(f"{adapter.family} models take no {name}s")
    weight = next(adapter.model.parameters())
    noise = _noise(adapter, stream, tokens, frames) if picture is None else picture
    one = {key: _placed(value, weight) for key, value in noise.items()}
    call = stream.encoding(one)
    with torch.inference_mode():
        spans = tuple(len(rows) for rows in adapter.spans(getattr(adapter.base, stream.encode)(**one), call))
    if picture is None and stream.sizes is None and tokens not in (None, sum(spans)):
        what = f"a clip of {frames} frames" if frames else "an image"
        raise ValueError(
            f"tokens={tokens}: {what} has {sum(spans)} visual tokens in this {adapter.family} model; leave the number out"
        )
    many = {key: torch.cat([value] * batch) if isinstance(value, Tensor) else value for key, value in one.items()}
    counts = list(spans)
    passes = adapter.tokens_per_crop(call, counts)
    written = [
        token
        for span, parts in zip(spans, passes, strict=True)
        for token in adapter.placeholder_ids(stream, span, parts)
    ]
    words = _words(adapter, stream, written, text, batch)
    return BenchPrompt(name, words, many, spans)


def encode(model: nn.Module, pictures: dict[str, Any]) -> dict[str, Any]:
    """``mm_encoder_outputs`` for the prompts of ``pictures``, as generate() makes them before its prefill: reduced
    where a reducer is attached (a call of ``get_image_features`` by hand gives the stock rows)."""
    return model._prepare_multimodal_encoder_kwargs_for_generation(dict(pictures))["mm_encoder_outputs"]  # type: ignore[no-any-return]


def _noise(adapter: Adapter, stream: Modality, tokens: int | None, frames: int) -> dict[str, Any]:
    """Encoder arguments of noise.

    Families with sizes take them as patches (time, height, width), or as pixels of images that are kept whole or cut
    into crops; all others take their own blank image, or frames of its size, filled with noise.
    """
    if stream.sizes is not None and stream.sizes.endswith("grid_thw"):
        return _patches(adapter, stream, stream.sizes, tokens, frames)
    blank = adapter.blank_image()
    size = blank["pixel_values"].shape
    if frames:
        return {stream.pixels: torch.randn(1, frames, *size[-3:], device="cpu")}
    if stream.sizes is None or (tokens is None and len(size) == 5):
        return {
            key: torch.randn(value.shape, device="cpu") if key.startswith("pixel_") else value
            for key, value in blank.items()
        }
    height, width = _cut(adapter, stream, tokens) if tokens is not None and len(size) == 5 else _whole(adapter, tokens)
    sizes = torch.tensor([[height, width]], device="cpu")
    if len(size) == 4:
        return {stream.pixels: torch.randn(1, size[1], height, width, device="cpu"), stream.sizes: sizes}
    crops = len(adapter.tokens_per_crop(EncoderCall(stream.name, [[height, width]]), [0])[0])
    return {stream.pixels: torch.randn(1, crops, *size[2:], device="cpu"), stream.sizes: sizes}


def _patches(adapter: Adapter, stream: Modality, sizes: str, tokens: int | None, frames: int) -> dict[str, Any]:
    """A square of merged patches, or one per step of time."""
    shape = adapter.vision_dims()
    merge = math.isqrt(shape.patches_per_token)
    side = max(2, round(math.sqrt((tokens or USUAL) / max(1, frames))))
    grid = torch.tensor([[frames or 1, merge * side, merge * side]], device="cpu")
    return {stream.pixels: torch.randn(int(grid.prod()), shape.patch_inputs, device="cpu"), sizes: grid}


def _whole(adapter: Adapter, tokens: int | None) -> tuple[int, int]:
    """Pixels of a square image that the tower sees whole."""
    vision = adapter.model.config.vision_config
    pixel = vision.patch_size * math.isqrt(adapter.vision_dims().patches_per_token)  # a token's side
    most = vision.image_size // pixel
    side = max(2, round(math.sqrt(tokens or min(USUAL, most**2))))
    if side > most:
        raise ValueError(f"tokens={tokens}: images have 4 to {most**2} visual tokens in this {adapter.family} model")
    return side * pixel, side * pixel


def _cut(adapter: Adapter, stream: Modality, tokens: int) -> tuple[int, int]:
    """Pixels of the image of whole crops with the nearest number of tokens, of all that the model's grids allow."""
    config = adapter.model.config
    side = config.vision_config.image_size
    sizes = [range(side, most + 1, side) for most in map(max, zip(*config.image_grid_pinpoints, strict=True))]
    counts = {
        (h, w): len(adapter.parts(EncoderCall(stream.name, [[h, w]]), [0])[0]) for h in sizes[0] for w in sizes[1]
    }
    least, most = min(counts.values()), max(counts.values())
    if not least <= tokens <= most:
        raise ValueError(
            f"tokens={tokens}: images have {least} to {most} visual tokens in this {adapter.family} model, overview and crops together"
        )
    return min(counts, key=lambda size: abs(counts[size] - tokens))


def _placed(value: Any, weight: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(weight.device, weight.dtype) if value.is_floating_point() else value.to(weight.device)


def _words(adapter: Adapter, stream: Modality, written: list[int], text: int, batch: int) -> dict[str, Tensor]:
    """A start token, the picture as it is ``written``, random words that are nothing special; the same in every row."""
    config, device = adapter.model.config, next(adapter.model.parameters()).device
    named = [(k, v) for part in (config, config.get_text_config()) for k, v in vars(part).items()]
    special = {value for key, value in named if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    special |= {other.token_id for other in adapter.modalities}
    vocabulary = [i for i in range(2, min(config.get_text_config().vocab_size, 2000)) if i not in special]
    chosen = torch.randint(len(vocabulary), (text,), generator=torch.Generator().manual_seed(2), device="cpu").tolist()
    row = torch.tensor([BOS, *written, *(vocabulary[word] for word in chosen)], device="cpu")
    ids = row.expand(batch, -1).contiguous().to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(adapter.model.forward).parameters:
        kind = 2 if stream.name == "video" else 1
        inputs["mm_token_type_ids"] = kind * adapter.placeholders(ids, None)[stream.name].long()
    return inputs
