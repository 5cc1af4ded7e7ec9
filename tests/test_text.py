"""Salient words: from the question's characters to the prompt's columns, through tokenizers, processors and generate()."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from families import IMAGE, PAD, VOCAB, forward, generate, shared
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Whitespace
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import duet_vlm
from duet_vlm.inputs import text_queries
from duet_vlm.inputs.text_queries import content_words, salient_words, token_spans
from duet_vlm.reducers.options import TokenOptions

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


# ---- tokens


def candidates(ids: Tensor) -> Tensor:
    """Text after the last placeholder of each row."""
    later = (ids == IMAGE).long().flip(1).cumsum(1).flip(1) == 0
    return later & (ids != PAD)


def marked(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> list[list[str]]:
    mask = salient_words(tokenizer, ids, candidates(ids))
    assert mask.dtype == torch.bool and mask.shape == ids.shape
    return words_of(tokenizer, ids, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("repeat", [1, 5])
def test_tokens_of_the_question(tokenizer: PreTrainedTokenizerFast, repeat: int, side: str) -> None:
    prompts = [f"USER: <image> {QUESTION} ASSISTANT:", "USER: <image> drives it ? ASSISTANT:"]
    ids = encode(tokenizer, prompts, repeat, side)
    assert marked(tokenizer, ids) == [[*RULE, ":"], ["drives", ":"]]  # the template word does not count


def test_words_before_the_last_image_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, encode(tokenizer, ["<image> what color <image> drives it ?"], 3)) == [["drives", "?"]]


def test_if_no_word_is_salient_all_are(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, encode(tokenizer, ["<image> is it a ?"])) == [["is", "it", "a", "?"]]


def test_an_image_alone_has_no_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert marked(tokenizer, encode(tokenizer, ["<image>", "who <image>"], 2)) == [[], []]


BYTES = "Où est le chat 🐈 à gauche ? 北京在哪里"  # characters of one to four bytes


@pytest.mark.parametrize("words", ["byte level", "metaspace"])
def test_characters_of_a_token_in_every_kind_of_tokenizer(words: str) -> None:
    """Tokens of single bytes, which are characters together only, and tokens that carry the space before a word."""
    if words == "byte level":
        model = Tokenizer(BPE({token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))}, []))
        model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    else:
        known = ["<unk>", *("▁" + word for word in BYTES.split())]
        model = Tokenizer(WordLevel({token: number for number, token in enumerate(known)}, unk_token="<unk>"))
        model.pre_tokenizer, model.decoder = Metaspace(), MetaspaceDecoder()
    made = PreTrainedTokenizerFast(tokenizer_object=model)
    text, spans = token_spans(made, made(BYTES, add_special_tokens=False).input_ids)
    assert text == BYTES and spans[0][0] == 0 and spans[-1][1] == len(BYTES)
    ends = [end for _, end in spans]
    assert [begin for begin, _ in spans[1:]] == ends[:-1]
    if words == "metaspace":
        assert [text[a:b].strip() for a, b in spans] == BYTES.split()
    else:
        number = 0
        for place, character in enumerate(BYTES):
            number += len(character.encode())
            assert spans[number - 1][1] == place + 1  # a whole character has been decoded


def test_special_tokens_are_no_words(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, ["<image> drives <unk> it ?"])
    assert marked(tokenizer, ids) == [["drives", "?"]]


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


def survivors_by_row(trace: Any) -> Any:
    return [[stage.kept for stage in span.stages] for row in trace for span in row]


def test_salient_words_rank_and_the_processor_is_untouched(processor: LlavaProcessor) -> None:
    model, state, plain = shared("llava"), dict(vars(processor)), type(processor)
    inputs = processor(images=[picture(1), picture(2)], text=PROMPTS, padding=True, return_tensors="pt")
    with duet_vlm.attach(
        model, "duet", schedule=((3, 0.4), (5, 0.1)), options=TokenOptions(text_query="salient"), processor=processor
    ) as handle:
        assert type(processor) is plain and vars(processor) == state
        written = generate(model, dict(inputs), 3)
        salient = handle.trace
        beams = generate(model, dict(inputs), 3, num_beams=2)
        assert [row[0].stages for row in handle.trace] == [salient[0][0].stages] * 2 + [salient[1][0].stages] * 2
        uncached = generate(model, dict(inputs), 3, use_cache=False)
        assert torch.equal(uncached.sequences, written.sequences) and beams.sequences.shape == written.sequences.shape
        forward(model, dict(inputs))
        assert handle.trace == salient
        # the same rows asked for by hand: all others are supervised, so that they are no queries
        ids = inputs["input_ids"]
        asked = torch.zeros_like(ids, dtype=torch.bool)
        for row, words in enumerate(([*RULE, ":"], ["drives", ":"])):
            columns = candidates(ids)[row].nonzero()[:, 0].tolist()
            named = [c for c in columns if processor.tokenizer.convert_ids_to_tokens(int(ids[row, c])) in words]
            asked[row, [*[c for c in named if ids[row, c] != ids[row, columns[-1]]], columns[-1]]] = True
        handle.set(options=TokenOptions(text_query="all", training_turns="all", protect_predicting_tokens=False))
        labels = torch.where(candidates(ids) & ~asked, ids, -100)
        forward(model, dict(inputs), labels=labels)
        assert survivors_by_row(handle.trace) == survivors_by_row(salient)
        handle.set(options=TokenOptions(text_query="all", training_turns="first", protect_predicting_tokens=True))
        forward(model, dict(inputs))
        assert handle.trace != salient
    assert type(processor) is plain and vars(processor) == state


def test_salient_words_of_a_prompt_passed_as_embeddings_are_refused(processor: LlavaProcessor) -> None:
    model = shared("llava")
    inputs = dict(processor(images=[picture(1)], text=PROMPTS[:1], return_tensors="pt"))
    with duet_vlm.attach(
        model, "duet", schedule=((3, 0.4),), options=TokenOptions(text_query="salient"), processor=processor
    ):
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(ValueError, match="this prompt came as inputs_embeds: pass input_ids"):
            forward(model, inputs, inputs_embeds=embeds)
