"""What stands in the configs of configs.py: right values and wrong ones."""

# ruff: noqa: E501  (tables)

from typing import Any

# keys whose values may start processes by the hundred, or fill a disk, as was asked for
TAME: dict[str, list[Any]] = {
    "dataloader_num_workers": [-1, "a", 0, 1], "max_steps": [0, 1, 2, -1, "a", 1.5], "num_train_epochs": [0, -1, "a", 0.01],
    "gradient_accumulation_steps": [0, -1, 2, "a"], "output_dir": ["a/b", "text.txt", "", "é\n", "x" * 300, "teacher", "a\0b", "."],
    "local_rank": [0, "a"], "logging_dir": ["logs"], "push_to_hub": [False, "a"], "calibration_tokens": [0, 1, 100, "a"],
    "torch_compile": [False, "a"], "log_on_each_node": [True], "dataloader_prefetch_factor": [0, 2, "a"],
    "deepspeed": ["none.json", "text.txt", {"a": 1}],
}  # fmt: skip
STRINGS = {  # keys → values that are of the right kind, and some that are not
    "recipe": ["auto", "svd", "lm_only", "teacher_head", "projector", "probe", "resolved", "compressed_head", "svd "],
    "optim": ["adamw_torch", "sgd", "adafactor", "lion_8bit", "galore_adamw"], "lr_scheduler_type": ["cosine", "polynomial", "x"],
    "eval_strategy": ["steps", "epoch", "no", "yes"], "save_strategy": ["epoch", "no", "best", "x"], "dtype": ["float16", "bfloat16", "int8", "x"],
    "teacher_dtype": ["auto", "float64", "int8", "load"], "report_to": ["none", "all", "wandb", "tensorboard"], "fsdp": ["full_shard", "true", "x"],
    "max_length": [2, 3, 63, 64, 65, 10**9, 2**63], "per_device_train_batch_size": [0, -1, 1, 10**6], "valid_vocab": [1, 256, 257, 258, 10**9],
    "compressed_rank": [1, 16, 32, 33, 10**9], "temperature": [1e-30, 1e30, 0.1, 0], "learning_rate": [0, 1e30, -1, "1e-3"],
    "eval_fraction": [1e-9, 0.999, 1], "warmup_steps": [0.5, 10**9, -1], "seed": [-1, 2**32, 2**64], "hidden_weight": [0.1, 1e30],
    "load_best_model_at_end": [True], "metric_for_best_model": ["ce", "x"], "gradient_checkpointing": [True], "bf16": [True], "fp16": [True],
    "temperature_steps": [[3, 2], [], [0], "3 2", 3], "non_finite": ["skip", "stop", "x"], "health_thresholds": [{"kl": 1}, {"x": 1}, "{", {"kl": "a"}],
    "text_column": ["text", "", "x"], "engine": ["torch", "reference", "triton_chunked", "x"], "divergence": ["jsd", "reverse_kl", "x"],
    "resume_from_checkpoint": [True, False, "gone", "teacher"], "save_total_limit": [0, 1, -1], "save_steps": [0, 0.5, 10**9], "logging_steps": [0, 0.1],
    "train_file": ["text.txt", "*.txt", "teacher", ".", "/dev/null", "/dev/zero", "~", "gone", "", "data", "data/*", "text.txt\0", "x" * 300, "[", "**"],
}  # fmt: skip
WORDS = [
    "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!python/object/new:os.system [touch pwned]",
    "&a [*a]", "{a: &b [1, 1], c: &d [*b, *b], e: *d}", "&a {b: *a}", "*undefined", "!!binary aGVsbG8=", "!!set {a, b}", "2001-01-01", "0x1F", "0o17", "1_000", ".inf", ".nan",
    "!!float x", "!unknown x", "|\n  many\n  lines", ">-\n  folded", "{" * 500, "[" * 2000, "'", '"', "@x", "`x", "%x", "\t", "? x", "- a",
    "<<: *x", "!!timestamp 2001-99-99", "!!int 1:60", "!!null x", "~", "yes", "!!omap [a: 1]", "2001-13-45", "[1, 2", "{a: 1",
]  # fmt: skip
DATA = {
    "rows.json": [b'[{"text": "a"}]', b'{"text": "a b c"}\n' * 50, b'{"text": 1}\n' * 50, b'{"text": null}\n', b'{"text": ["a"]}\n', b"{", b"[]", b"null",
                  b'{"text": "a"}\n{"text": 1}\n', b'{"text": "\\ud800"}\n' * 50, b'{"body": "a"}\n' * 50, b'{"text": {"a": 1}}\n' * 3],
    "rows.jsonl": [b'{"text": "abc def"}\n' * 200, b'{"text": "a"}\n{"other": 1}\n', b"\xff\xfe", b"{}\n" * 5, b'{"text": "a"' * 3],
    "rows.csv": [b"text\n" + b"a b c\n" * 100, b"", b"text", b"text,text\na,b\n" * 9, b'text\n"a\n', b"a;b\n1;2\n", b"\0", b"text\n\xff\xfe\n" * 9, b"text\n1\n2\n"],
    "rows.parquet": [b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b"", b"text"],
    "words.txt": [b"", b" ", b"\0" * 5000, bytes(range(256)) * 20, b"\xff" * 3000, b"x" * 300000, b"\n" * 5000, "\u202e😀".encode() * 500, b"a"],
    "words.py": [b"print()\n" * 300],
}  # fmt: skip
OVERRIDES = [
    "--", "-", "--x", "--x=1", "--recipe", "--recipe=", "=", "--=x", "", "é", "--help=1", "-h=", "--max_steps", "a\0b", "--max-steps", "--Recipe", "x=1",
    "--config", "@file", "--fsdp_config", "--learning_rate=", "--temperature_steps",
]  # fmt: skip
