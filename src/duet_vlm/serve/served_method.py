"""The method that a server reduces by, and how many rows of an image it leaves. Counts depend on sizes and settings
only, never on pixels or text: the engine lays out a prompt before anything is encoded, and whoever encodes later must
make exactly as many rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import duet_vlm
from duet_vlm.methods.lookup import get_method, make_method
from duet_vlm.planning.budget import Budget, BudgetError, SpanPlan, check_budget
from duet_vlm.planning.solve import plan_or_clamp
from duet_vlm.planning.spans import plan_parts
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import ENCODER_INPUTS, FEATURE_INPUTS, Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime.encode.selection import reduces_per_crop
from duet_vlm.runtime.validation import check_plan
from duet_vlm.serve.decoder_stages import DecoderStages, check_decoder_method
from duet_vlm.utils.field_types import check_choice, flattened, to_plain

KEY = "duet"  # of the model's config: {"method": ..., "budget": ..., and settings of the method}
REQUEST = "duet_budget"  # of a request's processor arguments
# whose first stage vLLM can run, and their positions there; the plug-in registers each with PREFIX in front
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "compact",
    "LlavaNextForConditionalGeneration": "compact",
    "LlavaOnevisionForConditionalGeneration": "compact",
    "InternVLForConditionalGeneration": "compact",
    "Qwen2VLForConditionalGeneration": "keep",
    "Qwen2_5_VLForConditionalGeneration": "keep",
    "Qwen3VLForConditionalGeneration": "keep",
}
PREFIX = "Duet"
WORKER = "duet_vlm_vllm.stages.worker.StagedWorker"
SCHEDULER = "duet_vlm_vllm.stages.scheduler.StagedScheduler"
REQUEST_CHECKS = "duet_vlm_vllm.stages.request_checks:RequestChecks"
STAGE_FLAGS = (  # of an engine whose decoder drops rows; the plug-in refuses to start without
    "--worker-cls", WORKER, "--scheduler-cls", SCHEDULER, "--logits-processors", REQUEST_CHECKS, "--enforce-eager", "--no-enable-chunked-prefill",
)  # fmt: skip
STAGES = ("first", "all")  # what of a method a server runs: before the decoder only, or inside it, too

# of the decoder in which a method divides what enters into dominant and contextual rows, where nobody says how deep it
# is
DEPTH = 32
# of a method; in a composition behind its name
OWN_SECOND = ("schedule", "score_mask", "score_positions", "probe")
NOTHING_ASKED = -1.0
# of spans for which a method's drops are looked up
SIZES = tuple(size for power in range(14) for size in (2**power, 3 * 2**power))


def _late(name: str) -> bool:
    """True for a setting, or an option, of what is dropped inside the decoder."""
    group, _, option = name.rpartition(".")
    if group:
        return option in DecoderReducer.option_names
    return any(name == own or name.endswith(f"_{own}") for own in OWN_SECOND)


@dataclass(frozen=True)
class ServedMethod:
    """The method of one server.

    Attributes
    ----------
    reducer : EncoderReducer
        What it does before the decoder.
    budget : Budget or None
        Tokens of an image or clip: those that enter the decoder, or, with ``decoder_reducer``, the mean over its
        layers.
    decoder_reducer : DecoderReducer, optional
        What it drops inside the decoder by, where the server does: the same object for a method that reduces in both
        places.
    depth : int, optional
        Layers of the decoder, where rows are dropped inside it.
    """

    reducer: EncoderReducer
    budget: Budget | None
    decoder_reducer: DecoderReducer | None = None
    depth: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], positions: str, depth: int | None = None) -> ServedMethod:
        """The settings of a server, as its config holds them under ``KEY``.

        Parameters
        ----------
        given : mapping
            ``method`` (default "duet"), ``budget``, ``stages`` ("first", the default, or "all": drops inside the
            decoder, too), and settings of the method.
        positions : str
            What the family has: "compact" (rows are numbered anew, in the method's own order) or "keep" (grids,
            M-RoPE).
        depth : int, optional
            Layers of the decoder; needed for ``stages="all"``.

        Raises
        ------
        ValueError, TypeError
            Settings that no server can run, by name.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f"{KEY}={given!r}: give a dictionary such as {{'method': 'duet_plus', 'budget': 64}}")
        settings = {name: to_plain(value) for name, value in given.items()}
        method, budget, stages = (
            settings.pop("method", "duet"),
            settings.pop("budget", None),
            settings.pop("stages", "first"),
        )
        check_choice("stages", stages, STAGES)
        check_budget(budget)
        if stages == "all":
            return cls._of_all_stages(str(method), budget, settings, positions, depth)
        for part in str(method).split("+"):
            _check_stage(part, get_method(part))
        late = sorted(name for name, value in flattened(settings).items() if _late(name) and value not in (None, ()))
        if late:
            raise ValueError(
                f"{late[0]}: a setting of what is dropped inside the decoder, and this server runs the first stage: leave it out"
            )
        reducer = make_method(str(method), **_at_positions(settings, positions))
        assert isinstance(reducer, EncoderReducer)  # checked stage by stage
        _check_signals(reducer)
        made = cls(reducer, budget)
        made.span((1024,))
        return made

    @classmethod
    def _of_all_stages(
        cls, method: str, budget: Budget | None, settings: dict[str, Any], positions: str, depth: int | None
    ) -> ServedMethod:
        if depth is None:
            raise ValueError(
                "stages='all': how many layers the decoder has is not known; serve the first stage (stages='first')"
            )
        for part in method.split("+"):
            _check_tower(part, get_method(part))
        if isinstance(make_method(method), EncoderReducer):
            settings = _at_positions(settings, positions)
        elif positions == "keep":  # a family with grids
            check_choice("positions", settings.get("options", {}).get("positions", "keep"), ("keep",))
        reducer = make_method(method, **settings)
        check_decoder_method(reducer)
        assert isinstance(reducer, DecoderReducer)  # just checked
        first = reducer if isinstance(reducer, EncoderReducer) else _keep_all(reducer.options.positions)
        _check_signals(first)
        made = cls(first, budget, reducer, depth)
        _ = made.stages  # raises where no span can be planned
        return made

    @cached_property
    def plans(self) -> tuple[SpanPlan, ...]:
        """Plans of images of ``SIZES`` tokens, as far as the method can reduce them.

        Raises
        ------
        BudgetError
            No image can be reduced by these settings.
        """
        plans, refused = [], None
        for size in SIZES:
            try:
                plans.append(self._span(self.budget, (size,), 0))
            except BudgetError as error:  # below the method's floor
                refused = error
        if not plans and refused is not None:
            raise refused
        return tuple(plans)

    @cached_property
    def stages(self) -> DecoderStages:
        """The stages of the decoder: where rows leave for an image of any size that the method can reduce.

        Raises
        ------
        ValueError
            No image can be reduced by these settings, or rows leave in front of layer 0.
        """
        if self.depth is None:
            return DecoderStages(DEPTH, ())
        self.span((self.plans[-1].tokens,))  # raises where nothing enters
        return DecoderStages.of(self.plans, self.depth)

    def example(self, tokens: int) -> SpanPlan:
        """The plan of the image whose size is nearest to ``tokens``, of those in ``plans``."""
        return min(self.plans, key=lambda plan: abs(plan.tokens - tokens))

    @property
    def salt(self) -> str:
        """A digest of the settings: it tells rows of this server from those of another, where caches are shared."""
        late = self.decoder_reducer
        inside = () if late is None else (late.name, sorted(late.settings().items()), self.depth)
        text = repr(
            (duet_vlm.__version__, self.reducer.name, self.budget, sorted(self.reducer.settings().items()), *inside)
        )
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
            # servers answer a TypeError as a fault of their own
            raise ValueError(f"{REQUEST}={budget!r}: {error}") from None
        if self.budget is None:
            raise ValueError(
                f"{REQUEST}={budget!r}: this server has counts of its own instead of a budget, so requests cannot choose one"
            )
        return budget + 1.0 if isinstance(budget, int) else float(budget)

    def span(self, sizes: Sequence[int], structure: int = 0, requested: float = NOTHING_ASKED) -> SpanPlan:
        """The plan of an image or clip whose parts (crops, frames) have ``sizes`` tokens, with ``structure`` rows
        (newlines) beside them.

        Raises
        ------
        ValueError
            If nothing would be left, or a request asks for more than the server allows.
        """
        own = self._span(self.budget, tuple(sizes), structure)
        if own.entry < 1:
            raise ValueError(
                f"these settings leave none of an image's {own.tokens} visual tokens, and vLLM needs one at least: give budget="
            )
        if requested == NOTHING_ASKED:
            return own
        wanted = int(requested - 1) if requested > 1 else requested
        plan = self._span(wanted, tuple(sizes), structure)
        if plan.entry > own.entry:
            raise ValueError(
                f"{REQUEST}={wanted}: {plan.entry} of {plan.tokens} visual tokens, but this server allows {own.entry} at most"
            )
        return plan

    def _span(self, budget: Budget | None, sizes: tuple[int, ...], structure: int) -> SpanPlan:
        return _span(self.decoder_reducer or self.reducer, self.depth, budget, sizes, structure)

    @property
    def each(self) -> bool:
        """True where the parts of an image are reduced one by one."""
        return reduces_per_crop(self.reducer, family_default=False)


