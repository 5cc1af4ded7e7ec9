"""Conversations -> model inputs with labels: what the assistant says is learned, everything else is -100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duet_vlm.text import columns_of
from duet_vlm.train.data import Conversation

IGNORED = -100


class Collator:
    """Makes batches with the model's own processor, padded on the right.

    ``prompts`` 'chat' renders the chat template; 'plain' is every image followed by what the assistant says (LLaVA's first stage).
    """

    def __init__(self, processor: Any, prompts: str = "chat", max_length: int | None = None) -> None:
        self.processor, self.prompts, self.max_length = processor, prompts, max_length
        tokenizer = processor.tokenizer
        self.eos = tokenizer.eos_token or ""
        self.image = getattr(processor, "image_token_id", None) or tokenizer.convert_tokens_to_ids(processor.image_token)

    def __call__(self, batch: Sequence[Conversation]) -> dict[str, Tensor]:
        rendered = [self.render(conversation) for conversation in batch]
        texts = [text for text, _ in rendered]
        images = [list(conversation.images) for conversation in batch]
        kwargs: dict[str, Any] = {"images": images} if any(images) else {}
        bos = self.processor.tokenizer.bos_token
        special = not (bos and texts[0].startswith(bos))  # templates that write it themselves
        inputs = dict(
            self.processor(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=special, **kwargs)
        )
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for row, (text, spans) in enumerate(rendered):
            real = ids[row, : int(inputs["attention_mask"][row].sum())].tolist()
            columns, offsets = columns_of(self.processor.tokenizer, text, real, {self.image}, special)
            learned = [c for c, (a, b) in zip(columns, offsets, strict=True) if any(a < end and start < b for start, end in spans)]
            labels[row, learned] = ids[row, learned]
        return self._cut(inputs | {"labels": labels})

    def render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text for the processor and the character spans that are learned, each ending with the end-of-sequence token."""
        pieces = self._plain(conversation) if self.prompts == "plain" else self._chat(conversation)
        text, spans = "", []
        for piece, learned in pieces:
            if learned and self.eos not in piece:
                piece = piece.rstrip() + self.eos
            if learned:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        return text, spans

    def _chat(self, conversation: Conversation) -> list[tuple[str, bool]]:
        messages = conversation.messages
        whole = self._template(messages, False)
        pieces, done = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = len(self._template(messages[:number], True)), len(self._template(messages[: number + 1], False))
            if whole[:start] != self._template(messages[:number], True) or not done <= start <= end:
                raise ValueError("the chat template renders earlier turns anew, so it cannot be told which tokens the assistant says")
            pieces += [(whole[done:start], False), (whole[start:end], True)]
            done = end
        return [*pieces, (whole[done:], False)]

    def _template(self, messages: list[dict[str, Any]], answer_next: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=answer_next)

    def _plain(self, conversation: Conversation) -> list[tuple[str, bool]]:
        said = [part["text"] for m in conversation.messages if m["role"] == "assistant" for part in m["content"] if part["type"] == "text"]
        return [(self.processor.image_token * len(conversation.images), False), *((text, True) for text in said)]

    def _cut(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop what is longer than ``max_length``; the placeholders of an image cannot be cut."""
        length = inputs["input_ids"].shape[1]
        if self.max_length is None or length <= self.max_length:
            return inputs
        if bool((inputs["input_ids"][:, self.max_length :] == self.image).any()):
            raise ValueError(f"max_length={self.max_length} would cut an image in a sample of {length} tokens: raise it or leave the sample out")
        return {k: v[:, : self.max_length] if v.ndim == 2 and v.shape[1] == length else v for k, v in inputs.items()}
