"""A teacher's own prompts, read before the same completion, and the positions of its predictions.

    teacher_prompt        a column with text or messages, like the prompt, read in its place
    privileged_context    TRL's column, which `teacher_prompt_template` puts into the prompt; in a chat, into its last
                          user message

If a row's column is empty, the teacher reads the student's prompt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from string import Formatter
from typing import Any

from kdfast.training.data.text import DataError

TEMPLATE = "{prompt}\n\n{privileged_context}"  # TRL's default


@dataclass
class TeacherPrompt:
    """A function from a row to the teacher's prompt; `fields` are the template's columns, None without a template."""

    template: str | None
    fields: Collection[str] = ()

    @classmethod
    def of(cls, argument: str, kind: str, columns: Collection[str], template: str | None) -> TeacherPrompt | None:
        """Return the `TeacherPrompt` for these columns and template; None if neither asks for one.

        Raises DataError for two at once, for plain text, which has no prompt, and for a template that does not fit.
        """
        asked = [name for name in ("teacher_prompt", "privileged_context") if name in columns]
        asked += ["teacher_prompt_template"] * (template is not None)
        if not asked:
            return None
        if kind == "text":
            raise DataError(f"{argument} has text, and {asked[0]} is of rows with a prompt and completion, or messages")
        if asked[0] == "teacher_prompt":
            if len(asked) > 1:
                raise DataError(
                    f"{argument}: {' and '.join(asked)} are given; expected teacher_prompt alone, or "
                    "privileged_context with a teacher_prompt_template"
                )
            return cls(None)
        template = TEMPLATE if template is None else template
        try:
            fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise DataError(f"teacher_prompt_template={template!r}: {error}; braces of its own are doubled") from error
        if unknown := sorted(fields - {"prompt", *columns}):
            raise DataError(
                f"teacher_prompt_template={template!r} names {unknown[0]!r}, and {argument} has no such column; its "
                f"columns are {', '.join(columns)}. Expected some of them in braces, and {{prompt}}"
            )
        return cls(template, fields)

    def __call__(self, prompt: Any, row: dict[str, Any], where: str) -> Any:
        """Return what the teacher reads instead of `prompt`, as text or messages like that."""
        if self.template is None:
            own = row["teacher_prompt"] or prompt
            if type(own) is not type(prompt):
                kinds = " and ".join(type(one).__name__ for one in (own, prompt))
                raise DataError(f"{where}: teacher_prompt and prompt are {kinds}; expected both text, or both messages")
            return own
        last = None
        if isinstance(prompt, list):
            last = next((i for i, message in reversed([*enumerate(prompt)]) if message["role"] == "user"), None)
            if last is None:
                raise DataError(f"{where}: no user message, into which teacher_prompt_template would be written")
        values = {name: _text_of(row[name]) for name in self.fields if name != "prompt"}
        if any(value in (None, "") for value in values.values()):
            return prompt
        values["prompt"] = prompt if last is None else _text_of(prompt[last]["content"])
        text = self.template.format(**values)
        return text if last is None else [*prompt[:last], {**prompt[last], "content": text}, *prompt[last + 1 :]]


def _text_of(value: Any) -> Any:
    """Return the text of messages or of a message's parts; anything else as it is."""
    if not isinstance(value, list):
        return value
    parts = (one.get("content") or one.get("text") if isinstance(one, dict) else one for one in value)
    return "\n".join(str(_text_of(part)) for part in parts if part)


def positions(length: int, start: int, teacher_start: int) -> list[int]:
    """Return, for each of a row's `length` tokens, the teacher's position that predicts the token after it; −1: none.

    start, teacher_start: number of tokens before the completion, in the row and in the teacher's.
    """
    return [i + teacher_start - start if start <= i + 1 < length else -1 for i in range(length)]


def cut(found: list[int], teacher: range) -> list[int]:
    """Return the positions after cutting a teacher's row to the tokens in `teacher`."""
    return [i - teacher.start if i in teacher else -1 for i in found]
