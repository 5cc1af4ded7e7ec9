"""Query positions: the text tokens that rank the visual tokens (all, the last one, or the salient words of the
question)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.ragged import after_last_true, last_true

CONTENT_POS = {"NOUN", "PROPN", "PRON", "VERB", "ADJ", "ADV", "NUM"}
SPACY_MODEL = "en_core_web_sm"
SHORTEST_WORD = 3


def query_rows(
    kind: str,
    visual: Tensor,
    valid: Tensor,
    labels: Tensor | None = None,
    salient: Tensor | None = None,
    turns: str = "first",
) -> Tensor:
    """Query positions of a batch of prompts; a prompt without any gets none here and falls back to the last visual
    token.

    Parameters
    ----------
    kind : str
        "all" (every position after the last visual token), "last" (the last position before the answer) or "salient".
    visual, valid : Tensor
        [B, S] bool.
    labels : Tensor, optional
        [B, S]; with labels only unsupervised positions (-100) are queries: those before the first answer, or of all
        ``turns``.
    salient : Tensor, optional
        [B, S] bool, needed for "salient" (positions after the prompt it was made for count as not salient).

    Returns
    -------
    Tensor
        [B, S] bool.
    """
    after = valid & after_last_true(visual)
    if labels is not None:
        answer = (labels != -100) & after
        answers_begun = answer.cumsum(1)
        candidates = after & ~answer & ((answers_begun == 0) | (turns == "all"))
        if kind == "last":
            before_answer = torch.zeros_like(candidates)
            before_answer[:, :-1] = ~answer[:, :-1] & answer[:, 1:]
            has_answer = answer.any(1, keepdim=True)
            # a visual token may be dropped before a later turn
            last_query = before_answer & ((answers_begun == 0) | (turns == "all")) & after
            return torch.where(has_answer, last_query, last_true(candidates))
        after = candidates
    if kind == "last":
        return last_true(after)
    if kind == "salient":
        if salient is None:
            raise ValueError(
                "text_query='salient' needs to know the question's words: pass processor= to attach() and make the "
                "inputs with that "
                "processor, or pass salient_mask=duet_vlm.inputs.text_queries.salient_mask(tokenizer, texts, "
                "input_ids) to the model"
            )
        salient = torch.nn.functional.pad(salient, (0, max(0, after.shape[1] - salient.shape[1])))
        if salient.shape != after.shape:
            raise ValueError(
                f"salient_mask is {tuple(salient.shape)}, the prompt {tuple(after.shape)}: make both from the same "
                "inputs"
            )
        return after & salient.to(after.device).bool()
    return after


def salient_mask(
    tokenizer: Any, text: str | Sequence[str], input_ids: Tensor, image_token_id: int | None = None
) -> Tensor:
    """Mask of the tokens that belong to content words of the question (the text after the last image), plus the last
    token.

    Words are found in the text and mapped to tokens by the tokenizer's offsets. Placeholder tokens that a processor
    repeats are matched by skipping them on both sides.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        Its offsets are used.
    text : str or sequence of str
        The prompts as given to the processor.
    input_ids : Tensor
        [B, S] as the processor made them, padded on either side.
    image_token_id : int, optional
        Placeholder id; left out: the tokenizer's ``image_token_id``.

    Returns
    -------
    Tensor
        [B, S] bool.

    Raises
    ------
    TypeError
        If the tokenizer has no offsets (a slow tokenizer).
    ValueError
        If texts and ids do not belong together.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"salient words need a fast tokenizer (with offsets), got {type(tokenizer).__name__}")
    texts = [text] if isinstance(text, str) else list(text)
    ids = input_ids if isinstance(input_ids, Tensor) else torch.as_tensor(input_ids, device="cpu")
    if len(texts) != len(ids):
        raise ValueError(f"{len(texts)} texts for {len(ids)} rows of input_ids")
    image = getattr(tokenizer, "image_token_id", None) if image_token_id is None else image_token_id
    mask = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
    for row, (prompt, tokens) in enumerate(zip(texts, ids.tolist(), strict=True)):
        mask[row, _salient_columns(tokenizer, prompt, tokens, image)] = True
    return mask.to(ids.device)


def _salient_columns(tokenizer: Any, prompt: str, tokens: list[int], image: int | None) -> list[int]:
    columns, offsets = columns_of(tokenizer, prompt, tokens, {image, tokenizer.pad_token_id})
    if not columns:
        return []
    placeholder = None if image is None else tokenizer.convert_ids_to_tokens(image)
    start = 0 if placeholder is None or placeholder not in prompt else prompt.rindex(placeholder) + len(placeholder)
    spans = [(start + a, start + b) for a, b in content_words(prompt[start:])]
    salient = [
        c for c, (first, end) in zip(columns, offsets, strict=True) if any(a < end and first < b for a, b in spans)
    ]
    return [*salient, columns[-1]]


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
    pieces = [p for p, token in enumerate(encoded["input_ids"]) if token not in skip]
    if [tokens[c] for c in columns] != [encoded["input_ids"][p] for p in pieces]:
        raise ValueError(
            "input_ids are not this text's tokens (truncated, or another processor's): its words cannot be found in "
            "them"
        )
    return columns, [tuple(encoded["offset_mapping"][p]) for p in pieces]


def content_words(question: str) -> list[tuple[int, int]]:
    """Character spans of the content words of a question.

    With spaCy and its small English model installed (extra ``salient``): nouns, names, pronouns, verbs, adjectives,
    adverbs and numbers that are not stop words. Otherwise a rule that knows no language: words of at least three
    letters, words with a digit, and words in scripts without short function words (any non-ASCII letter); template
    words ending in a colon never count. If no word remains, every word.
    """
    parse = _spacy()
    if parse is not None:
        spans = [
            (word.idx, word.idx + len(word))
            for word in parse(question)
            if word.pos_ in CONTENT_POS and not word.is_stop and word.is_alpha
        ]
        return spans or _words(question)
    words = _words(question)
    kept = [
        (a, b)
        for a, b in words
        if b - a >= SHORTEST_WORD or not question[a:b].isascii() or any(c.isdigit() for c in question[a:b])
    ]
    return kept or words


def _words(question: str) -> list[tuple[int, int]]:
    return [m.span() for m in re.finditer(r"[^\W_]+(?!\w*:)", question) if not question[m.end() : m.end() + 1] == ":"]


@lru_cache(maxsize=1)
def _spacy() -> Callable[[str], Any] | None:
    try:
        import spacy

        pipeline: Callable[[str], Any] = spacy.load(SPACY_MODEL)
        return pipeline
    except (ImportError, OSError):
        return None
