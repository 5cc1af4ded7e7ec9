"""Salient words: from the question's characters to the prompt's columns, through tokenizers, processors and generate()."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from families import IMAGE, PAD, VOCAB, build, forward, generate, shared
from test_training import survivors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import duet_vlm
from duet_vlm.inputs import text_queries
from duet_vlm.inputs.text_queries import content_words, salient_mask
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime.salient_processor import SalientProcessor

WORDS = "USER : what color is the big car on left of tree a an it ? . ASSISTANT red and blue who drives 2 12 où est le chat".split()
QUESTION = "what color is it on left ?"
RULE = ["what", "color", "left"]  # words long enough for the rule that knows no language


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<image>": IMAGE, "<unk>": 1} | {
        word: 10 + i for i, word in enumerate(dict.fromkeys(WORDS))
    }
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE and max(vocabulary.values()) < VOCAB
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def no_spacy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rule that knows no language, whatever is installed here."""
    monkeypatch.setitem(sys.modules, "spacy", None)
    text_queries._spacy.cache_clear()
    yield
    text_queries._spacy.cache_clear()


def words_of(tokenizer: PreTrainedTokenizerFast, ids: Tensor, mask: Tensor) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(row[chosen].tolist()) for row, chosen in zip(ids, mask, strict=True)]


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[str], repeat: int = 5, side: str = "left") -> Tensor:
    """As a processor does: every placeholder repeated."""
    longer = [prompt.replace("<image>", "<image>" * repeat) for prompt in prompts]
    return tokenizer(longer, padding=True, padding_side=side, return_tensors="pt").input_ids


# ---- columns


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("repeat", [1, 5])
def test_columns_of_the_question(tokenizer: PreTrainedTokenizerFast, repeat: int, side: str) -> None:
    prompts = [f"USER: <image> {QUESTION} ASSISTANT:", "USER: <image> drives it ? ASSISTANT:"]
    ids = encode(tokenizer, prompts, repeat, side)
    mask = salient_mask(tokenizer, prompts, ids, IMAGE)
    assert mask.dtype == torch.bool and mask.shape == ids.shape
    assert words_of(tokenizer, ids, mask) == [[*RULE, ":"], ["drives", ":"]]  # the template word does not count


def test_words_before_the_last_image_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["<image> what color <image> drives it ?"]
    ids = encode(tokenizer, prompts, 3)
    assert words_of(tokenizer, ids, salient_mask(tokenizer, prompts, ids, IMAGE)) == [["drives", "?"]]


def test_without_images_every_word_may_count(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, [QUESTION])
    assert words_of(tokenizer, ids, salient_mask(tokenizer, QUESTION, ids, IMAGE)) == [[*RULE, "?"]]


def test_expanded_texts_are_understood_too(tokenizer: PreTrainedTokenizerFast) -> None:
    """Some pipelines keep the text with the placeholders already repeated."""
    prompt = f"USER: {'<image>' * 4} {QUESTION}"
    ids = encode(tokenizer, [prompt], 1)
    assert words_of(tokenizer, ids, salient_mask(tokenizer, prompt, ids, IMAGE)) == [[*RULE, "?"]]


def test_if_no_word_is_salient_all_are(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["<image> is it a ?"]
    ids = encode(tokenizer, prompts)
    assert words_of(tokenizer, ids, salient_mask(tokenizer, prompts, ids, IMAGE)) == [["is", "it", "a", "?"]]


def test_an_image_alone_asks_with_its_last_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, ["<image>", "who <image>"], 2)
    mask = salient_mask(tokenizer, ["<image>", "who <image>"], ids, IMAGE)
    assert words_of(tokenizer, ids, mask) == [[], ["who"]]


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        (["<image> who"] * 2, lambda ids: ids[:1], "2 texts for 1 rows of input_ids"),
        (["<image> who drives"], lambda ids: ids[:, :-1], "are not this text's tokens"),
        (["<image> who drives"], lambda ids: torch.where(ids == ids[0, -1], 12, ids), "are not this text's tokens"),
    ],
)
def test_texts_and_ids_that_do_not_belong_together(
    tokenizer: PreTrainedTokenizerFast, prompts: Any, change: Any, message: str
) -> None:
    ids = encode(tokenizer, prompts)
    with pytest.raises(ValueError, match=message):
        salient_mask(tokenizer, prompts, change(ids), IMAGE)


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"salient words need a fast tokenizer \(with offsets\), got Slow"):
        salient_mask(Slow(), "who", torch.zeros(1, 1).long())


# ---- words


def spoken(question: str) -> list[str]:
    return [question[a:b] for a, b in content_words(question)]


def test_the_rule_that_knows_no_language() -> None:
    assert spoken("What color is it in lane 2?") == ["What", "color", "lane", "2"]
    assert spoken("où a le chat") == ["où", "chat"]  # letters beyond ASCII
    assert spoken("这只猫在做什么") == ["这只猫在做什么"]
    assert spoken("Question: is it? ASSISTANT:") == ["is", "it"]
    assert spoken("") == [] and spoken("?!") == []


