"""Checks that no file of a checkpoint runs code when it is read.

Weights are safetensors. The rest of Trainer's state (optimizer, scheduler, scaler, random states) are pickles, which
it reads with `weights_only=True`: tensors, numbers and containers, nothing that can be called. They are read here in
the same way before anything is loaded, without the tensors' data, so that an error names the file.

torch reads a sharded optimizer without that protection. So its .metadata may name only the few classes that it is made
of, and the pickles that it points to, beside tensors, are read here as the others are.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers.trainer_pt_utils import safe_globals  # allows NumPy's random state, as Trainer does

from kdfast.training.durable.errors import first_line

SUFFIXES = (".pt", ".pth", ".bin")
METADATA = ".metadata"  # of torch.distributed.checkpoint; if it is missing, a process reads its own __0.metadata
_METADATA_CLASSES = {
    ("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
_GLOBAL = re.compile(r"GLOBAL\s+([\w.]+)")


def find_refused(folder: Path) -> str | None:
    """Return the first pickle below `folder` that is not plain data, and what is wrong with it; or None."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            return f"{path.name} is a link to another folder, where nothing is looked at"
        try:
            if path.name.endswith(METADATA):
                _read_sharded(path)
            elif path.suffix in SUFFIXES:
                with safe_globals():
                    torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # of many classes: unpickling, the zip format, the file system
            return f"{path.name} {explain(error)}"
    return None


def _read_sharded(path: Path) -> None:
    with path.open("rb") as file:
        metadata: Metadata = _MetadataUnpickler(file).load()
    for item, place in metadata.storage_data.items():
        name, start, size = place.relative_path, place.offset, place.length
        if Path(name).name != str(name) or min(start, size) < 0 or getattr(place, "transform_descriptors", None):
            raise ValueError(
                f"{item.fqn} at {start} + {size} of {str(name)!r}, expected a plain part of a file beside it"
            )
        if isinstance(metadata.state_dict_metadata.get(item.fqn), TensorStorageMetadata):
            continue  # torch itself reads these with weights_only=True
        with (path.parent / name).open("rb") as file:
            file.seek(start)
            torch.load(io.BytesIO(file.read(size)), map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def explain(error: Exception) -> str:
    """Return the reason that `torch.load(weights_only=True)` gave, without its advice to turn that off."""
    if named := _GLOBAL.search(str(error)):
        return f"would run {named[1]} when read; expected tensors, numbers and containers alone"
    if isinstance(error, pickle.UnpicklingError):
        return "holds more than tensors, numbers and containers, and is not read"
    return f"cannot be read: {first_line(error)}"
