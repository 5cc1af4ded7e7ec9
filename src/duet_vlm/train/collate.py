"""Conversations to model inputs with labels: the assistant's text is learned, everything else is -100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duet_vlm.train.data import Conversation

IGNORED = -100


class Collator:
    """Makes batches with the model's own processor, padded on the right.

    Learned are the assistant's text and the special token that ends it: the template's own, or the end-of-sequence
    token where the template ends a turn without one (LLaVA's). ``prompts`` 'chat' renders the chat template; 'plain' is
    the images followed by the assistant's text (LLaVA's first stage).
    """

    def __init__(self, processor: Any, prompts: str = "chat", max_length: int | None = None) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise TypeError(f"training needs a fast tokenizer (with offsets), got {type(tokenizer).__name__}")
        if prompts == "chat" and not getattr(processor, "chat_template", None):
            raise ValueError(
                "prompts: chat needs a processor with a chat template; this one has none (prompts: plain does without)"
            )
        self.processor, self.prompts, self.max_length = processor, prompts, max_length
        self.image = tokenizer.convert_tokens_to_ids(processor.image_token)
        self.ends = tuple(token for token in tokenizer.all_special_tokens if token != processor.image_token)
        self.bos, self.eos = tokenizer.bos_token, tokenizer.eos_token or ""

    def __call__(self, batch: Sequence[Conversation]) -> dict[str, Tensor]:
        rendered = [self.render(conversation) for conversation in batch]
        texts = [text for text, _ in rendered]
        images = [list(conversation.images) for conversation in batch]
        # some templates write it themselves
        special = not (self.bos and any(text.startswith(self.bos) for text in texts))
        kwargs: dict[str, Any] = {"images": images} if any(images) else {}
        inputs = dict(
            self.processor(
                text=texts,
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=special,
                **kwargs,
            )
        )
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for row, (text, spans) in enumerate(rendered):
            real = ids[row, : int(inputs["attention_mask"][row].sum())].tolist()
            columns, offsets = columns_of(self.processor.tokenizer, text, real, {self.image}, special)
            learned = [
                c
                for c, (a, b) in zip(columns, offsets, strict=True)
                if any(a < end and start < b for start, end in spans)
            ]
            labels[row, learned] = ids[row, learned]
        return self._cut(inputs | {"labels": labels}, batch)

    def render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text for the processor and the character spans that are learned.

        Raises
        ------
        ValueError
            A template that does not render earlier turns as it did before, or that has no place for an image.
        """
        text, spans = "", []
        for piece, learned in self._plain(conversation) if self.prompts == "plain" else self._chat(conversation):
            if learned:
                said = piece.rstrip()
                rest = piece[len(said) :]
                if not said.endswith(self.ends):
                    said, rest = said + self.eos, ""
                spans.append((len(text), len(text) + len(said)))
                piece = said + rest
            text += piece
        places = text.count(self.processor.image_token)
        if places != len(conversation.images):
            raise ValueError(
                f"{conversation.where}: {places} x {self.processor.image_token} in its text for {len(conversation.images)} images"
            )
        return text, spans

    def _chat(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered template in pieces, each with True if it is learned: an answer is the text that its turn adds to
        the prompt before it."""
        messages = conversation.messages
        whole = self.processor.apply_chat_template(messages)
        parts, done = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.processor.apply_chat_template(messages[:number], add_generation_prompt=True)
            answered = self.processor.apply_chat_template(messages[: number + 1])
            if not (whole.startswith(prompt) and whole.startswith(answered) and done <= len(prompt) <= len(answered)):
                raise ValueError(
                    f"{conversation.where}: the chat template changes earlier turns when one is added, so the tokens of turn {number} cannot be found"
                )
            parts += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            done = len(answered)
        return [*parts, (whole[done:], False)]

    def _plain(self, conversation: Conversation) -> list[tuple[str, bool]]:
        said = [
            part["text"]
            for m in conversation.messages
            if m["role"] == "assistant"
            for part in m["content"]
            if part["type"] == "text"
        ]
        return [(self.processor.image_token * len(conversation.images), False), *((text, True) for text in said)]

    def _cut(self, inputs: dict[str, Tensor], batch: Sequence[Conversation]) -> dict[str, Tensor]:
        """Drop tokens after ``max_length``; the placeholders of an image cannot be cut."""
        ids = inputs["input_ids"]
        if self.max_length is None or ids.shape[1] <= self.max_length:
            return inputs
        for conversation, lost in zip(batch, (ids[:, self.max_length :] == self.image).any(1).tolist(), strict=True):
            if lost:
                raise ValueError(
                    f"{conversation.where}: max_length={self.max_length} would cut an image: raise it or leave this sample out"
                )
        return {
            k: v[:, : self.max_length] if v.shape == ids.shape and not v.is_floating_point() else v
            for k, v in inputs.items()
        }


def columns_of(
    tokenizer: Any, text: str, tokens: list[int], skip: set[int | None], special: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Positions in ``tokens`` of each token of ``text``, and the characters it covers; ``skip`` (placeholders, padding)
    counts on neither side.

    Raises
    ------
    ValueError
        If the tokens are not those of the text.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    columns = [c for c, token in enumerate(tokens) if token not in skip]
    numbers = [p for p, token in enumerate(encoded["input_ids"]) if token not in skip]
    if [tokens[c] for c in columns] != [encoded["input_ids"][p] for p in numbers]:
        raise ValueError(
            "input_ids are not this text's tokens (truncated, or another processor's): its words cannot be found in "
            "them"
        )
    return columns, [tuple(encoded["offset_mapping"][p]) for p in numbers]
