"""Conversations from files, and batches with labels: expectations are token pieces written out by hand."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from duet_vlm.evaluation import tiny
from duet_vlm.train.collate import Collator
from duet_vlm.train.data import Conversation, conversations, digest

# ---- reading files


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (sum(map(ord, name)) % 256, 0, 0)).save(tmp_path / name)
    return tmp_path


def saved(folder: Path, rows: Any, name: str = "data.json") -> str:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows) if name.endswith("l") else json.dumps(rows))
    return str(file)


def llava(*turns: tuple[str, str], **row: Any) -> dict[str, Any]:
    return row | {"conversations": [{"from": who, "value": said} for who, said in turns]}


def chat(*turns: tuple[str, Any], **row: Any) -> dict[str, Any]:
    return row | {"messages": [{"role": who, "content": said} for who, said in turns]}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}
SHADE = {name: (sum(map(ord, name)) % 256, 0, 0) for name in ("a.png", "b.png", "deep/c.png")}


def shades(conversation: Conversation) -> list[Any]:
    return [image.getpixel((0, 0)) for image in conversation.images]


def test_llava_rows(pictures: Path) -> None:
    rows = [
        llava(("human", "<image>\nwhat is it ?"), ("gpt", "a cat"), image="a.png"),
        llava(
            ("human", "compare <image> and\n<image> ."),
            ("gpt", "same"),
            ("human", "sure ?"),
            ("gpt", "yes"),
            image=["b.png", "deep/c.png"],
        ),
        llava(("system", "be kind"), ("human", "no picture"), ("gpt", "fine"), id="7"),
        llava(("human", "describe it\n<image>"), image="a.png"),
    ]
    first, second, third, last = conversations([saved(pictures, rows)])
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert first.messages[0]["content"] == [IMAGE, text("what is it ?")] and shades(first) == [SHADE["a.png"]]
    assert second.messages[0]["content"] == [text("compare "), IMAGE, text(" and"), IMAGE, text(" .")]
    assert shades(second) == [SHADE["b.png"], SHADE["deep/c.png"]] and second.messages[3]["content"] == [text("yes")]
    assert third.images == () and third.messages[0] == {"role": "system", "content": [text("be kind")]}
    assert [m["role"] for m in last.messages] == ["user"] and last.messages[0]["content"] == [
        text("describe it"),
        IMAGE,
    ]


def test_chat_rows_in_json_lines_with_a_folder_of_images(pictures: Path, tmp_path: Path) -> None:
    own, named = {"type": "image", "path": "deep/c.png"}, {"type": "image", "image": str(pictures / "b.png")}
    rows = [
        chat(("user", [text("look"), IMAGE, own]), ("assistant", [text("ok")]), images=["a.png"]),
        chat(("user", "<image> and then ?"), ("assistant", "done"), image="b.png"),
        chat(("user", [named]), ("assistant", "hm")),
    ]
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    first, second, third = conversations([saved(elsewhere, rows, "chat.jsonl")], images=str(pictures))
    assert first.messages[0]["content"] == [text("look"), IMAGE, IMAGE] and shades(first) == [
        SHADE["a.png"],
        SHADE["deep/c.png"],
    ]
    assert second.messages[0]["content"] == [IMAGE, text(" and then ?")] and shades(second) == [SHADE["b.png"]]
    assert shades(third) == [SHADE["b.png"]]


def test_several_sources_and_limit(pictures: Path) -> None:
    rows = [llava(("human", str(i)), ("gpt", "x")) for i in range(3)]
    data = conversations([saved(pictures, rows), "tiny"], limit=2, seed=5)
    assert len(data) == 4
    assert [data[i].messages[0]["content"][0]["text"] for i in (0, 1)] == ["0", "1"]
    item = tiny.sample("train", 1, 5)
    assert data[3].messages[1]["content"] == [text(item.answer)] and data[3].images[0].tobytes() == item.image.tobytes()
    copy = pickle.loads(pickle.dumps(data))  # as data workers get it where processes are not forked
    assert copy[1].messages == data[1].messages and copy[3].images[0].tobytes() == item.image.tobytes()
    held_out = conversations(["tiny"], limit=1, split="validation")[0]
    assert held_out.images[0].tobytes() == tiny.sample("validation", 0).image.tobytes()


BROKEN: dict[str, tuple[Any, str]] = {
    "no turns": (
        llava(),
        r"data.json, row 1 \(counted from 0\): a conversation is a list of turns, at least one.*got \[\]",
    ),
    "no list": ({"text": "hi"}, "row 1 .*needs a list under 'conversations' .* or 'messages'"),
    "not an object": ("hi", "row 1 .*needs a list under"),
    "turns of text": ({"messages": ["hi"]}, "row 1 .*a conversation is a list of turns"),
    "unknown speaker": (llava(("robot", "hi")), "row 1 .*from is 'robot'; known: human, user, gpt"),
    "unknown role": (chat(("tool", "hi")), "row 1 .*role is 'tool'; known: human, user, gpt"),
    "no text": (llava(("human", None)), "row 1 .*a turn needs text or a list of parts, got NoneType"),
    "too many places": (
        llava(("human", "<image><image>"), image="a.png"),
        "row 1 .*more places for images than images",
    ),
    "a place and no image": (llava(("human", "<image>")), "row 1 .*more places for images than images"),
    "too few places": (
        llava(("human", "<image>"), image=["a.png", "b.png"]),
        "row 1 .*1 places for 2 images: put <image> where",
    ),
    "missing file": (llava(("human", "<image>"), image="deep/gone.png"), "row 1 .*deep/gone.png: no such image file"),
    "missing folder": (
        llava(("human", "<image>"), image="nowhere/gone.png"),
        "row 1 .*nowhere/gone.png: no such image file",
    ),
    "an image inline": (
        llava(("human", "<image>"), image=[{"bytes": "AA"}]),
        "row 1 .*images are given by their paths, got dict",
    ),
    "a part of another kind": (chat(("user", [{"type": "video"}])), "row 1 .*a part is .* got .*video"),
    "a part without text": (chat(("user", [{"type": "text"}])), "row 1 .*a part is .* got"),
    "a marker inside a part": (chat(("user", [text("a <image> b")])), "row 1 .*<image> inside a text part"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named_before_training(name: str, pictures: Path) -> None:
    row, message = BROKEN[name]
    good = llava(("human", "<image>"), ("gpt", "x"), image="a.png")
    with pytest.raises(ValueError, match=message):
        conversations([saved(pictures, [good, row])])


@pytest.mark.parametrize("place", [0, 54, 30_000, 61_000, -1])
def test_a_picture_that_changes_in_one_byte_is_other_data(pictures: Path, place: int) -> None:
    """Uncompressed pictures change where their pixels do, with the size and both ends as they were."""
    Image.effect_noise((300, 200), 40).save(pictures / "raw.bmp")
    data = saved(pictures, [llava(("human", "<image>"), image="raw.bmp"), llava(("human", "<image>"), image="a.png")])
    before = digest([data])
    held = bytearray((pictures / "raw.bmp").read_bytes())
    held[place] ^= 1
    (pictures / "raw.bmp").write_bytes(held)
    assert digest([data]) != before
    held[place] ^= 1
    (pictures / "raw.bmp").write_bytes(held)
    assert digest([data]) == before


def test_broken_files(pictures: Path) -> None:
    cases = {
        "half.json": ('[{"messages": ', "half.json: not JSON"),
        "half.jsonl": ('\n{"messages": [{"role": "user", "content": "x"}]}\n\n{"mess', "half.jsonl, line 4: not JSON"),
        "object.json": ('{"messages": []}', "object.json: expected a list of conversations, got dict"),
        "empty.json": ("[]", "empty.json: holds no conversation"),
        "blank.jsonl": ("\n\n", "blank.jsonl: holds no conversation"),
        "list.txt": ("[]", "list.txt: give a .json or .jsonl file that exists, or tiny"),
    }
    for name, (content, message) in cases.items():
        (pictures / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            conversations([str(pictures / name)])
    (pictures / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.json: not JSON"):
        conversations([str(pictures / "latin.json")])
    with pytest.raises(ValueError, match="gone.json: give a .json or .jsonl file that exists"):
        conversations([str(pictures / "gone.json")])
    with pytest.raises(ValueError, match="images: .*nowhere: no such folder"):
        conversations([saved(pictures, [])], images=str(pictures / "nowhere"))
    with pytest.raises(ValueError, match="tiny draws conversations without end: give limit"):
        conversations(["tiny"])


def test_missing_images_are_counted_and_a_corrupt_one_is_named_when_it_is_reached(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"row 0 .*gone0.png: no such image file \(3 such images in this folder\)"):
        conversations([saved(pictures, [llava(("human", "<image>"), image=f"gone{i}.png") for i in range(3)])])
    whole = (pictures / "b.png").read_bytes()
    (pictures / "b.png").write_bytes(whole[: len(whole) // 2])
    data = conversations([saved(pictures, [llava(("human", "<image>"), image=name) for name in ("a.png", "b.png")])])
    assert len(data[0].images) == 1
    with pytest.raises(ValueError, match=r"data.json, row 1 \(counted from 0\): .*b.png: the file is damaged"):
        data[1]


# ---- batches with labels: three templates, tokens written out by hand

PAD_EOS = "<eos>"
VOCABULARY = [
    *(PAD_EOS, "<pad>", "<unk>", "<bos>", "<image>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"),
    *"USER: ASSISTANT: SYSTEM: user assistant system be kind what is it and then a red blue cat ? .".split(),
]
ID = {token: i for i, token in enumerate(VOCABULARY)}
PARTS = "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"

# as llava-hf's: no token ends an answer, {% generation %} around it; as Qwen's: <|im_end|> and a line break end every
# turn
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] if p['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{% if m['role'] == 'assistant' %}{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|> system be kind <|im_end|> \n' }}{% endif %}"
    "{{ '<|im_start|> ' + m['role'] + ' \n' }}"
    + PARTS.replace("IMAGE", " <|image_pad|> ")
    + "{{ ' <|im_end|> \n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant \n' }}{% endif %}"
)
BOS = "{{ '<bos> ' }}" + LLAVA  # a template that writes <bos> itself


def tokenizer(eos: str, image: str, pad: str = "<pad>", adds_bos: bool = False) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ID["<bos>"])])
    special = {"image_token": image} | ({"video_token": "<|video_pad|>"} if "pad" in image else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, pad_token=pad, bos_token="<bos>" if adds_bos else None, unk_token="<unk>",
        extra_special_tokens=special, padding_side="left",
    )  # fmt: skip


def llava_processor(template: str = LLAVA, **kwargs: Any) -> LlavaProcessor:
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    options = {"eos": "<eos>", "image": "<image>"} | kwargs
    return LlavaProcessor(images, tokenizer(**options), patch_size=14, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=template)  # fmt: skip


class Qwen(Qwen2_5_VLProcessor):
    """Without the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
        return None


