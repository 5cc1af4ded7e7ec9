"""What a server reduces by, and how many rows of an image that leaves. Counts depend on sizes and settings only, never on pixels or text:
the engine lays out a prompt before anything is encoded, and whoever encodes later must make exactly as many rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import duet_vlm
from duet_vlm.methods.lookup import get_method
from duet_vlm.planning.budget import Budget, SpanPlan, check_budget
from duet_vlm.planning.spans import plan_span
from duet_vlm.reducers.base import Reducer, with_fields
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import ENCODER_INPUTS, FEATURE_INPUTS, Input
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime.encode.selection import reduces_per_crop
from duet_vlm.runtime.validation import check_plan
from duet_vlm.utils.field_types import to_plain

KEY = "duet"  # of the model's config: {"method": ..., "budget": ..., and settings of the method}
REQUEST = "duet_budget"  # of a request's processor arguments
ARCHITECTURES = {  # whose first stage vLLM can run, and their positions there; the plug-in registers each with PREFIX in front
    "LlavaForConditionalGeneration": "compact",
    "LlavaNextForConditionalGeneration": "compact",
    "LlavaOnevisionForConditionalGeneration": "compact",
    "InternVLForConditionalGeneration": "compact",
    "Qwen2VLForConditionalGeneration": "keep",
    "Qwen2_5_VLForConditionalGeneration": "keep",
    "Qwen3VLForConditionalGeneration": "keep",
}
PREFIX = "Duet"

DEPTH = 32  # of the decoder in which a method divides what enters into dominant and contextual rows
SECOND = {each.name for each in dataclasses.fields(DecoderReducer)} - {each.name for each in dataclasses.fields(Reducer)}
OWN_SECOND = ("schedule", "skip_unanswered", "score_mask", "score_positions", "probe")  # of a method; in a composition behind its name
NOTHING_ASKED = -1.0


def _late(name: str) -> bool:
    """Whether a setting is of what is dropped inside the decoder."""
    return name in SECOND or any(name == own or name.endswith(f"_{own}") for own in OWN_SECOND)


@dataclass(frozen=True)
class ServedMethod:
    """The method of one server. ``budget`` counts the tokens of an image or clip that enter the decoder: nothing is dropped inside it."""

    reducer: EncoderReducer
    budget: Budget | None

    @classmethod
    def of(cls, given: Mapping[str, Any], positions: str) -> ServedMethod:
        """The settings of a server, as its config holds them under ``KEY``.

        Parameters
        ----------
        given : mapping
            ``method`` (default "duet"), ``budget``, and settings of the method.
        positions : str
            What the family has: "compact" (rows are numbered anew, in the method's own order) or "keep" (grids, M-RoPE).

        Raises
        ------
        ValueError, TypeError
            Settings that no server can run, by name.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f"{KEY}={given!r}: give a dictionary such as {{'method': 'duet_plus', 'budget': 64}}")
        settings = {name: to_plain(value) for name, value in given.items()}
        method, budget = settings.pop("method", "duet"), settings.pop("budget", None)
        for part in str(method).split("+"):
            _check_stage(part, get_method(part))
        late = sorted(name for name in settings if _late(name) and settings[name] not in (None, ()))
        if late:
            raise ValueError(f"{late[0]}: a setting of what is dropped inside the decoder, which vLLM has no place for: leave it out")
        if settings.get("cls_token"):
            raise ValueError("cls_token=True: no server feeds the tower's CLS row to the decoder, leave it out")
        if any(settings.get(name) is False for name in settings if name.endswith("signal_segments")):
            raise ValueError("signal_segments=False: it ranks all images of a call together, and a server decides which those are, leave it out")
        if settings.get("positions", positions) != positions:
            raise ValueError(f"positions={settings['positions']!r}: vLLM gives this model {positions!r} positions, leave it out")
        check_budget(budget)
        reducer = with_fields(get_method(method), {**settings, "positions": positions})
        assert isinstance(reducer, EncoderReducer)  # checked stage by stage
        beyond = sorted(need.value for need in reducer.requires & ENCODER_INPUTS - FEATURE_INPUTS - {Input.IMPORTANCE, Input.KEYS})
        if beyond or len(reducer.signal_layers) > 1:
            what = ", ".join(beyond) or "several vision layers"
            raise ValueError(f"{method}: it reads {what}, and the plug-in makes the importance and keys of one vision layer only: choose another")
        made = cls(reducer, budget)
        made.span((1024,))
        return made

    @property
    def salt(self) -> str:
        """What tells rows of this server from those of one with other settings, where caches are shared."""
        text = repr((duet_vlm.__version__, self.reducer.name, self.budget, sorted(self.reducer.settings().items())))
        return hashlib.sha256(text.encode()).hexdigest()

    def asked(self, request: Mapping[str, Any]) -> float:
        """The budget of one request as a number that a tensor can carry; ``NOTHING_ASKED`` where it has none.

        Raises
        ------
        ValueError, TypeError
            No budget, or one beside a server's own counts.
        """
        if request.get(REQUEST) is None:
            return NOTHING_ASKED
        budget = request[REQUEST]
        try:
            check_budget(budget)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{REQUEST}={budget!r}: {error}") from None  # servers answer a TypeError as a fault of their own
        if self.budget is None:
            raise ValueError(f"{REQUEST}={budget!r}: this server has counts of its own instead of a budget, so requests cannot choose one")
        return budget + 1.0 if isinstance(budget, int) else float(budget)

    def span(self, sizes: Sequence[int], structure: int = 0, asked: float = NOTHING_ASKED) -> SpanPlan:
        """What becomes of an image or clip whose parts (crops, frames) have ``sizes`` tokens, with ``structure`` rows (newlines) beside them.

        Raises
        ------
        ValueError
            If nothing would be left, or a request asks for more than the server allows.
        """
        own = _span(self.reducer, self.budget, tuple(sizes), structure)
        if own.entry < 1:
            raise ValueError(f"these settings leave none of an image's {own.tokens} visual tokens, and vLLM needs one at least: give budget=")
        if asked == NOTHING_ASKED:
            return own
        wanted = int(asked - 1) if asked > 1 else asked
        plan = _span(self.reducer, wanted, tuple(sizes), structure)
        if plan.entry > own.entry:
            raise ValueError(f"{REQUEST}={wanted}: {plan.entry} of {plan.tokens} visual tokens, but this server allows {own.entry} at most")
        return plan

    @property
    def each(self) -> bool:
        """Whether the parts of an image are reduced one by one."""
        return reduces_per_crop(self.reducer, family_default=False)


