"""Words, tokens and prompts of the tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.questions import PLURALS
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
_PLAIN = (
    "what color shape is the object ? there a number word next to how many are "
    "left right of above below do and have same larger than yes no"
)
VOCABULARY = tuple(dict.fromkeys((*SPECIAL, *_PLAIN.split(), *SHAPES, *PLURALS, *COLOR_NAMES, *"0123456789", *WORDS)))
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
EMBEDDINGS = 112  # rows of the embedding table: the vocabulary, rounded up to a multiple of 16
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt(question: str) -> str:
    """The text that goes to the processor together with one image."""
    return f"USER: <image>\n{question} ASSISTANT:"


def build_tokenizer(vocabulary: dict[str, int] = TOKEN) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that lower-cases and splits punctuation off, so that typed questions work."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolour\b"), "color")]
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", TOKEN["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(vocabulary: dict[str, int] = TOKEN) -> LlavaProcessor:
    """Processor of the tiny model: 224 px, 256 visual tokens per image."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from duet_vlm.evaluation.tiny.scenes import IMAGE_SIZE, PATCH

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer=build_tokenizer(vocabulary),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