def qwen_processor() -> Qwen:
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    return Qwen(images, tokenizer("<|im_end|>", "<|image_pad|>", "<eos>"), None, chat_template=QWEN)


def talk(*turns: tuple[str, str], images: int = 0) -> Conversation:
    """``#`` stands for an image."""
    messages = []
    for role, said in turns:
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(said.split("#")):
            parts += [dict(IMAGE)] if number else []
            parts += [text(piece)] if piece else []
        messages.append({"role": role, "content": parts})
    return Conversation(messages, tuple(Image.new("RGB", (56, 56), (40 * i, 0, 0)) for i in range(images)), "talk")


def expected(batch: Sequence[str], image: str) -> tuple[list[list[str]], list[list[str]]]:
    """Pieces by hand: words, ``[learned words]``, ``#`` for an image of four placeholders; with the labels beside them."""
    tokens, labels = [], []
    for row in batch:
        said: list[str] = []
        learned: list[str] = []
        inside = False
        for piece in row.split():
            if piece in "[]":
                inside = piece == "["
                continue
            said += [image] * 4 if piece == "#" else [piece]
            learned += ["-"] * 4 if piece == "#" else [piece if inside else "-"]
        tokens.append(said)
        labels.append(learned)
    return tokens, labels


def words(ids: Tensor, mask: Tensor) -> list[list[str]]:
    assert bool((mask[:, 1:] <= mask[:, :-1]).all())  # padded on the right
    return [["-" if i == -100 else VOCABULARY[i] for i, real in zip(row, there, strict=True) if real]
            for row, there in zip(ids.tolist(), mask.tolist(), strict=True)]  # fmt: skip


