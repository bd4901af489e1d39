"""Prompts with completions, chats, or single texts, as rows of token ids and labels.

prompt, completion  {"prompt": "…", "completion": "…"}, or a list of messages each; the completion counts
messages            {"messages": [{"role": "user", "content": "…"}, …]}; every token counts, or the assistant's only
text                {"text": "…"}; every token counts

Ids and labels equal those of TRL's SFTTrainer: a plain completion or text ends with the end-of-text token, messages go
through the chat template, and a completion begins where its ids differ from those of the prompt alone. A row without
targets is skipped, counted and reported. teacher_prompts.py has the prompts that only a teacher reads.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import processors

from kdfast._version import __version__
from kdfast.inputs import did_you_mean
from kdfast.training.data.alignment import Aligner, OtherTokenizer, Span, leading
from kdfast.training.data.counts import NOTES, Counts
from kdfast.training.data.packing import pack
from kdfast.training.data.rows import PROMPTS, TEACHER_PROMPTS
from kdfast.training.data.teacher_prompts import TeacherPrompt, cut, positions
from kdfast.training.data.text import DataError, check_text_only, columns_of, load_blocks, map_rows
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.processes import print_once
from kdfast.training.hf import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS = re.compile(r"<[|｜][^\s|｜<>]{1,40}[|｜]>|<(?:start|end)_of_[a-z_]+>")  # special tokens by their look
PROBE = "kdfast-probe"


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    packing: bool | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    chat_template: str | None = None,
    teacher_prompt_template: str | None = None,
    text_column: str = "text",
    teacher_column: str | None = None,
    dataset_num_proc: int | None = None,
    prompts: str | None = None,
    teacher_tokenizer: OtherTokenizer | None = None,
    argument: str = "dataset",
) -> tuple[Any, Counts]:
    """Tokenize raw rows; return the rows that `KDTrainer` trains on, and what happened to the raw ones.

    Example:
        rows, counts = tokenize_dataset(dataset, tokenizer, max_length=512, assistant_only_loss=True)

    Args:
        dataset: a `datasets.Dataset`, or an `IterableDataset`, whose rows are counted as they come. Columns `messages`,
            `prompt` and `completion`, or `text`; `tools` and `chat_template_kwargs` go to the template. With a column
            `teacher_prompt` or `privileged_context`, the teacher reads its own prompt before the completion, or before
            the last message.
        tokenizer: of student and teacher.
        max_length: most tokens per row; None = no limit.
        truncation_mode: what a longer row keeps: "keep_start" or "keep_end".
        packing: True packs as many whole rows as fit into one of `max_length`, kept apart (`seq_lengths`); False leaves
            rows as they are. None: False, but text is joined by the end-of-text token and cut into blocks.
        completion_only_loss: set the prompt's labels to −100. None = if there is a completion.
        assistant_only_loss: set labels to −100 except where the assistant speaks; needs `{% generation %}` in the
            template.
        chat_template: a Jinja template, or a file with one; None = the tokenizer's.
        teacher_prompt_template: makes the teacher's prompt from {prompt} and other columns, named in braces; None =
            TRL's "{prompt}\\n\\n{privileged_context}", if there is that column.
        text_column: the column with the text.
        teacher_column: a column to keep, which names the one of several teachers that a row learns from.
        dataset_num_proc: number of processes.
        prompts: for rows whose completions will be generated. "beside" adds a column of the prompts' ids (for messages,
            up to the last answer), and `teacher_prompts` if the teacher has its own. "alone" does the same for rows
            that need no completions. Prompts longer than max_length are skipped.
        teacher_tokenizer: the teacher's, if it differs: what the assistant says in chats is aligned with the teacher's
            rendering through its own template. (`KDTrainer` aligns other rows, which needs only their ids.)
        argument: the data set's name in errors.

    Returns:
        Rows with input_ids and labels (not shifted), not padded, since `KDTrainer`'s collator pads. They also have
        seq_lengths if packed, teacher_input_ids and teacher_positions if the teacher has its own prompts, or another
        tokenizer for chats, and prompts if requested.

    Raises DataError, a ValueError: columns of no kind or of two, options that do not fit them, no row left to train on,
    or a template that is missing, rejects a row, has no marks or does not belong to the tokenizer.
    """
    columns = columns_of(dataset)
    alone = "prompt" in columns and not {"completion", "messages"} & {*columns}
    if prompts == "beside" and alone:
        raise DataError(
            f"{argument} has prompts without completions, and some of its batches are to be trained on as they are. "
            "Expected on_policy=1, seq_kd=True, or a column completion"
        )
    kind = "prompt" if prompts and alone else kind_of(argument, columns, text_column)
    if prompts and kind == "text":
        raise DataError(
            f"{argument} has text, and on_policy and seq_kd write completions to prompts. Expected columns prompt and "
            "completion, prompt alone, or messages: split each text where a completion is to begin, or set on_policy=0"
        )
    check_text_only(argument, dataset, columns)
    if completion_only_loss and kind != "completion":
        raise DataError(
            f"completion_only_loss=True, and {argument} has no columns prompt and completion. Leave it out; of "
            "messages assistant_only_loss trains on what the assistant says"
        )
    teacher_prompt = TeacherPrompt.of(argument, kind, columns, teacher_prompt_template)
    if teacher_tokenizer is not None and (packing or prompts or teacher_prompt is not None):
        what = "packing=True" if packing else "on_policy or seq_kd" if prompts else "a prompt of the teacher's own"
        raise DataError(f"{what} with a teacher that has another tokenizer, which is not supported. Leave one out")
    if packing and teacher_prompt is not None:
        raise DataError(
            f"packing=True, and the teacher reads prompts of its own in {argument}, whose rows are of another length "
            "than the student's. Leave packing out, or the teacher's prompts"
        )
    if teacher_column is not None and teacher_column not in columns:
        raise DataError(
            f"teacher_column={teacher_column!r}, and {argument} has no such column; its columns are "
            f"{', '.join(columns)}{did_you_mean(teacher_column, columns)}"
        )
    if teacher_column is not None and (packing or (kind == "text" and packing is None)):
        joined = "several rows in one" if packing else "text cut into blocks, where rows are joined"
        raise DataError(
            f"the column {teacher_column!r} of {argument} sends each row to a teacher, and packing={packing} makes "
            f"{joined}. Set packing=False, or teacher_weights in the column's place"
        )
    counts = Counts(argument=argument)
    if kind == "text" and packing is None:
        if assistant_only_loss:
            raise DataError(NOT_A_CHAT.format(argument=argument))
        blocks = load_blocks(argument, dataset, tokenizer, max_length, text_column, dataset_num_proc)
        counts = counts.of_blocks(blocks, max_length or 0)
        if counts.rows:
            print_once(counts.text())
        return blocks, counts
    if packing and max_length is None:
        raise DataError("packing=True and max_length=None; expected the number of tokens that rows are packed into")
    template = None if chat_template is None else read_template(chat_template)
    encoder = Encoder(
        argument, kind, tokenizer, text_column, max_length, truncation_mode, completion_only_loss is not False,
        assistant_only_loss, template, teacher_prompt, bool(prompts),
    )  # fmt: skip
    first = next(iter(dataset), None)
    encoder.check(first)
    if teacher_tokenizer is not None and encoder.has_chats(first):
        encoder.read_by(teacher_tokenizer, first)
    rows = map_rows(
        dataset, encoder, f"Tokenizing {argument}", dataset_num_proc,
        with_indices=True, remove_columns=[name for name in columns if name != teacher_column],
        features=_features(encoder.has_own, bool(prompts), dataset, teacher_column),
    )  # fmt: skip
    if not hasattr(rows, "__len__"):
        rows = rows.filter(counts.keep).remove_columns([*NOTES])
    else:
        counts.add(*(rows[note] for note in NOTES))
        kept = [i for i, reason in enumerate(rows["skipped"]) if not reason]
        if not kept:
            raise DataError(f"{counts}; nothing is left to train on")
        rows = (rows if len(kept) == len(rows) else rows.select(kept)).remove_columns([*NOTES])
        print_once(counts.text())
    return (pack(rows, max_length, argument, dataset_num_proc) if packing and max_length else rows), counts


def kind_of(argument: str, columns: Iterable[str], text_column: str = "text") -> str:
    """Return "messages", "completion" or "text" from the columns. Raise DataError if they mean none or two."""
    columns = list(columns)
    kinds = {"messages": ["messages"], "completion": ["prompt", "completion"], "text": [text_column]}
    found = [kind for kind, names in kinds.items() if set(names) <= set(columns)]
    if "text" in found and text_column != "text":  # requested by name
        return "text"
    if len(found) > 1:
        first, second = (" and ".join(kinds[kind]) for kind in found[:2])
        raise DataError(
            f"{argument} has columns of two kinds, {first}, and {second}; expected one. Remove those that are not to "
            f"be trained on: dataset.remove_columns({kinds[found[1]]})"
        )
    if not found:
        raise DataError(
            f"{argument} has no column {text_column!r}; its columns are {', '.join(columns)}. Expected messages, "
            f"prompt and completion, or text: set text_column{did_you_mean(text_column, columns)}"
        )
    return found[0]


def is_raw_text(dataset: Any) -> bool:
    """Return whether it is a data set of `datasets` without token ids, whose rows are tokenized or refused."""
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    return "input_ids" not in (next(iter(dataset), None) or columns_of(dataset))  # a transform may make them


NOT_A_CHAT = (
    "assistant_only_loss=True, and {argument} has plain text, in which nobody speaks. Leave it out, or give messages: "
    "lists of {{'role': …, 'content': …}}"
)


def read_template(given: str) -> str:
    """Return `given` if it is a Jinja template, or the template in the file `given`. Raise DataError otherwise."""
    if "{%" in given or "{{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"chat_template={given!r} is no Jinja template ({{% … %}}), and no file that can be read: "
            f"{first_line(error)}"
        ) from error


@dataclass
class Encoder:
    """A function from a row to ids, labels and notes; an object, so that `datasets` can cache by it."""

    argument: str
    kind: str
    tokenizer: PreTrainedTokenizerBase
    text_column: str
    max_length: int | None
    truncation_mode: str
    completion_only_loss: bool
    assistant_only_loss: bool
    chat_template: str | None
    teacher_prompt: TeacherPrompt | None = None
    prompts: bool = False
    reader: Encoder | None = None  # with which a teacher with another tokenizer reads a chat
    aligner: Aligner | None = None  # aligns rows with what it reads
    version: str = __version__
    roles: set[str] = field(default_factory=set)  # roles that the template is known to write

    def __post_init__(self) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self.assistant_only_loss and backend is not None:
            # GPT-2's and Llama-3's offsets leave out blanks, and transformers would not find marked text there
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    def check(self, row: dict[str, Any] | None) -> None:
        """Raise DataError if tokenizer, template and options do not work for rows like this first one."""
        if not self.has_chats(row):
            if self.assistant_only_loss:
                raise DataError(NOT_A_CHAT.format(argument=self.argument))
            if self.tokenizer.eos_token is None:
                raise DataError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} has no end-of-text token, which closes every "
                    "text and completion here. Set its eos_token and save it again"
                )
            return
        name = repr(self.tokenizer.name_or_path)
        try:
            template = self.tokenizer.get_chat_template(self.chat_template, (row or {}).get("tools"))
        except ValueError as error:
            raise DataError(
                f"{self.argument} has messages, and the tokenizer {name} has no chat template for them "
                f"({first_line(error)}). Set chat_template to a file or a Jinja template"
            ) from error
        if self.assistant_only_loss and not GENERATION.search(template):
            raise DataError(
                "assistant_only_loss=True, and the chat template has no {% generation %} … {% endgeneration %} around "
                "what the assistant says, so its tokens cannot be told from the others. Add the two marks to a copy of "
                "the template and give that as chat_template, or leave assistant_only_loss out"
            )
        vocabulary = self.tokenizer.get_vocab()
        if absent := sorted({mark for mark in MARKS.findall(template) if mark not in vocabulary}):
            what = f"{', '.join(absent)} of the chat template are no tokens of the tokenizer {name}"
            own = self.tokenizer.chat_template
            if self.chat_template is not None and not (isinstance(own, str) and {*absent} <= {*MARKS.findall(own)}):
                raise DataError(
                    f"{what}: the template belongs to another one. Take this tokenizer's own, or add them to it "
                    "(add_special_tokens) and rows for them to both models (resize_token_embeddings)"
                )
            print_once(f"{self.argument}: {what}, and are written as ordinary text")

    def has_chats(self, row: dict[str, Any] | None) -> bool:
        """Return whether rows like this one are messages."""
        return self.kind == "messages" or (
            self.kind == "completion" and isinstance((row or {}).get("completion"), list)
        )

    def read_by(self, other: OtherTokenizer, row: dict[str, Any] | None) -> None:
        """Set up a teacher with another tokenizer to read rows like this one through its own chat template."""
        tokenizer = other.teacher.tokenizer
        self.reader = replace(
            self, argument="teacher", tokenizer=tokenizer, chat_template=None, assistant_only_loss=False, roles=set()
        )
        self.reader.check(row)
        self.aligner = other.aligner()

    @property
    def has_own(self) -> bool:
        """Return whether the teacher reads other ids than the student."""
        return self.teacher_prompt is not None or self.reader is not None

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Return token ids, labels and notes. Raise DataError, naming the row, if it cannot be read."""
        where = f"{self.argument}, row {index}"
        encode = {
            "messages": self._messages, "completion": self._completion, "text": self._text, "prompt": self._only_prompt,
        }[self.kind]  # fmt: skip
        ids, counted, reason = encode(row, where)
        prompt: list[int] = []
        theirs: list[int] = []  # the teacher's ids
        found: list[int] = []  # index of its prediction, for each of the student's
        own_prompt: list[int] = []  # the teacher's own prompt
        if self.prompts and not reason:
            asked = self._asked(row)
            prompt = ids if self.kind == "prompt" else self._prompt(asked, row, where)
            if self.teacher_prompt is not None and prompt:
                own_prompt = self._prompt(self.teacher_prompt(asked, row, where), row, where)
            too_long = self.max_length is not None and max(len(prompt), len(own_prompt)) > self.max_length
            reason = "empty prompt" if not prompt else "prompt longer than max_length" if too_long else ""
            if self.kind == "prompt":
                theirs, found = own_prompt, [-1] * len(prompt)
        if self.teacher_prompt is not None and self.kind != "prompt" and not reason:
            theirs, found, reason = self._of_teacher(ids, row, where)
        if self.reader is not None and not reason:
            theirs, found = self._of_other_tokenizer(ids, row, where)
        kept = slice(None)
        if self.max_length is not None:
            kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        truncated = len(ids[kept]) < len(ids) or len(theirs[kept]) < len(theirs)
        found = cut(found[kept], range(len(theirs))[kept])
        if not reason and self.kind != "prompt" and not any(counted[kept][1:]):
            reason = "no target within max_length" if any(counted[1:]) else "no target"
        if not reason and self.kind != "prompt" and found and max(found) < 0:
            reason = "no completion within max_length of the teacher's row"
        ids, counted, theirs = ([], [], []) if reason else (ids[kept], counted[kept], theirs[kept])
        labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, counted, strict=True)]
        notes = {"skipped": reason, "truncated": truncated and not reason, "tokens": len(ids)}
        notes |= {"targets": sum(counted[1:]), "teacher_tokens": len(theirs)}
        own = {"teacher_input_ids": theirs, "teacher_positions": [] if reason else found}
        made = {"input_ids": ids, "labels": labels, **notes, **(own if self.has_own else {})}
        prompts = {PROMPTS: prompt, **({TEACHER_PROMPTS: own_prompt} if self.teacher_prompt is not None else {})}
        return made | ({name: [] if reason else one for name, one in prompts.items()} if self.prompts else {})

    def _asked(self, row: dict[str, Any]) -> Any:
        """Return the text or messages to complete: a prompt, or the messages before the last answer."""
        if self.kind != "messages":
            return row["prompt"]
        return row["messages"][: max(i for i, one in enumerate(row["messages"]) if one["role"] == "assistant")]

    def _prompt(self, asked: Any, row: dict[str, Any], where: str) -> list[int]:
        if isinstance(asked, str):
            ids = self._ids(asked)
            added = ids[-1:] == [self.tokenizer.eos_token_id] and not asked.endswith(str(self.tokenizer.eos_token))
            return ids[:-1] if added else ids  # a completion would come after the end of the text
        return self._chat(asked, row, where, add_generation_prompt=True)[0] if asked else []

    def _only_prompt(self, row: dict[str, Any], where: str) -> tuple[list[int], list[bool], str]:
        ids = self._prompt(row["prompt"], row, where) if row["prompt"] else []
        return ids, [False] * len(ids), ""

    def _text(self, row: dict[str, Any], where: str) -> tuple[list[int], list[bool], str]:
        text = row[self.text_column]
        if not text:
            return [], [], "empty text"
        if not isinstance(text, str):
            raise DataError(f"{where}: {self.text_column} is {type(text).__name__}; expected text")
        ids = self._ids(text, closed=True)
        return ids, [True] * len(ids), ""

    def _completion(self, row: dict[str, Any], where: str) -> tuple[list[int], list[bool], str]:
        prompt, completion = row["prompt"], row["completion"]
        if not completion:
            return [], [], "empty completion"
        if isinstance(prompt, list) and isinstance(completion, list):
            if reason := _lacks_answer(completion, where):
                return [], [], reason
            _lacks_answer(prompt, where)
        elif not (isinstance(prompt, str) and isinstance(completion, str)):
            kinds = " and ".join(type(one).__name__ for one in (prompt, completion))
            raise DataError(f"{where}: prompt and completion are {kinds}; expected both text, or both messages")
        ids, counted = self._joined(prompt, completion, row, where)
        if self.completion_only_loss:
            start = self._start(ids, prompt, row, where)
            counted = [counts and i >= start for i, counts in enumerate(counted)]
        return ids, counted, ""

    def _messages(self, row: dict[str, Any], where: str) -> tuple[list[int], list[bool], str]:
        messages = row["messages"] or []
        if reason := _lacks_answer(messages, where):
            return [], [], reason
        ids, counted = self._chat(messages, row, where)
        return ids, counted, ""

    def _of_teacher(self, ids: list[int], row: dict[str, Any], where: str) -> tuple[list[int], list[int], str]:
        """Return the teacher's ids, the index in them that predicts the token after each of `ids`, and any obstacle."""
        assert self.teacher_prompt is not None
        if self.kind == "completion":
            prompt, completion = row["prompt"], row["completion"]
        else:
            prompt, completion = row["messages"][:-1], row["messages"][-1:]
            if completion[0]["role"] != "assistant":
                return [], [], "no assistant turn at the end"
        own = self.teacher_prompt(prompt, row, where)
        if isinstance(own, list):
            _lacks_answer(own, where)
        theirs, _ = self._joined(own, completion, row, where)
        start, their_start = self._start(ids, prompt, row, where), self._start(theirs, own, row, where)
        if ids[start:] != theirs[their_start:]:
            return [], [], "the completion's tokens are others after the teacher's prompt"
        return theirs, positions(len(ids), start, their_start), ""

    def _of_other_tokenizer(self, ids: list[int], row: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
        """Return a chat's ids for a teacher with another tokenizer, and their alignment with `ids`."""
        assert self.reader is not None
        assert self.aligner is not None
        messages = row["messages"] if self.kind == "messages" else row["prompt"] + row["completion"]
        theirs, _ = self.reader._chat(messages, row, where)
        ours, other = self._written(messages, row), self.reader._written(messages, row)
        spans = []
        for i, message in enumerate(messages):
            content = message.get("content")
            if message["role"] != "assistant" or not isinstance(content, str) or not content.strip():
                continue
            changed = [*messages[:i], {**message, "content": PROBE}, *messages[i + 1 :]]
            text, places = content.strip(), []
            for side, whole in ((self, ours), (self.reader, other)):
                before = side._written(changed, row).partition(PROBE)[0]
                place = whole.find(text, len(before), len(before) + len(content)) if whole.startswith(before) else -1
                places.append(len(whole[:place].encode()) if place >= 0 else -1)
            if min(places) >= 0:  # the template leaves it out or changes it otherwise
                spans.append(Span(text.encode(), *places))
        aligned = self.aligner.chat(ids, ours, theirs, other, spans)
        return aligned.ids, aligned.positions

    def _written(self, messages: list[dict[str, Any]], row: dict[str, Any]) -> str:
        """Return messages as text through the chat template."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self._template_options(row)))

    def _joined(self, prompt: Any, completion: Any, row: dict[str, Any], where: str) -> tuple[list[int], list[bool]]:
        """Return the ids of a prompt with its completion, and which of them count, including the prompt's."""
        if not isinstance(prompt, str):
            return self._chat(prompt + completion, row, where)
        ids = self._ids(prompt + completion, closed=True)
        return ids, [True] * len(ids)

    def _start(self, ids: list[int], prompt: Any, row: dict[str, Any], where: str) -> int:
        """Return how many of `ids` belong to the prompt."""
        if isinstance(prompt, str):
            return leading(self._ids(prompt), ids)
        alone, _ = self._chat(prompt, row, where, add_generation_prompt=True)
        same = leading(alone, ids)
        if same < len(alone):  # a token across the border, or the opening of an answer?
            written, _ = self._chat(prompt, row, where)
            if same + 1 < leading(alone, written):
                raise DataError(
                    f"{where}: the chat template writes the prompt otherwise where a completion follows, so that "
                    f"{self.tokenizer.decode(alone[same:])!r} would be learned. Take another chat_template, or "
                    "messages in place of prompt and completion, with assistant_only_loss"
                )
        return same

    def _ids(self, text: str, *, closed: bool = False) -> list[int]:
        end = str(self.tokenizer.eos_token)
        return self.tokenizer(text + end if closed and not text.endswith(end) else text, verbose=False)["input_ids"]

    def _chat(
        self, messages: list[dict[str, Any]], row: dict[str, Any], where: str, *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of messages, and which of them count."""
        options = self._template_options(row)
        masked = self.assistant_only_loss and not add_generation_prompt
        try:
            for i, message in enumerate(messages):
                self._check_role(messages, i, where, **options) if message["role"] not in self.roles else None
            encoded: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=masked,
                add_generation_prompt=add_generation_prompt, **options,
            )  # fmt: skip
        except DataError:
            raise
        except Exception as error:  # of many classes: the template's own, and Jinja's
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"{where}: the chat template refuses its messages, of {roles}: {first_line(error)}. Mend the row, or "
                "filter such rows out"
            ) from error
        ids = encoded["input_ids"]
        return ids, [bool(one) for one in encoded["assistant_masks"]] if masked else [True] * len(ids)

    def _template_options(self, row: dict[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        return {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }

    def _check_role(self, messages: list[dict[str, Any]], i: int, where: str, **options: Any) -> None:
        """Raise DataError if the template writes nothing for a message; many skip unknown roles."""
        role = messages[i]["role"]
        if not isinstance(messages[i].get("content"), str) or messages[i].get("tool_calls"):  # parts, or a tool call
            return
        changed = [*messages[:i], {**messages[i], "content": PROBE}, *messages[i + 1 :]]
        if PROBE not in str(self.tokenizer.apply_chat_template(changed, tokenize=False, **options)):
            raise DataError(
                f"{where}: the chat template writes nothing of a message of the role {role!r}. Rename the role to one "
                "it knows, such as system, user or assistant, or remove such messages"
            )
        self.roles.add(role)


def _lacks_answer(messages: Any, where: str) -> str:
    """Return why messages lack an assistant's answer, or "". Raise DataError if they are not messages."""
    if not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
        raise DataError(f"{where}: expected messages, a list of {{'role': …, 'content': …}}")
    answers = [one for one in messages if one["role"] == "assistant"]
    if not answers:
        return "no assistant turn"
    said = (one.get(name) for one in answers for name in ("content", "tool_calls", "reasoning_content"))
    return "" if any(said) else "empty completion"


def _features(with_teacher: bool, with_prompts: bool, dataset: Any, kept: str | None) -> Any:
    from datasets import Features, List, Value

    ids, number = List(Value("int32")), Value("int64")
    names = ["input_ids", "labels", *(["teacher_input_ids", "teacher_positions"] if with_teacher else [])]
    names += [PROMPTS] * with_prompts + [TEACHER_PROMPTS] * (with_prompts and with_teacher)
    notes = {"skipped": Value("string"), "truncated": Value("bool")}
    others = {} if kept is None else {kept: (dataset.features or {}).get(kept, Value("string"))}
    return Features(dict.fromkeys(names, ids) | dict.fromkeys(NOTES, number) | notes | others)
