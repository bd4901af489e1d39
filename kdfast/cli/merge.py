"""`kdfast merge RUN`: merge a run's adapter into its base, as a whole model that plain `from_pretrained` reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from kdfast.cli.errors import RunFailed, UserError
from kdfast.training.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merge_adapter
from kdfast.training.durable import atomic_io
from kdfast.training.loading import load_student


def merge(run: str, *, output: str | None, dtype: str | None) -> int:
    """Merge in fp32, write in the base's dtype or `dtype`, and return the exit code."""
    folder = Path(run).expanduser()
    final = folder / "merged" if output is None else Path(output).expanduser()
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{run!r} has no {ADAPTER_CONFIG} that names its base ({type(error).__name__}: {error}); expected the "
            "output_dir of a run with use_peft, or a checkpoint of it"
        ) from error
    if final.exists():
        raise UserError(f"--output: {str(final)!r} exists; name another folder, or move it away")
    transformers.utils.logging.disable_progress_bar()
    staged = atomic_io.staging(final)
    try:
        model = load_student(base or "")
        written = dtype or str(AutoConfig.from_pretrained(base).dtype or torch.float32).removeprefix("torch.")
        merged = merge_adapter(model, folder).to(getattr(torch, written))
        final.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.discard(staged)
        merged.save_pretrained(staged)
        kept = any(_save_tokenizer(source, staged) for source in (folder, base))
        atomic_io.publish(staged, final, replace=False)
    except (ValueError, ImportError, RuntimeError) as error:  # PEFT cannot merge some kinds
        raise UserError(f"{run!r}, on its base {base!r}: {error}") from error
    except OSError as error:
        raise RunFailed(f"the merged model cannot be written: {error}") from error
    finally:
        atomic_io.discard(staged)
    tokenizer = "with its tokenizer" if kept else "without a tokenizer: none lies beside the adapter or its base"
    print(f"{folder / ADAPTER_WEIGHTS} merged into {base}: {final}, in {written}, {tokenizer}")
    return 0


def _save_tokenizer(source: Path | str, target: Path) -> bool:
    if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):  # transformers would make an empty tokenizer
        return False
    try:
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(target)
    except (OSError, ValueError, KeyError):
        return False
    return True