def check(
    processor: Any, batch: Sequence[Conversation], by_hand: Sequence[str], image: str = "<image>", **options: Any
) -> dict[str, Tensor]:
    out = Collator(processor, **options)(batch)
    tokens, labels = expected(by_hand, image)
    assert words(out["input_ids"], out["attention_mask"]) == tokens
    assert words(out["labels"], out["attention_mask"]) == labels
    assert bool((out["labels"][out["attention_mask"] == 0] == -100).all())
    return out


ONE_TURN = talk(("user", "#what is it ?"), ("assistant", "a red cat"), images=1)
TWO_TURNS = talk(
    ("user", "#what is it ?"), ("assistant", "a cat"), ("user", "and then ?"), ("assistant", "."), images=1
)
NO_IMAGE = talk(("user", "what is it ?"), ("assistant", "blue"))
NO_ANSWER = talk(("user", "#what ?"), images=1)
TWO_IMAGES = talk(("user", "#and#?"), ("assistant", "red and blue"), images=2)
LATER_IMAGE = talk(("user", "what ?"), ("assistant", "it"), ("user", "#and ?"), ("assistant", "red"), images=1)
SYSTEM = talk(("system", "be kind"), ("user", "what ?"), ("assistant", "cat"))
ALL = (ONE_TURN, TWO_TURNS, NO_IMAGE, NO_ANSWER, TWO_IMAGES, LATER_IMAGE, SYSTEM)