@lru_cache(maxsize=4096, typed=True)  # 1 is a token, 1.0 is all of them
def _span(
    reducer: Reducer, depth: int | None, budget: Budget | None, sizes: tuple[int, ...], structure: int
) -> SpanPlan:
    """The plan of a span: over a decoder of ``depth`` layers, or (None) of the rows that enter it."""

    def solve(tokens: int) -> SpanPlan:
        if depth is not None:
            return check_plan(reducer, plan_or_clamp(reducer, tokens, depth, budget), tokens, depth)
        assert isinstance(reducer, EncoderReducer)  # a first stage
        plan = reducer.plan(tokens, DEPTH, None) if budget is None else reducer.plan_entry(tokens, budget, DEPTH)
        return check_plan(reducer, plan, tokens, DEPTH)

    return plan_parts(
        solve,
        budget,
        sizes,
        structure,
        reduces_per_crop(reducer, family_default=False),
        reducer.options.newline_tokens == "keep",
    )


def _keep_all(positions: str) -> EncoderReducer:
    """The first stage of a method that has none."""
    every = make_method("divprune", keep=1.0, options=TokenOptions(positions=positions))
    assert isinstance(every, EncoderReducer)
    return every


def _at_positions(settings: Mapping[str, Any], positions: str) -> dict[str, Any]:
    """The settings with the family's positions; those that no server's first stage can run by are refused."""
    options = settings.get("options", {})
    if options.get("cls_token"):
        raise ValueError("cls_token=True: no server feeds the tower's CLS row to the decoder, leave it out")
    if any(settings.get(name) is False for name in settings if name.endswith("signal_segments")):
        raise ValueError(
            "signal_segments=False: it ranks all images of a call together, and a server decides which those are, leave it out"
        )
    if options.get("positions", positions) != positions:
        raise ValueError(
            f"positions={options['positions']!r}: vLLM gives this model {positions!r} positions, leave it out"
        )
    return {**settings, "options": {**options, "positions": positions}}


