"""Small real tokenizers of unlike kinds, trained on unlike texts: byte-level BPE, and as sentencepiece has them."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENGLISH = [
    "The quick brown fox jumps over the lazy dog, 12345 times in 1984.\r\nIt said: the end of the story\t(the end).",
    "In the beginning the words were few, and the readers of the words were fewer still; 2024 was the year of words.",
] * 8
CODE = [
    "def words(text):\n    for word in text.split():\n        yield word.strip()\n\n\nreturn [words(x) for x in a(10)]",
    "class Reader(object):\n    def __init__(self, path):\n        self.path = path\n        self.words = 0\n",
] * 8
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(size=400, texts=ENGLISH, normalizer=None, add_prefix_space=False, start=False):
    """Byte-level BPE with <end>; `start`: puts <start> before a text."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    special = ["<end>", "<start>"][: 1 + start]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if start:
        pair = [("<start>", backend.token_to_id("<start>"))]
        backend.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=pair)
    given = {"bos_token": "<start>"} if start else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **given)


def sentencepiece(size=500, texts=CODE, kind="BPE", legacy=True, start=True, prefix=True, normalizer=None):
    """BPE or Unigram with ▁ and byte fallback; </s>, and <s> before a text. legacy: ▁ by a normalizer, as Llama-2's."""
    backend = Tokenizer(models.BPE(fuse_unk=True) if kind == "BPE" else models.Unigram())
    added = [normalizer] if normalizer else []
    if legacy:
        backend.normalizer = normalizers.Sequence(
            added + [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        )
    else:
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    special = ["<unk>", "<s>", "</s>"]
    if kind == "BPE":
        trainer = trainers.BpeTrainer(vocab_size=size - 256, special_tokens=special, show_progress=False)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=size - 256, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    backend.train_from_iterator([piece for text in texts for piece in text.splitlines()], trainer)
    described = json.loads(backend.to_str())
    model = described["model"]
    model |= {"byte_fallback": True}
    if kind == "BPE":  # bytes behind the special tokens, as sentencepiece puts them
        words = [*special, *BYTES, *(word for word in model["vocab"] if word not in special)]
        model |= {"vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>", "fuse_unk": True}
    else:
        model["vocab"] = [*model["vocab"][:3], *([byte, -20.0] for byte in BYTES), *model["vocab"][3:]]
        model["unk_id"] = 0
    backend = Tokenizer.from_str(json.dumps(described))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if start:
        pair = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=pair)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **({"bos_token": "<s>"} if start else {})
    )