LLAVA_BY_HAND = (
    "USER: # what is it ? ASSISTANT: [ a red cat <eos> ]",
    "USER: # what is it ? ASSISTANT: [ a cat <eos> ] USER: and then ? ASSISTANT: [ . <eos> ]",
    "USER: what is it ? ASSISTANT: [ blue <eos> ]",
    "USER: # what ?",
    "USER: # # and ? ASSISTANT: [ red and blue <eos> ]",
    "USER: what ? ASSISTANT: [ it <eos> ] USER: # and ? ASSISTANT: [ red <eos> ]",
    "SYSTEM: be kind USER: what ? ASSISTANT: [ cat <eos> ]",
)
HEAD = "<|im_start|> system be kind <|im_end|>"
QWEN_BY_HAND = (
    f"{HEAD} <|im_start|> user # what is it ? <|im_end|> <|im_start|> assistant [ a red cat <|im_end|> ]",
    f"{HEAD} <|im_start|> user # what is it ? <|im_end|> <|im_start|> assistant [ a cat <|im_end|> ] <|im_start|> user and then ? <|im_end|> "
    "<|im_start|> assistant [ . <|im_end|> ]",
    f"{HEAD} <|im_start|> user what is it ? <|im_end|> <|im_start|> assistant [ blue <|im_end|> ]",
    f"{HEAD} <|im_start|> user # what ? <|im_end|>",
    f"{HEAD} <|im_start|> user # and # ? <|im_end|> <|im_start|> assistant [ red and blue <|im_end|> ]",
    f"{HEAD} <|im_start|> user what ? <|im_end|> <|im_start|> assistant [ it <|im_end|> ] <|im_start|> user # and ? <|im_end|> "
    "<|im_start|> assistant [ red <|im_end|> ]",
    f"{HEAD} <|im_start|> user what ? <|im_end|> <|im_start|> assistant [ cat <|im_end|> ]",
)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_llava_template_without_an_end_of_turn(pad: str) -> None:
    processor = llava_processor(pad=pad)
    for conversation, by_hand in zip(ALL, LLAVA_BY_HAND, strict=True):
        check(processor, [conversation], [by_hand])
    out = check(processor, ALL, LLAVA_BY_HAND)  # mixed: with and without images, ragged
    assert out["pixel_values"].shape == (6, 3, 28, 28)
    reds = out["pixel_values"][:, 0].mean((1, 2))
    assert bool(reds[4] > reds[3])  # the brighter image of TWO_IMAGES is its second
    assert "pixel_values" not in check(processor, [NO_IMAGE, SYSTEM], [LLAVA_BY_HAND[2], LLAVA_BY_HAND[6]])


