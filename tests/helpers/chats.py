"""Rows of every kind that people train on, a tokenizer for them, and chat templates."""

from byte_tokenizer import make_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

# ChatML, with marks around what the assistant says
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
VOCAB = 259  # 256 bytes, <end>, and the two marks

QUESTIONS = [("2+2?", "4"), ("Name a color.", "red, or blue"), ("Hi", "Hello! How are you?"), ("a b c", "d")]


def chat_tokenizer(template=CHATML):
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# by name: rows, options of tokenize_dataset, the text of each row, and the parts of it that are learned
KINDS = {
    "text": (
        [{"text": f"{q} {a}"} for q, a in QUESTIONS],
        {"packing": False},
        [f"{q} {a}<end>" for q, a in QUESTIONS],
        [[f"{q} {a}<end>"] for q, a in QUESTIONS],
    ),
    "completion": (
        [{"prompt": f"{q} ", "completion": a} for q, a in QUESTIONS],
        {},
        [f"{q} {a}<end>" for q, a in QUESTIONS],
        [[f"{a}<end>"] for q, a in QUESTIONS],
    ),
    "completion, all of it": (
        [{"prompt": f"{q} ", "completion": a} for q, a in QUESTIONS],
        {"completion_only_loss": False},
        [f"{q} {a}<end>" for q, a in QUESTIONS],
        [[f"{q} {a}<end>"] for q, a in QUESTIONS],
    ),
    "chat completion": (
        [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in QUESTIONS],
        {},
        [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in QUESTIONS],
        [[f"{a}<|im_end|>\n"] for q, a in QUESTIONS],
    ),
    "messages": (
        [{"messages": [user(q), assistant(a)]} for q, a in QUESTIONS],
        {},
        [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in QUESTIONS],
        [[f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"] for q, a in QUESTIONS],
    ),
    "messages, the assistant's": (
        [{"messages": [user(q), assistant(a), user("and?"), assistant(q)]} for q, a in QUESTIONS],
        {"assistant_only_loss": True},
        [
            f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
            f"<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n{q}<|im_end|>\n"
            for q, a in QUESTIONS
        ],
        [[f"{a}<|im_end|>", f"{q}<|im_end|>"] for q, a in QUESTIONS],
    ),
}


def raw(kind):
    return Dataset.from_list(KINDS[kind][0])


def write_chat_example(folder):
    """Write what examples/lora_chat.py makes, in less than a second: a student, a teacher and chats.jsonl."""
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    for name, width in (("student", 16), ("teacher", 32)):
        config = LlamaConfig(vocab_size=VOCAB, hidden_size=width, bos_token_id=256, eos_token_id=256, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
    raw("messages, the assistant's").to_json(f"{folder}/chats.jsonl")
