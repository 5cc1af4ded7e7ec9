"""Settings of a training run: recipes and YAML files in layers, each value checked before anything large is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from duet_vlm.planning.budget import Budget, check_budget
from duet_vlm.train.yaml_text import mapping
from duet_vlm.utils.suggest import did_you_mean

TUNED = ("full", "lora", "projector")
PROMPTS = ("chat", "plain")
PRECISIONS = ("float32", "bfloat16")
MERGED = ("lora", "settings", "trainer")  # mappings, whose keys are settings of their own


@dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Attributes
    ----------
    model : str
        'tiny', a folder, or a hub id.
    data : sequence of str
        JSON or JSON-lines files (LLaVA conversations or chat messages), or 'tiny' / 'tiny-crowded', whose pictures are
        drawn.
    images : str or None
        Folder that image paths are relative to; default: the folder of the data file.
    limit : int or None
        Only the first so many conversations of each source (drawn sources have no end and need it).
    eval_data, eval_limit : as ``data`` and ``limit``
        Held-out conversations; their loss is logged at every epoch (or as trainer.eval_strategy says), at the last of
        the budgets.
    prompts : str
        'chat': the model's chat template; 'plain': image, caption, nothing else (LLaVA's first stage).
    max_length : int or None
        Longer samples lose text at their end; one whose images would be cut is an error.
    tune : str
        'full' (decoder and projector), 'lora' (adapters in the decoder, and the projector) or 'projector'.
    train_vision : bool
        With tune='full': the vision tower learns as well.
    lora : dict
        Arguments of peft.LoraConfig.
    projector_lr : float or None
        The projector's own learning rate; default: trainer.learning_rate for everything.
    frozen_dtype : str
        Precision of weights that do not learn; those that do are float32. 'bfloat16' halves their memory and needs
        trainer.bf16.
    method : str
        The reducer; 'none' trains the full model.
    budget : int, float, sequence of them, or None
        A sequence: every step draws one of them (mixed budgets); the last one is remembered in the checkpoint.
    anneal_from : float or None
        Begin with this fraction of the tokens and fall in a straight line to ``budget`` ...
    anneal_until : float
        ... which is reached at this share of the steps.
    settings : dict
        Settings of the method.
    imitate : int
        Of a method with weights of its own: steps before the run in which the new module alone learns to make means of
        tokens, which the decoder can read already.
    out : str
        Folder for checkpoints, logs and the trained model.
    trainer : dict
        Arguments of transformers.TrainingArguments.
    """

    model: str = "tiny"
    data: Sequence[str] = ()
    images: str | None = None
    limit: int | None = None
    eval_data: Sequence[str] = ()
    eval_limit: int | None = None
    prompts: str = "chat"
    max_length: int | None = None
    tune: str = "full"
    train_vision: bool = False
    lora: Mapping[str, Any] = field(default_factory=dict)
    projector_lr: float | None = None
    frozen_dtype: str = "float32"
    method: str = "duet"
    budget: Budget | Sequence[Budget] | None = None
    anneal_from: float | None = None
    anneal_until: float = 0.5
    settings: Mapping[str, Any] = field(default_factory=dict)
    imitate: int = 0
    out: str = "out/train"
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in MERGED:
            _pairs(name, getattr(self, name))
        for name in ("data", "eval_data"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "budget", _tuples(self.budget))
        object.__setattr__(self, "settings", {key: _tuples(value) for key, value in self.settings.items()})
        for name in ("lora", "trainer"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        for name, allowed in (("tune", TUNED), ("prompts", PROMPTS), ("frozen_dtype", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("limit", "eval_limit", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: {value!r}: a whole number, at least 1")
        if not isinstance(self.imitate, int) or self.imitate < 0:
            raise ValueError(f"imitate: {self.imitate!r}: a whole number of steps, 0 for none")
        if self.imitate and self.settings.get("weights") is not None:
            raise ValueError(
                "imitate: a new module imitates means, and settings.weights names a trained one: leave one of them out"
            )
        if not self.data:
            raise ValueError("data: nothing to train on: name JSON files of conversations, or 'tiny'")
        if self.train_vision and self.tune != "full":
            raise ValueError(f"train_vision: true needs tune: full, got tune: {self.tune}")
        if self.frozen_dtype != "float32" and not self.trainer.get("bf16"):
            raise ValueError(f"frozen_dtype: {self.frozen_dtype} needs trainer.bf16: true, which computes in bfloat16")
        for budget in self.budgets:
            check_budget(budget)
        if self.anneal_from is not None:
            check_budget(float(self.anneal_from))
            if len(self.budgets) != 1 or not isinstance(self.budgets[0], float):
                raise ValueError(
                    f"anneal_from needs one budget as a fraction to fall to (0.11), got budget: {self.budget}"
                )
            if not 0 < self.anneal_until <= 1:
                raise ValueError(f"anneal_until: {self.anneal_until}: a share of the steps, above 0 and at most 1")

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets as a tuple: none, one, or those that are mixed."""
        if self.budget is None:
            return ()
        return self.budget if isinstance(self.budget, tuple) else (self.budget,)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML holds them."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def recipes() -> dict[str, str]:
    """Names of the recipes that ship with the package, with their first line."""
    files = (resources.files("duet_vlm.train") / "recipes").iterdir()
    by_name = {
        file.name.removesuffix(".yaml"): file.read_text().splitlines()[0].lstrip("# ")
        for file in files
        if file.name.endswith(".yaml")
    }
    return dict(sorted(by_name.items()))


def settings_from(
    recipe: str | None = None, config: Path | None = None, options: Mapping[str, Any] | None = None
) -> TrainSettings:
    """A recipe, then a YAML file, then single options: later layers win; ``trainer``, ``lora`` and ``settings`` are
    merged key by key.

    Raises
    ------
    ValueError
        An unknown recipe, a file that is no YAML mapping, an unknown key (the known ones are listed), or a value out of
        range.
    """
    layers: list[Mapping[str, Any]] = []
    if recipe is not None:
        if recipe not in recipes():
            raise ValueError(
                f"--recipe {recipe}: unknown{did_you_mean(recipe, recipes())}; there are {', '.join(recipes())}"
            )
        layers.append(mapping((resources.files("duet_vlm.train") / "recipes" / f"{recipe}.yaml").read_text(), recipe))
    if config is not None:
        if not config.is_file():
            raise ValueError(f"--config {config}: {'is a folder' if config.is_dir() else 'no such file'}")
        try:
            text = config.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--config {config}: not a text file in UTF-8") from error
        layers.append(mapping(text, str(config)))
    merged: dict[str, Any] = {}
    known = {f.name for f in dataclasses.fields(TrainSettings)}
    for layer in (*layers, options or {}):
        for key, value in layer.items():
            if key not in known:
                raise ValueError(
                    f"unknown setting {key!r}{did_you_mean(key, known)}; known: {', '.join(sorted(known))}"
                )
            merged[key] = {**merged.get(key, {}), **_pairs(key, value)} if key in MERGED else value
    return TrainSettings(**merged)


def _pairs(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected key: value pairs, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, tuple | list) else value
