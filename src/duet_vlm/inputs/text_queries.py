"""Query positions: the text tokens that rank the visual tokens (all, the last one, or the salient words of the
question)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.ragged import after_last_true, last_true

CONTENT_POS = {"NOUN", "PROPN", "PRON", "VERB", "ADJ", "ADV", "NUM"}
SPACY_MODEL = "en_core_web_sm"
SHORTEST_WORD = 3
CONTEXT = 8  # tokens before one that are decoded with it: a character has at most four bytes, so four tokens


def query_rows(
    kind: str,
    visual: Tensor,
    valid: Tensor,
    labels: Tensor | None = None,
    salient: Callable[[Tensor], Tensor] | None = None,
    turns: str = "first",
) -> Tensor:
    """Query positions of a batch of prompts; a prompt without any gets none here and falls back to the last visual
    token.

    Parameters
    ----------
    kind : str
        "all" (every position after the last visual token), "last" (the last position before the answer), "salient", or
        "raters", which are chosen later among all.
    visual, valid : Tensor
        [B, S] bool.
    labels : Tensor, optional
        [B, S]; with labels only unsupervised positions (-100) are queries: those before the first answer, or of all
        ``turns``.
    salient : callable, optional
        Needed for "salient": given the candidates [B, S], returns those that belong to salient words (:func:`salient_words`).

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
        assert salient is not None  # checked where a method is attached
        return after & salient(after)
    return after


def salient_words(tokenizer: Any, input_ids: Tensor, candidates: Tensor) -> Tensor:
    """Those of the ``candidates`` that belong to content words of their text, and the last candidate of each prompt.

    Copies the ids to the host. Special tokens are no words.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's.
    input_ids : Tensor
        [B, S].
    candidates : Tensor
        [B, S] bool.

    Returns
    -------
    Tensor
        [B, S] bool, on the device of ``candidates``.
    """
    mask = torch.zeros(candidates.shape, dtype=torch.bool, device="cpu")
    for row, (ids, chosen) in enumerate(zip(input_ids.cpu(), candidates.cpu(), strict=True)):
        columns = chosen.nonzero()[:, 0].tolist()
        if columns:
            text, spans = token_spans(tokenizer, ids[chosen].tolist())
            words = content_words(text)
            salient = [any(a < end and begin < b for a, b in words) for begin, end in spans]
            mask[row, columns] = torch.tensor([*salient[:-1], True], device="cpu")
    return mask.to(candidates.device)


def token_spans(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and the characters (begin, end) that each token adds to it; none for a special token.

    A token's characters follow from decoding it behind the tokens before it, as decoders join words and bytes.
    """

    def length(first: int, last: int) -> int:
        return len(tokenizer.decode(ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    spans, end = [], 0
    for number in range(len(ids)):
        first = max(0, number - CONTEXT)
        begin, end = end, end + length(first, number + 1) - length(first, number)
        spans.append((begin, end))
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), spans


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
    return [match.span() for match in re.finditer(r"[^\W_]+(?!\w*\s*:)", question)]


@lru_cache(maxsize=1)
def _spacy() -> Callable[[str], Any] | None:
    try:
        import spacy

        pipeline: Callable[[str], Any] = spacy.load(SPACY_MODEL)
        return pipeline
    except (ImportError, OSError):
        return None
