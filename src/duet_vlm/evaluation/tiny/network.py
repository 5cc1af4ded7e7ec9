"""The tiny LLaVA: stock Hugging Face classes, small numbers."""

from __future__ import annotations

from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from duet_vlm.evaluation.tiny.scenes import IMAGE_SIZE, PATCH
from duet_vlm.evaluation.tiny.text import EMBEDDINGS, TOKEN

WIDTH = 128
HEADS = 4
HEAD_SIZE = WIDTH // HEADS
VISUAL_TOKENS = (IMAGE_SIZE // PATCH) ** 2
TOWER_LAYERS = 6
DECODER_LAYERS = 12
FEATURE_LAYER = -2  # the LLM reads the output of the last but one tower layer, as in LLaVA


def tower_config(attention: str | None = None) -> CLIPVisionConfig:
    """CLIP tower: 6 layers, 224 px, patch 14, so 256 tokens and CLS. ``attention``: which implementation runs it."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
        attn_implementation=attention,
    )


def decoder_config(embeddings: int = EMBEDDINGS, layers: int = DECODER_LAYERS) -> LlamaConfig:
    """Llama decoder; ``embeddings`` rows in its table of tokens.

    Rope theta is 1e6: with heads of 32 and the usual 1e4 too few rotary pairs turn slowly enough to match content
    across 256 visual tokens.
    """
    return LlamaConfig(
        vocab_size=embeddings,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=TOKEN["<pad>"],
        bos_token_id=TOKEN["<s>"],
        eos_token_id=TOKEN["</s>"],
        tie_word_embeddings=True,
    )


def build_model(embeddings: int = EMBEDDINGS, layers: int = DECODER_LAYERS) -> LlavaForConditionalGeneration:
    """An untrained tiny model."""
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=decoder_config(embeddings, layers),
        image_token_id=TOKEN["<image>"],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN["<s>"],
        eos_token_id=TOKEN["</s>"],
        pad_token_id=TOKEN["<pad>"],
        max_new_tokens=4,
        do_sample=False,
    )
    return model
