"""Results on disk: one JSON a benchmark and kind of device, complete whenever it is there.

    {"entries": {name: {"machine": …, …}}}

An entry is replaced when it is measured again, so each says where and when it was. KDFAST_BENCH_OUT: another folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import measure
from workloads import DEVICE, QUICK

FOLDER = Path(os.environ.get("KDFAST_BENCH_OUT") or measure.ROOT / ("build/bench-quick" if QUICK else "bench/results"))


def path(benchmark: str, device: str = DEVICE, folder: Path = FOLDER) -> Path:
    return folder / f"{benchmark}-{device}.json"


def read(benchmark: str, device: str = DEVICE, folder: Path = FOLDER) -> dict[str, Any]:
    """Entries by name; none where nothing has been measured."""
    file = path(benchmark, device, folder)
    return json.loads(file.read_text())["entries"] if file.exists() else {}


def add(benchmark: str, name: str, entry: dict[str, Any]) -> None:
    """Write one entry among the others."""
    entries = read(benchmark) | {name: {"machine": measure.machine(), **entry}}
    write(path(benchmark), json.dumps({"entries": entries}, indent=1, ensure_ascii=False) + "\n")


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)
