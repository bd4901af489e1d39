"""Real processors of vision-language models, for images of 8 × 8 or 16 × 16, over a tokenizer of bytes."""

from byte_tokenizer import make_tokenizer
from tiny_models import tiny_vision
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)

# family → what its template puts in an image's place, and its tokenizer's names for special tokens
SPECIAL = {
    "llava": ("<image>", {"image_token": "<image>"}),
    "gemma3": ("<boi>", {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}),
    "qwen2_5_vl": (
        "<|vision_start|><|image_pad|><|vision_end|>",
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    ),
}
TEMPLATE = (
    "{%% for m in messages %%}{{ m['role'] + ': ' }}{%% for part in m['content'] %%}{%% if part['type'] == 'image' %%}"
    "%s{%% elif m['role'] == 'assistant' %%}{%% generation %%}{{ part['text'] }}{%% endgeneration %%}"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{{ '\n' }}{%% endfor %%}"
)


class ImagesAlone(Qwen2_5_VLProcessor):
    """Without a video processor, which wants torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def tiny_processor(family):
    """A processor of that family; its tokenizer has ids to 256 for bytes, and then the special ones."""
    place, named = SPECIAL[family]
    markers = ["<|vision_start|>", "<|vision_end|>"] if family == "qwen2_5_vl" else []
    backend = make_tokenizer(["<pad>", *named.values(), *markers])._tokenizer
    backend.add_special_tokens(["<pad>", *named.values(), *markers])
    special = {"eos_token": "<end>", "pad_token": "<pad>", "extra_special_tokens": named}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    template = TEMPLATE % place
    size = {"height": 8, "width": 8}
    if family == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
        settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(images, tokenizer, chat_template=template, **settings)
    if family == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessor(size=size), tokenizer, chat_template=template, image_seq_length=4)
    pixels = {"shortest_edge": 256, "longest_edge": 256}  # of the picture: 16 × 16, four places for it
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=pixels)
    return ImagesAlone(images, tokenizer, chat_template=template)


def vision_model_for(family, processor, seed=0, **more):
    """A random model of that family that reads what the processor makes."""
    find = processor.tokenizer.convert_tokens_to_ids
    ids = {"image_token_id": find(processor.tokenizer.image_token)}
    if family == "gemma3":
        ids |= {"boi_token_index": find("<boi>"), "eoi_token_index": find("<eoi>")}
    if family == "qwen2_5_vl":
        ids["video_token_id"] = find("<|video_pad|>")
        ids |= {f"vision_{end}_token_id": find(f"<|vision_{end}|>") for end in ("start", "end")}
    return tiny_vision(family, seed, V=len(processor.tokenizer), **ids, **more)
