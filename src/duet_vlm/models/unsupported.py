"""Model types that look supported and cannot be, with the reason."""

from __future__ import annotations

CROSS = "its decoder attends to images through cross attention, so no visual tokens of the prompt could be dropped"
SHARED = "later decoder layers reuse keys and values of earlier ones, so tokens cannot be dropped between them"
QUERIES = "a few learned queries already represent the image; there are no patch tokens to reduce"
DISCRETE = "images are discrete tokens of the vocabulary, with no vision features to rank or merge"

REASONS = {
    "mllama": CROSS,
    "idefics": CROSS,
    "gemma3n": SHARED,
    "gemma4": SHARED,
    "gemma4_unified": SHARED,
    "blip-2": QUERIES,
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "kosmos-2": QUERIES,
    "chameleon": DISCRETE,
    "emu3": DISCRETE,
    "janus": "its decoder also writes pictures, whose tokens must not be mistaken for those it reads",
    "florence2": "it is an encoder-decoder model: the text encoder reads picture and prompt at once, and the "
        "decoder's cache holds neither",
    "fuyu": "patches enter the decoder through one linear map, and there is no vision tower whose attention could "
        "rank them",
}


def refusal(name: str, model_type: str | None, known: list[str]) -> str:
    """The message for a model that has no adapter."""
    reason = f": {REASONS[model_type]}" if model_type in REASONS else ""
    return f"{name} (model_type={model_type!r}) is not supported{reason}. Supported: {', '.join(known)}."