def _check_signals(reducer: EncoderReducer) -> None:
    """Refuse a method that reads more of the tower than the plug-in makes."""
    beyond = sorted(
        need.value for need in reducer.requires & ENCODER_INPUTS - FEATURE_INPUTS - {Input.IMPORTANCE, Input.KEYS}
    )
    if beyond or len(reducer.signal_layers) > 1:
        what = ", ".join(beyond) or "several vision layers"
        raise ValueError(
            f"{reducer.name}: it reads {what}, and the plug-in makes the importance and keys of one vision layer only: choose another"
        )


def _check_tower(name: str, cls: type[Reducer]) -> None:
    """Refuse a method that works inside the tower."""
    if issubclass(cls, TowerReducer):
        raise ValueError(
            f"method {name}: it works inside the vision tower, which vLLM runs as it is; take one behind it (duet_plus, visionzip, ...)"
        )


def _check_stage(name: str, cls: type[Reducer]) -> None:
    """Refuse a method that has no first stage behind the tower."""
    _check_tower(name, cls)
    if not issubclass(cls, EncoderReducer):
        what = "drops inside the decoder" if issubclass(cls, DecoderReducer) else "reduces nothing"
        remedy = "take one that reduces before the decoder (duet_plus, visionzip, ...)"
        raise ValueError(f"method {name}: it {what}, and this server runs first stages only; {remedy}")


def of_model(config: Mapping[str, Any], given: Mapping[str, Any]) -> ServedMethod:
    """The settings ``given`` (as for ``ServedMethod.of``) for a model.

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
        raise ValueError(
            f"{architecture}: vLLM cannot run a first stage for this model, only for {known}; --backend transformers runs others"
        )
    return ServedMethod.of(
        given, ARCHITECTURES[architecture], config.get("text_config", config).get("num_hidden_layers", DEPTH)
    )


def flags(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Flags that make vLLM reduce by ``given`` (as ``of_model``, which raises where it cannot); none holds blanks or
    quotes, which a shell reads."""
    made = of_model(config, given)
    (architecture,) = config["architectures"]
    values = {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in given.items()
    }
    return [
        "--hf-overrides.architectures+", PREFIX + architecture,
        *(part for name, value in values.items() for part in (f"--hf-overrides.{KEY}.{name}", value)),
        *(STAGE_FLAGS if made.decoder_reducer is not None else ()),
    ]  # fmt: skip
