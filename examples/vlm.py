"""A vision-language student learns from a larger one: pictures and chats through the models' processor.

    pip install trl pillow
    python examples/vlm.py
    python examples/vlm.py --use TEACHER STUDENT

Rows have `images` and `messages`. TRL's collator applies the processor's chat template; `KDTrainer` takes its batches
as they are, and both models see the pictures. What counts is what the assistant says: with `assistant_only_loss`, and a
template with generation marks, the rest is masked. The places of a picture count for nothing in any case.

Without --use everything is made here: a processor, and two LLaVA models, of which the teacher first learns to say
which color a picture is, and where its dark corner lies. The student has a hundred and fifty steps for that. It ends
with the student's cross entropy on the held-out answers, in nats per token, and KL(teacher || student), before and
after.

For your own: TEACHER and STUDENT are vision-language models of one processor; TRL's collator wants a row to have a
list of PIL images, empty where there is none.
"""

import argparse
import random
import tempfile

import datasets
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from kdfast.training import KDConfig, KDTrainer

try:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
except ImportError:
    raise SystemExit("this example needs TRL: pip install trl") from None

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "yellow": (230, 220, 40)}
CORNERS = {"top left": (0, 0), "top right": (8, 0), "bottom left": (0, 8), "bottom right": (8, 8)}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' :' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image>' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + part['text'] + ' <end>' }}{% endgeneration %}{% else %}{{ ' ' + part['text'] }}"
    "{% endif %}{% endfor %}{{ ' ' }}{% endfor %}"
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=2, metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args(argv)
    set_seed(0)
    train, held_out = pictures(800), pictures(64)
    if args.use:
        teacher = AutoModelForImageTextToText.from_pretrained(args.use[0])
        student = AutoModelForImageTextToText.from_pretrained(args.use[1], dtype="float32")
        processor = AutoProcessor.from_pretrained(args.use[0])
    else:
        processor = make_processor(train)
        teacher, student = llava(processor, 64, 2), llava(processor, 32, 1)
        learn(teacher, None, processor, args, train)
    before, after = learn(student, teacher, processor, args, train, held_out)
    print(f"held-out cross entropy: {before['eval_ce']:.3f} before, {after['eval_ce']:.3f} after")
    kl = "eval_kl_teacher_student"
    print(f"KL(teacher || student): {before[kl]:.3f} before, {after[kl]:.3f} after")


def learn(student, teacher, processor, args, train, held_out=None):
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = KDTrainer(
            student,
            KDConfig(
                output_dir=nowhere,
                save_strategy="no",
                recipe="lm_only" if teacher is None else "teacher_head",
                max_steps=args.max_steps,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=args.max_steps // 20,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=16,
                logging_steps=max(1, args.max_steps // 5),
                precompute_teacher_log_probs=False,  # a cache has no pictures
                report_to="none",
            ),
            teacher=teacher,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processor,
            data_collator=DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True),
        )
        before = held_out and trainer.evaluate()
        trainer.train()
        return before, held_out and trainer.evaluate()


def pictures(count):
    """Chats about pictures of one color with a dark corner."""
    rows = []
    for _ in range(count):
        color, corner = random.choice([*COLORS]), random.choice([*CORNERS])
        image = Image.new("RGB", (16, 16), tuple(c + random.randint(-20, 20) for c in COLORS[color]))
        image.paste((10, 10, 10), (*CORNERS[corner], *(x + 8 for x in CORNERS[corner])))
        answer = f"It is {color} , and dark at the {corner}"
        chat = [{"role": "user", "content": "What is that ?"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [image], "messages": chat})
    return datasets.Dataset.from_list(rows)


def make_processor(rows):
    """A LLaVA processor with a word for each of the rows'."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word for row in rows for message in row["messages"] for word in message["content"].split()}
    special = ["<pad>", "<end>", "<unknown>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, "user", "assistant", ":", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    named = {"pad_token": "<pad>", "eos_token": "<end>", "extra_special_tokens": {"image_token": "<image>"}}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        PreTrainedTokenizerFast(tokenizer_object=backend, **named),
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava(processor, width, layers):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "initializer_range": width**-0.5}
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
        ),
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=width, **sizes),
        image_token_id=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


if __name__ == "__main__":
    main()
