"""What a family is to the tests: a tiny random model, pictures for it, and the facts that the oracle needs. No network,
no processor."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PAD, IMAGE, VIDEO, VISION_START, VISION_END = 0, 99, 96, 97, 98
VOCAB, DEPTH, HIDDEN = 130, 8, 64


@dataclass(frozen=True)
class Picture:
    """An image in a row: random pixels from ``seed``; ``height`` x ``width`` visual tokens where the family leaves the
    size free.

    With ``frames`` it is a clip: so many steps of time, ``height`` x ``width`` tokens each."""

    seed: int
    height: int = 4
    width: int = 5
    frames: int = 0


Row = Sequence["int | Picture"]  # text token ids and pictures, in order
Inputs = dict[str, Tensor]


class Family:
    """A family with a tiny model. Subclasses say how it is made and how pictures become tokens and arrays; what the
    oracle asks for has the usual answer here: a causal decoder at ``model.model.language_model``, V2V on the rows that
    the encoder hands out."""

    name: str
    mrope = False
    video = False  # takes clips, too
    mixes = True  # images and clips in one call
    turned = 16  # channels of a decoder head that rotary embeddings turn
    offloaded = "generate"  # what the stock model can do when offloaded: this, "call" (no more than that), or "nothing"
    drafts = True  # draft tokens of a prompt change nothing in front of them, and a plain cache can give them up again

    def make(self) -> nn.Module:
        raise NotImplementedError

    def finish(self, model: nn.Module) -> None:
        """Change random weights that the family reads in a way of its own."""

    def tokens(self, picture: Picture) -> int:
        """Visual tokens of a picture or clip."""
        raise NotImplementedError

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        """Pixel arrays of all pictures in order, and what else comes with them."""
        raise NotImplementedError

    def places(self, picture: Picture) -> list[int]:
        """Placeholder ids of a picture."""
        return [VIDEO if picture.frames else IMAGE] * self.tokens(picture)

    def expand(self, row: Row) -> list[int]:
        """Token ids of a row, placeholders repeated."""
        return [token for item in row for token in (self.places(item) if isinstance(item, Picture) else [item])]

    def inputs(self, rows: Sequence[Row], side: str = "left") -> Inputs:
        """A padded batch: input_ids, attention_mask, pixel values of all pictures in order, and what else the family
        wants."""
        ids = [self.expand(row) for row in rows]
        width = max(map(len, ids))
        pad = [[PAD] * (width - len(row)) for row in ids]
        table = torch.tensor([p + row if side == "left" else row + p for p, row in zip(pad, ids, strict=True)])
        batch = {"input_ids": table, "attention_mask": (table != PAD).long()}
        pictures = pictures_of(rows)
        return batch | (self.pixels(pictures) if pictures else {}) | self.extras(table)

    def extras(self, table: Tensor) -> Inputs:
        """Further inputs [B, S] that the family's processor makes from the ids."""
        return {}

    def supervised(self, labels: Tensor) -> Inputs:
        """Further inputs that training with ``labels`` [B, S] brings."""
        return {}

    # ---- what the oracle asks

    def answers(self, model: nn.Module) -> bool:
        """Whether this family's answers are right for a model."""
        return bool(model.config.model_type == self.name)

    def text(self, model: nn.Module) -> nn.Module:
        return model.model.language_model

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower of images."""
        return _first(model.model, "vision_tower", "visual", "vision_model", "image_tower")

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The layers of the tower."""
        tower = self.tower(model)
        return (
            tower.blocks
            if hasattr(tower, "blocks")
            else _first(_first(tower, "encoder", "transformer"), "layers", "layer")
        )

    def attention(self, block: nn.Module) -> nn.Module:
        """The attention of a tower layer."""
        return _first(block, "self_attn", "attn", "attention")

    def features(self, model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
        """Per stream and span the rows [n, C] that V2V chooses from and merges."""
        features = {}
        for stream, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in inputs:
                encode = getattr(model.model, f"get_{stream}_features")
                known = inspect.signature(encode).parameters
                features[stream] = self.spans(
                    encode(**{key: value for key, value in inputs.items() if key in known}), inputs
                )
        return features

    def deeper(self, model: nn.Module, inputs: Inputs) -> dict[str, list[list[Tensor]]]:
        """Per stream and span the rows [n, D] of each level that are added behind the first decoder layers."""
        return {}

    def spans(self, output: Any, inputs: Inputs) -> list[Tensor]:
        return list(output.pooler_output)

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Per stream and span: importance [n] and mean keys [n, d] of the tokens, from the eager tower's own attention
        maps, written without the library. Structure rows and rows of a fed CLS are not compared: NaN importance."""
        raise NotImplementedError

    def pointwise(self, model: nn.Module) -> nn.Module | None:
        """The projector, where V2V works in front of it."""
        return None

    def skip(self) -> int:
        """Rows of ``features`` in front of the first token (a CLS row that is none)."""
        return 0

    def positions(self, model: nn.Module, prompt: Tensor, grids: dict[str, Tensor], total: int) -> Tensor:
        """Positions of a prompt and the tokens after it."""
        return torch.arange(total)[None]

    def enter(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """What the decoder stack does to embeddings [1, T, D] in front of its first layer."""
        return hidden

    def sees(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        """Which rows [T, T] bool each row of the unreduced sequence sees in ``layer``; the first ``prompt`` ids were
        sent together."""
        return torch.ones(len(ids), len(ids), dtype=torch.bool).tril()

    def ranks(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        """Which rows take part when each row's attention ranks tokens in ``layer``."""
        return self.sees(model, ids, prompt, layer)

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.text(model).rotary_emb(hidden, positions)

    def run(self, model: nn.Module, index: int, hidden: Tensor, seen: Tensor, **arguments: Any) -> Tensor:
        """One decoder layer on all rows; ``seen`` [T] are those that take part."""
        return self.text(model).layers[index](hidden, position_ids=None, past_key_values=None, **arguments)

    def attended(self, model: nn.Module, index: int, hidden: Tensor, **arguments: Any) -> Tensor:
        """Attention [T, T] of one eager layer, mean over heads."""
        layer = self.text(model).layers[index]
        _, weights = layer.self_attn(hidden_states=layer.input_layernorm(hidden), past_key_values=None, **arguments)
        return weights[0].mean(0)

    def ranking(self, layer: int) -> int:
        """The layer whose attention ranks what a method wants ranked by ``layer``: the same, where every layer has
        attention."""
        return layer

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        return model.lm_head(self.text(model).norm(hidden))


def attention_maps(attention: nn.Module, run: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """For every call of an eager vision attention while ``run`` runs: its weights [B, H, N, N] and, from its
    ``k_proj``, keys [B, N, H * d]."""
    weights: list[Tensor] = []
    keys: list[Tensor] = []
    hooks = [
        attention.register_forward_hook(lambda module, args, output: weights.append(output[1])),
        attention.k_proj.register_forward_hook(lambda module, args, output: keys.append(output)),
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return list(zip(weights, keys, strict=True))


def _first(module: nn.Module, *names: str) -> Any:
    """The first of these parts that a module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def pictures_of(rows: Sequence[Row]) -> list[Picture]:
    return [item for row in rows for item in row if isinstance(item, Picture)]


def randomise(model: nn.Module) -> nn.Module:
    """Weights with strong, varied attention, so that removing a token clearly moves the logits. Each tensor's seed is
    its name."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                # 1, or 0 where norms add it
                start = weight.mean().round() if "norm" in name and name.endswith("weight") else 0.0
                weight.copy_(start + 0.1 * noise)
            elif "embed" in name and "patch" not in name:
                weight.copy_(noise)
            else:
                gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.2
                weight.copy_(noise * gain / weight[0].numel() ** 0.5)
    return model


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))