def test_spacy_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With spaCy: content parts of speech that are no stop words; if there are none, every word."""
    tags = {
        "what": ("PRON", True),
        "color": ("NOUN", False),
        "is": ("AUX", True),
        "it": ("PRON", True),
        "left": ("ADJ", False),
    }
    loaded: list[str] = []

    class Word:
        def __init__(self, word: str, idx: int) -> None:
            self.word, self.idx, self.is_alpha = word, idx, word.isalpha()
            self.pos_, self.is_stop = tags.get(word, ("PUNCT", False))

        def __len__(self) -> int:
            return len(self.word)

    def parse(question: str) -> list[Word]:
        starts = [i for i in range(len(question)) if question[i] != " " and (i == 0 or question[i - 1] == " ")]
        return [Word(question[i:].split(" ")[0], i) for i in starts]

    def load(name: str) -> Any:
        loaded.append(name)
        return parse

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    text_queries._spacy.cache_clear()
    assert spoken(QUESTION) == ["color", "left"]
    assert spoken("what is it") == ["what", "is", "it"]
    assert loaded == [text_queries.SPACY_MODEL]  # once


def test_spacy_without_its_model_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    text_queries._spacy.cache_clear()
    assert spoken(QUESTION) == RULE


# ---- the processor


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": 84, "width": 84}
    images = CLIPImageProcessor(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def picture(seed: int) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 255, (84, 84, 3), dtype=numpy.uint8)


PROMPTS = [f"USER: <image> {QUESTION} ASSISTANT:", "USER: <image> drives it ? ASSISTANT:"]


def test_the_processor_brings_the_mask_and_generate_takes_it(processor: LlavaProcessor) -> None:
    model, plain = shared("llava"), type(processor)
    pictures = [picture(1), picture(2)]
    before = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert "salient_mask" not in before
    with duet_vlm.attach(
        model, "duet", schedule=((3, 0.4), (5, 0.1)), options=TokenOptions(text_query="salient"), processor=processor
    ) as handle:
        assert isinstance(processor, plain) and type(processor).__name__ == plain.__name__
        inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
        assert words_of(processor.tokenizer, inputs["input_ids"], inputs["salient_mask"]) == [
            [*RULE, ":"],
            ["drives", ":"],
        ]
        written = generate(model, dict(inputs), 3)
        salient = handle.trace
        beams = generate(model, dict(inputs), 3, num_beams=2)
        assert [row[0].stages for row in handle.trace] == [salient[0][0].stages] * 2 + [salient[1][0].stages] * 2
        uncached = generate(model, dict(inputs), 3, use_cache=False)
        assert torch.equal(uncached.sequences, written.sequences) and beams.sequences.shape == written.sequences.shape
        forward(model, dict(inputs))
        assert handle.trace == salient
        # the same rows asked for by hand, through labels of nothing but the mask, choose the same tokens
        by_hand = dict(inputs) | {"salient_mask": inputs["salient_mask"].long()}
        assert survivors(handle, model, by_hand) == [
            [stage.kept for stage in span.stages] for row in salient for span in row
        ]
        handle.set(options=TokenOptions(text_query="all"))
        forward(model, dict(inputs))
        assert handle.trace != salient
    assert type(processor) is plain
    after = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert set(after) == set(before) and torch.equal(after["input_ids"], before["input_ids"])


def test_generate_takes_a_mask_made_by_hand(processor: LlavaProcessor) -> None:
    """Without the processor at attach, as serving stacks do that tokenize elsewhere."""
    model = shared("llava")
    inputs = dict(processor(images=[picture(1)], text=PROMPTS[:1], return_tensors="pt"))
    inputs["salient_mask"] = salient_mask(processor.tokenizer, PROMPTS[0], inputs["input_ids"], IMAGE)
    with (
        pytest.warns(UserWarning),
        duet_vlm.attach(model, "duet", schedule=((3, 0.4),), options=TokenOptions(text_query="salient")) as handle,
    ):
        generate(model, inputs, 3)
        made_by_hand = handle.trace
    with duet_vlm.attach(
        model, "duet", schedule=((3, 0.4),), options=TokenOptions(text_query="salient"), processor=processor
    ) as handle:
        generate(model, dict(processor(images=[picture(1)], text=PROMPTS[:1], return_tensors="pt")), 3)
        assert handle.trace == made_by_hand


def test_the_processor_works_for_other_calls_too(processor: LlavaProcessor) -> None:
    model = shared("llava")
    with duet_vlm.attach(model, "duet", budget=12, options=TokenOptions(text_query="salient"), processor=processor):
        words = processor(text=QUESTION, return_tensors="pt")
        assert words["salient_mask"].shape == words["input_ids"].shape
        forward(model, dict(words))
        assert processor.tokenizer.decode(words["input_ids"][0]) == QUESTION
    assert "salient_mask" not in processor(text=QUESTION, return_tensors="pt")


def test_detach_after_an_error_gives_the_processor_back(processor: LlavaProcessor) -> None:
    plain = type(processor)
    with (
        pytest.raises(KeyError),
        duet_vlm.attach(
            shared("llava"), "duet", budget=12, options=TokenOptions(text_query="salient"), processor=processor
        ),
    ):
        assert type(processor) is not plain
        raise KeyError
    assert type(processor) is plain and "__call__" not in vars(processor)


def attach(family: str, processor: Any) -> duet_vlm.Handle:
    return duet_vlm.attach(
        build(family), "duet", budget=12, options=TokenOptions(text_query="salient"), processor=processor
    )


def marks(processor: Any) -> bool:
    return "salient_mask" in processor(text=QUESTION, return_tensors="pt")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_one_processor_of_several_models_is_given_back_by_the_last(
    order: tuple[int, ...], processor: LlavaProcessor
) -> None:
    plain, state = type(processor), dict(vars(processor))
    handles = [attach("llava", processor) for _ in range(3)]
    # one wrapper, however many users
    assert type(processor).__mro__.count(plain) == 1 and type(processor).__base__ is plain
    for number in order:
        assert marks(processor) and isinstance(processor, plain)
        handles[number].detach()
    assert type(processor) is plain and vars(processor) == state and not marks(processor)


def test_each_model_marks_by_its_own_placeholder(processor: LlavaProcessor) -> None:
    """The last one that was attached says which; a processor has one."""
    first, second = SalientProcessor(processor, IMAGE), SalientProcessor(processor, 12)
    assert marks(processor)
    first.remove()
    assert marks(processor)
    second.remove()
    assert not marks(processor)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {n}": lambda processor, n=n: pickle.loads(pickle.dumps(processor, n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_an_attached_processor_are_plain(kind: str, processor: LlavaProcessor) -> None:
    plain = type(processor)
    with attach("llava", processor):
        twin = COPIES[kind](processor)
        assert type(twin) is plain and not marks(twin)
        assert marks(processor)
        with attach("llava", twin):  # which can be attached by itself
            assert marks(twin) and type(twin) is not type(processor)
        assert type(twin) is plain and not marks(twin) and marks(processor)
    assert type(processor) is plain and not marks(processor)


def test_an_instance_made_by_the_class_of_an_attached_processor_marks_nothing(processor: LlavaProcessor) -> None:
    with attach("llava", processor):
        twin = type(processor)(
            processor.image_processor, processor.tokenizer, patch_size=14, vision_feature_select_strategy="default"
        )
        assert not marks(twin)
        with attach("llava", twin):
            assert marks(twin) and marks(processor)
        assert not marks(twin) and marks(processor)


def test_a_class_that_somebody_put_on_top_stays(processor: LlavaProcessor) -> None:
    handle, plain = attach("llava", processor), type(processor).__base__
    theirs = processor.__class__ = type("Theirs", (type(processor),), {})
    assert marks(processor)
    other = attach("llava", processor)  # one on top of theirs uses the wrapper that is there
    assert type(processor) is theirs
    other.detach()
    with pytest.warns(UserWarning, match=r"left there: the processor's class Theirs\."):
        handle.detach()
    assert type(processor) is theirs and not marks(processor)
    processor.__class__ = plain


def test_a_class_that_somebody_took_off_with_theirs(
    processor: LlavaProcessor, recwarn: pytest.WarningsRecorder
) -> None:
    plain = type(processor)
    processor.__class__ = type("Theirs", (plain,), {})
    handle = attach("llava", processor)
    processor.__class__ = plain
    handle.detach()
    assert type(processor) is plain and not [w for w in recwarn if "left there" in str(w.message)]


RAGGED = [f"USER: <image> {QUESTION} ASSISTANT:", "USER: <image> who drives it ? ASSISTANT:"]


def test_ragged_ids_get_ragged_masks(processor: LlavaProcessor) -> None:
    """Without return_tensors rows have lengths of their own; each row's mask is that of the row alone."""
    pictures = [picture(1), picture(2)]
    with attach("llava", processor):
        lists = processor(images=pictures, text=RAGGED)
        assert [len(row) for row in lists["salient_mask"]] == [len(row) for row in lists["input_ids"]] and len(
            {*map(len, lists["input_ids"])}
        ) == 2
        for row, (image, text) in enumerate(zip(pictures, RAGGED, strict=True)):
            alone = processor(images=image, text=text, return_tensors="pt")
            assert lists["salient_mask"][row] == alone["salient_mask"][0].tolist()
        one = processor(text=RAGGED[1].replace("<image>", ""))
        assert [len(row) for row in one["salient_mask"]] == [len(row) for row in one["input_ids"]]
        arrays = processor(images=pictures, text=RAGGED, padding=True, return_tensors="np")
        tensors = processor(images=pictures, text=RAGGED, padding=True, return_tensors="pt")
        assert isinstance(arrays["salient_mask"], numpy.ndarray)
        assert numpy.array_equal(arrays["salient_mask"], tensors["salient_mask"].numpy())