def test_qwen_template_whose_padding_is_not_its_end_of_turn() -> None:
    processor = qwen_processor()
    for conversation, by_hand in zip(ALL, QWEN_BY_HAND, strict=True):
        check(processor, [conversation], [by_hand], "<|image_pad|>")
    out = check(processor, ALL, QWEN_BY_HAND, "<|image_pad|>")
    assert out["image_grid_thw"].tolist() == [[1, 4, 4]] * 6 and len(out["pixel_values"]) == 6 * 16
    assert torch.equal(out["mm_token_type_ids"], (out["input_ids"] == ID["<|image_pad|>"]).long())


def test_a_beginning_token_from_template_or_tokenizer_stands_there_once() -> None:
    with_bos = [f"<bos> {row}" for row in LLAVA_BY_HAND]
    check(llava_processor(adds_bos=True), ALL, with_bos)
    check(llava_processor(BOS, adds_bos=True), ALL, with_bos)


def test_an_answer_that_ends_with_the_end_token_is_not_ended_twice() -> None:
    ended = talk(("user", "what ?"), ("assistant", "cat <eos>"))
    check(llava_processor(), [ended], ["USER: what ? ASSISTANT: [ cat <eos> ]"])


def test_plain_prompts_are_images_and_what_is_said_of_them() -> None:
    by_hand = ["# [ a red cat <eos> ]", "[ blue <eos> ]", "# # [ red and blue <eos> ]", "#"]
    check(llava_processor(), [ONE_TURN, NO_IMAGE, TWO_IMAGES, NO_ANSWER], by_hand, prompts="plain")


def test_the_embedded_model_learns_its_answer_and_the_end() -> None:
    _, processor = tiny.load()
    item = tiny.samples("train", 1)[0]
    out = Collator(processor)([*conversations(["tiny"], limit=1)])
    answer = processor.tokenizer(item.answer, add_special_tokens=False)["input_ids"] + [
        processor.tokenizer.eos_token_id
    ]
    prompt = processor(text=tiny.prompt(item.question), images=item.image, return_tensors="pt")["input_ids"][0].tolist()
    assert out["input_ids"][0].tolist() == prompt + answer
    assert out["labels"][0].tolist() == [-100] * len(prompt) + answer


def test_max_length_cuts_text_at_the_end_and_never_an_image() -> None:
    processor = llava_processor()
    whole = Collator(processor)([TWO_TURNS, NO_IMAGE])
    short = Collator(processor, max_length=10)([TWO_TURNS, NO_IMAGE])
    assert all(torch.equal(short[name], whole[name][:, :10]) for name in ("input_ids", "attention_mask", "labels"))
    assert torch.equal(short["pixel_values"], whole["pixel_values"])
    with pytest.raises(ValueError, match="talk: max_length=10 would cut an image: raise it or leave this sample out"):
        Collator(processor, max_length=10)([NO_IMAGE, LATER_IMAGE])
    grid = Collator(qwen_processor(), max_length=20)([ONE_TURN])  # rows of pixels are no text, however long they are
    assert grid["pixel_values"].shape == (16, 1176) and grid["input_ids"].shape == (1, 20)


def test_what_a_template_cannot_do_is_an_error() -> None:
    anew = "{% for m in messages %}{% if loop.last %}{{ 'last ' }}{% endif %}{{ m['role'] + ' ' }}{% endfor %}"
    with pytest.raises(
        ValueError, match="talk: the chat template changes earlier turns .* tokens of turn 1 cannot be found"
    ):
        Collator(llava_processor(anew))([TWO_TURNS])
    with pytest.raises(ValueError, match="talk: 0 x <image> in its text for 1 images"):
        Collator(llava_processor("{{ messages[0]['role'] }}"))([NO_ANSWER])
    with pytest.raises(ValueError, match="talk: 2 x <image> in its text for 1 images"):
        Collator(llava_processor())([talk(("user", "#what"), ("assistant", "<image> "), images=1)])
    processor = llava_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="prompts: chat needs a processor with a chat template"):
        Collator(processor)