@lru_cache(maxsize=4096, typed=True)  # 1 is a token, 1.0 is all of them
def _span(reducer: EncoderReducer, budget: Budget | None, sizes: tuple[int, ...], structure: int) -> SpanPlan:
    def solve(tokens: int) -> SpanPlan:
        plan = reducer.plan(tokens, DEPTH, None) if budget is None else reducer.plan_entry(tokens, budget, DEPTH)
        return check_plan(reducer, plan, tokens, DEPTH)

    return plan_span(solve, budget, sizes, structure, reduces_per_crop(reducer, family_default=False), reducer.newline_tokens == "keep")


def _check_stage(name: str, cls: type[Reducer]) -> None:
    """Refuse a method that has no first stage behind the tower."""
    if issubclass(cls, TowerReducer):
        raise ValueError(f"method {name}: it works inside the vision tower, which vLLM runs as it is; take one behind it (duet_plus, visionzip, ...)")
    if not issubclass(cls, EncoderReducer):
        what = "drops inside the decoder" if issubclass(cls, DecoderReducer) else "reduces nothing"
        remedy = "take one that reduces before the decoder (duet_plus, visionzip, ...)"
        raise ValueError(f"method {name}: it {what}, and vLLM runs first stages only; {remedy}")


def flags(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What vLLM is started with, so that it reduces by ``given`` (as ``Served.of``); no flag holds blanks, quotes or brackets that a shell reads.

    Parameters
    ----------
    config : mapping
        The model's config.json.

    Raises
    ------
    ValueError, TypeError
        A model without plug-in, or settings that no server can run.
    """
    (architecture,) = config.get("architectures") or ["no architecture in config.json"]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{architecture}: vLLM cannot run a first stage for this model, only for {known}; --backend transformers runs others")
    ServedMethod.of(given, ARCHITECTURES[architecture])
    values = {name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":")) for name, value in given.items()}
    return [
        "--hf-overrides.architectures+", PREFIX + architecture,
        *(part for name, value in values.items() for part in (f"--hf-overrides.{KEY}.{name}", value)),
    ]  # fmt: skip
