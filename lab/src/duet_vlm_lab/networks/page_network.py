"""The model ``tiny-page``: a stock LLaVA-NeXT with the tower, the projector and the decoder of ``tiny-chain``, and one
word more."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from duet_vlm.evaluation.tiny.network import FEATURE_LAYER, VISUAL_TOKENS, decoder_config, tower_config
from duet_vlm.evaluation.tiny.scenes import IMAGE_SIZE, PATCH
from duet_vlm.evaluation.tiny.text import CHAT_TEMPLATE, TOKEN, build_tokenizer
from duet_vlm_lab.generators.page_scenes import ACROSS
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN, EMBEDDINGS, LAYERS
from duet_vlm_lab.tasks import chain

PAGE_SIDE = ACROSS * IMAGE_SIZE  # pixels
PAGE_TOKEN = {**CHAIN_TOKEN, "quarter": len(CHAIN_TOKEN)}
POSITIONS = 2048  # the packed page has 1,312 rows


def build_page_model(layers: int = LAYERS) -> LlavaNextForConditionalGeneration:
    """An untrained model; pages become an overview and four crops."""
    decoder = decoder_config(EMBEDDINGS, layers)
    decoder.max_position_embeddings = POSITIONS
    config = LlavaNextConfig(
        vision_config=tower_config(),
        text_config=decoder,
        image_token_index=TOKEN["<image>"],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_grid_pinpoints=[[PAGE_SIDE, PAGE_SIDE]],
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN["<s>"],
        eos_token_id=TOKEN["</s>"],
        pad_token_id=TOKEN["<pad>"],
        max_new_tokens=4,
        do_sample=False,
    )
    return model


@torch.no_grad()
def start_from_chain(layers: int = LAYERS) -> LlavaNextForConditionalGeneration:
    """The model with the weights of the shipped tiny-chain, its first ``layers`` of them; a newline starts as nothing."""
    model, (chains, _) = build_page_model(layers), chain.load()
    model.model.vision_tower.load_state_dict(chains.model.vision_tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(chains.model.multi_modal_projector.state_dict())
    kept = {
        n: w
        for n, w in chains.model.language_model.state_dict().items()
        if not n.startswith("layers.") or int(n.split(".")[1]) < layers
    }
    model.model.language_model.load_state_dict(kept)
    model.model.image_newline.zero_()
    return model


def build_page_processor() -> LlavaNextProcessor:
    """Reads pages of 448 x 448 pixels; other pictures are brought to that size, as LLaVA-NeXT does."""
    from transformers import LlavaNextImageProcessor

    side, tokenizer = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, build_tokenizer(PAGE_TOKEN)
    tokenizer.model_max_length = POSITIONS
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_grid_pinpoints=[[PAGE_SIDE] * 2]
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
