"""A configuration file, read: one mapping, or an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kdfast.cli.errors import UserError

LARGEST = 100_000  # values in a file


def read_yaml(config: str) -> dict[str, Any]:
    """Return the mapping; UserError, naming the file, for what is not `key: value` lines. Runs no code it may name."""
    path = Path(config)
    try:
        if not path.is_file():
            raise UserError(f"{config}: is no file" if path.exists() else f"{config}: no such file")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{config}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{config}: not a text file ({error})") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none
        raise UserError(f"{config}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{config}: not valid YAML: brackets within brackets, too deep") from error
    if content is None:
        raise UserError(f"{config}: the file is empty; it must hold `key: value` lines")
    if not isinstance(content, dict):
        raise UserError(f"{config}: holds a {type(content).__name__}; it must hold `key: value` lines")
    _check_size(config, content)
    return content


def _check_size(config: str, content: Any) -> None:
    """Refuse what holds itself, or holds a few things so often that it is huge when it is written out."""
    sizes: dict[int, int] = {}  # of a list or mapping, by its id; 0 while it is being looked at

    def size(value: Any) -> int:
        if not isinstance(value, list | dict):
            return 1
        if sizes.get(id(value)) == 0:
            raise UserError(f"{config}: a value holds itself (an anchor, &, and its alias, *)")
        if id(value) not in sizes:
            sizes[id(value)] = 0
            inner = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, inner))
        return sizes[id(value)]

    if (found := size(content)) > LARGEST:
        raise UserError(
            f"{config}: holds {found:,} values with its aliases (*) written out; expected {LARGEST:,} at most"
        )
