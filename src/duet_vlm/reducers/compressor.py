"""The contract of methods whose rows a module makes that has weights of its own, and the file that such weights are
kept in.

A *compressor* is an encoder reducer with such a module. `select_tokens` returns, beside its choice, the rows that the
module made (``Selection.rows``); where they stand and which tokens they were made of it says like any other method. The
module is made for a model by the sizes of the model, belongs to the handle, and is a part of the model only while it is
attached.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duet_vlm.ops.merge import merged_rows
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.persistence import BESIDE
from duet_vlm.utils.field_types import FILE

FORMAT = 1


class NewWeights(UserWarning):
    """A module that has learned nothing yet is attached."""


@dataclass(frozen=True)
class ModuleSizes:
    """Sizes that a module is made for.

    Attributes
    ----------
    rows : int
        Width of the rows that are reduced: of the vision tower in front of a point-wise projector, else of the decoder.
    levels : int
        Width of the rows of all vision layers that the method names, side by side.
    decoder : int
        Width of the decoder.
    tokens : int or None
        Visual tokens of a picture, where the tower fixes them.
    """

    rows: int
    levels: int
    decoder: int
    tokens: int | None = None


@dataclass(frozen=True)
class Compressor(EncoderReducer):
    """A method with a module of its own (``EncoderView.module``). Subclasses say in ``module_inputs`` which settings
    change what it is made of.

    Attributes
    ----------
    keep : int, float or None
        Rows that enter the decoder for an image or clip, or a fraction of its tokens; None leaves it to the budget. One
        module serves every number of them.
    weights : str or None
        A file of trained weights (``Handle.save_weights``, ``duet-vlm train``); None: a new module, untrained.
    seed : int
        Of a new module's weights.
    """

    module_inputs: ClassVar[tuple[str, ...]] = ()

    keep: Keep | None = None
    weights: str | None = field(default=None, metadata=FILE)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.weights is not None and not isinstance(self.weights, str):
            raise TypeError(f"weights={self.weights!r}: give the path of a file as text")
        if self.options.cls_token:
            raise ValueError(
                f"cls_token=True: {self.name} makes its rows of patches, the CLS row is none of them; leave it out"
            )

    @property
    def trained_reducer(self) -> Compressor:
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """The settings that decide what the module is made of."""
        return {name: getattr(self, name) for name in self.module_inputs}

    @abstractmethod
    def module(self, sizes: ModuleSizes) -> nn.Module:
        """A new module for a model of these sizes, with weights drawn from torch's random numbers.

        Raises
        ------
        ValueError
            Settings that no module of these sizes can have.
        """

    def imitation_target(self, view: EncoderView, made: Selection) -> Tensor:
        """Regression targets for warming up a module, [B, K, C]: the mean of the tokens that each of the rows ``made``
        consists of."""
        return merged_rows(view.require(Input.FEATURES).float(), replace(made, custom_rows=None))

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def build_module(self, sizes: ModuleSizes, facts: dict[str, Any]) -> nn.Module:
        """The module with its weights, in float32 on the CPU: those of the file, or new ones, the same for the same
        seed, with a warning.

        Raises
        ------
        ValueError
            No such file, one of another method or model, or made with other settings.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.seed)
            made = self.module(sizes).float()
        if self.weights is not None:
            made.load_state_dict(stored(self.weights, self.name, facts, self.shape))
        elif next(made.parameters(), None) is not None:
            warnings.warn(
                f"{self.name}: its module is new and has learned nothing, so answers may mean nothing: "
                f"train it (duet-vlm train --method {self.name}), or give weights=FILE",
                NewWeights,
                stacklevel=2,
            )
        return made


def compressor_of(reducer: Reducer) -> Compressor | None:
    """The part of a method whose module makes the rows."""
    compressor = reducer.trained_reducer
    return compressor if isinstance(compressor, Compressor) else None


def check_heads(heads: int, width: int, what: str) -> None:
    """Refuse a number of heads that does not divide a width."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"heads={heads}: {what} of this model are {width} numbers wide, give a number that divides {width}"
        )


def attended(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """Rows [B, Q, C] that attend to [B, T, C], of which ``hidden`` [B, T] bool are not there. By matrix products, so
    that all of it is counted."""
    if query is key:
        query = query.clone()  # torch has an uncounted kernel for rows that attend to themselves
    return attention(query, key, value, key_padding_mask=hidden, need_weights=True)[0]


# ---- the file


def store(module: nn.Module, reducer: Compressor, facts: dict[str, Any], folder: str | Path) -> Path:
    """Write a module's weights for a model with these ``facts``; into a folder under the name that a checkpoint's have.

    Raises
    ------
    ValueError
        A file with another suffix than .safetensors.
    """
    path = _file(folder)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are a .safetensors file, or go into a folder that there is")
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"format": FORMAT, "method": reducer.name, "model": facts, "settings": reducer.shape}
    tensors = {
        name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in module.state_dict().items()
    }
    unfinished = path.with_suffix(".part")  # a kill must not leave half a file that counts as whole
    save_file(tensors, unfinished, {"duet_vlm_weights": json.dumps(said)})
    unfinished.replace(path)
    return path


def _file(path: str | Path) -> Path:
    return Path(path) / BESIDE if Path(path).is_dir() else Path(path)


def stored(folder: str | Path, method: str, facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file or folder that was made by ``method`` for a model with these ``facts``, with these
    ``settings``."""
    path = _file(folder)
    advice = f"train some for this model with 'duet-vlm train --method {method}'"
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r}: no such file; {advice}")
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["duet_vlm_weights"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']}, known is {FORMAT}")
        made = {"method": said["method"]} | said["model"]
        chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in said["settings"].items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"weights={str(path)!r} are no weights of a compressor ({error}); {advice}") from None
    for name, here in ({"method": method} | facts).items():
        if made.get(name) != here:
            raise ValueError(
                f"weights={str(path)!r} were trained for a model with {name} {made.get(name)}, here it is {here}; {advice}"
            )
    for name, here in settings.items():
        if chosen.get(name) != here:
            was = chosen.get(name)
            raise ValueError(
                f"weights={str(path)!r} were trained with {name}={was!r}, the settings say {here!r}: give them the same value"
            )
    return tensors
