"""A configuration file, read: one mapping, or an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kdfast.cli.errors import UserError


class _Loader(yaml.SafeLoader):
    """Runs no code that a file names, and takes no aliases: they may hold themselves, or multiply to any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*) is not taken; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


def read_yaml(config: str) -> dict[str, Any]:
    """Return the mapping of a file; UserError, naming the file, for what is not `key: value` lines."""
    path = Path(config)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{config}: is no file" if path.exists() else f"{config}: no such file")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{config}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        why = "brackets within brackets, too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{config}: not valid YAML: {' '.join(why.split())}") from error
    if not isinstance(content, dict):
        what = "the file is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{config}: {what}; it must hold `key: value` lines")
    return content
