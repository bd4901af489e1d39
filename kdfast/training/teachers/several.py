"""Several teachers: their names and weights, which of them a row learns from, and the sum of what they teach."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.loss import KDMetrics
from kdfast.training.adapters import unwrap
from kdfast.training.data.columns import names_of
from kdfast.training.data.rows import PACKED
from kdfast.training.data.tokenizers import find_valid_vocab
from kdfast.training.durable.processes import say_once
from kdfast.training.hf import head_shape
from kdfast.training.recipes import CACHED, Choice, Recipe, choose_recipe
from kdfast.training.teachers.entries import CachedEntries, CachedStates, KeptTeacher
from kdfast.training.teachers.fidelity import Fidelity
from kdfast.training.teachers.side import Learned, StudentBatch, TeacherSide

COLUMN = "teacher_id"  # TRL's: which teacher a row learns from


def name_teachers(given: Any) -> dict[str, Any]:
    """Return teachers by name, of one, of a list, or of a mapping from names to teachers ("self" too); none of None.

    A name is the last part of the folder or hub name that a teacher was loaded from, or of its cache's, with its number
    behind it where several have that name; "teacher_0" and so on where it has none.

    Raises ValueError for an empty list, a model that is there twice, or a name that could be no part of a key in logs.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        several = list(given) if isinstance(given, list | tuple) else [given]
        paths = (getattr(getattr(one, "config", one), "_name_or_path", getattr(one, "folder", "")) for one in several)
        short = [Path(one if isinstance(one, str) else path).name for one, path in zip(several, paths, strict=True)]
        times = Counter(short)
        names = [f"{name or 'teacher'}_{i}" if not name or times[name] > 1 else name for i, name in enumerate(short)]
        given = dict(zip(names, several, strict=True))
    teachers = {name: unwrap(one, "teacher") for name, one in given.items()}
    if not teachers:
        raise ValueError("teacher is empty; expected a model, a list of some, or None")
    for name in teachers:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"teacher: {name!r} is no name for one; expected text without '/', as in 'math'")
    seen: dict[int, str] = {}
    for name, one in teachers.items():
        if (first := seen.setdefault(id(one), name)) != name:
            raise ValueError(
                f"teacher: {name!r} and {first!r} are the same model; expected each once, with teacher_weights"
            )
    return teachers


@contextmanager
def naming(name: str, teachers: Mapping[str, Any]) -> Iterator[None]:
    """Put a teacher's name in front of what is wrong with it, where there are several."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if len(teachers) < 2:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"teacher {name!r}: {error}") from error


def read_weights(given: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """Return a weight for each teacher; equal ones that sum to 1 where none are given. ValueError for wrong ones."""
    if given is None:
        return [1 / max(len(names), 1)] * max(len(names), 1)
    weights = list(given)
    fine = all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights) and any(weights)
    if not fine or len(weights) != len(names):
        raise ValueError(
            f"teacher_weights={weights}; expected a number ≥ 0, not all of them 0, for each of {len(names)} teachers"
            + f" ({', '.join(names)})" * bool(names)
        )
    return weights


def find_valid_vocab_of_all(
    student: Any, teachers: Mapping[str, Any], processor: Any, valid_vocab: int | None
) -> int | None:
    """Return what `find_valid_vocab` does, of all teachers that run; they share the text's tokenizer."""
    found, teachers = [], running(teachers)
    for name, teacher in teachers.items():
        with naming(name, teachers):
            found.append(find_valid_vocab(student, teacher, processor, valid_vocab))
    if not teachers:
        found = [find_valid_vocab(student, None, processor, valid_vocab)]
    return next((ids for ids in found if ids is not None), None)


def choose_recipe_of_all(
    student: PreTrainedModel,
    teachers: Mapping[str, Any],
    valid_vocab: int | None,
    vocab: str,
    shared_strings: float | None = None,
) -> Choice:
    """Return `choose_recipe`'s choice for the first teacher that runs, with which the others have to get along."""
    if teachers and not running(teachers):
        return Choice(CACHED, "the teachers are caches")
    teachers = running(teachers)
    if not teachers:
        return choose_recipe(student, None, valid_vocab, vocab)
    choices = []
    for name, teacher in teachers.items():
        with naming(name, teachers):
            choices.append(choose_recipe(student, teacher, valid_vocab, vocab, shared_strings))
    if len(teachers) == 1:
        return choices[0]
    first, *others = teachers
    why = f"{choices[0].why} (the first teacher is {first!r}; {', '.join(map(repr, others))} only teach)"
    return choices[0]._replace(why=why)


def running(teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teachers that are no caches."""
    return {name: one for name, one in teachers.items() if not isinstance(one, KeptTeacher)}


def check_recipe(recipe: Recipe, teachers: Mapping[str, Any]) -> None:
    """Raise ValueError for what one teacher alone can do, or none that is a cache."""
    wrong, live = None, running(teachers)
    if len(teachers) == 1 and not live:
        raise ValueError(
            "teacher is a cache, alone; expected its rows, TeacherCache(folder).dataset(…), as the data set and no "
            "teacher (teacher_cache in a configuration), or another teacher beside it"
        )
    if recipe.hidden_weight:
        wrong = f"hidden_weight={recipe.hidden_weight:g}, which draws the student's layers to one teacher's"
    elif recipe.solves_projector:
        wrong = f"recipe {recipe.name!r}, which solves a projector for one teacher; expected drawn ones, 'projector'"
    elif recipe.teacher == "cached" and live:
        wrong = (
            f"recipe {recipe.name!r}, of which {next(iter(live))!r} is no cache; expected a recipe for that one, such "
            "as 'teacher_head'. Those that are caches are learned from by their entries all the same"
        )
    elif recipe.teacher not in ("none", "cached") and not live:
        wrong = f"recipe {recipe.name!r}, which runs one, and they are all caches; expected 'cached'"
    if wrong is not None and len(teachers) > 1:
        raise ValueError(f"{len(teachers)} teachers ({', '.join(teachers)}) and {wrong}")


def teacher_number(value: Any, names: Sequence[str], column: str = COLUMN) -> int:
    """Return which of the teachers a row's `value` means, by name or number. ValueError where it means none."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    value = int(value) if isinstance(value, str) and value.isdecimal() else value  # of a file without types
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    raise ValueError(
        f"{column}={value!r} names no teacher; expected {', '.join(map(repr, names))}, or a number from 0 to "
        f"{len(names) - 1}"
    )


def column_of(given: str | None, weights: Any, n_teachers: int, columns: Iterable[str]) -> str | None:
    """Return the column that says which teacher a row learns from: as `given`, else COLUMN where it is among `columns`.

    None: every row learns from all teachers, of which there may be one. ValueError for a column and weights.
    """
    if given is not None and weights is not None:
        raise ValueError(
            f"teacher_column={given!r} and teacher_weights={weights}; expected one of them: a row learns from one "
            "teacher, or from all under their weights"
        )
    routed = n_teachers > 1 and weights is None and COLUMN in columns
    if given is None and COLUMN in columns and not routed:
        say_once(
            f"the column {COLUMN!r} is not read: rows name their teacher where there are several of them and no "
            f"teacher_weights, or under teacher_column={COLUMN!r}"
        )
    return given or (COLUMN if routed else None)


def find_column(
    given: str | None, teachers: Teachers, datasets: Mapping[str, Any], packing: bool | None = None
) -> str | None:
    """Return the column that says which teacher a row of `datasets` (as `by_name` returns them) learns from.

    None: every row learns from all. Raises ValueError where a data set lacks it, packs rows, or may have it or not.
    """
    weights = teachers.weights if teachers.weights_are_given else None
    known = {name: [*names_of(one)] for name, one in datasets.items() if one is not None}
    column = column_of(given, weights, len(teachers), {x for names in known.values() for x in names})
    for name, columns in known.items():
        if column is None and len(teachers) > 1 and weights is None and not columns:
            raise ValueError(
                f"{name} does not list its columns, so whether its rows name one of {len(teachers)} teachers is not "
                f"known; expected teacher_column={COLUMN!r}, or teacher_weights, under which all teach every row"
            )
        if column is not None and columns and column not in columns:
            raise ValueError(
                f"teacher_column={column!r}, and {name} has no such column; its columns are {', '.join(columns)}. Add "
                "it to every data set, or leave teacher_column out and the column too"
            )
        if column is not None and (packing or PACKED in columns):
            raise ValueError(
                f"teacher_column={column!r} and packing, where a row holds several; expected packing=False"
            )
    return column


def read_route(row: Any, column: str, names: Sequence[str]) -> int:
    """Return which of the teachers a row learns from. ValueError where it does not say."""
    if not isinstance(row, Mapping) or column not in row:
        raise ValueError(
            f"a row has no column {column!r}, which says what teacher it learns from ({', '.join(names)}). Add it, or "
            "leave teacher_column out: all teachers then teach every row, under teacher_weights"
        )
    return teacher_number(row[column], names, column)


def rows_by_teacher(teacher_id: Any, names: Sequence[str], n_rows: int) -> dict[str, list[int]]:
    """Return the numbers of the rows that learn from each teacher, of those that have any.

    teacher_id: (B,) int64, on a GPU a small copy that is waited for; or a sequence of names or numbers.
    """
    values = list(teacher_id.tolist() if isinstance(teacher_id, Tensor) else teacher_id)
    if len(values) != n_rows:
        raise ValueError(f"{COLUMN} has {len(values)} values for {n_rows} rows; expected one for each")
    numbers = [teacher_number(value, names) for value in values]
    return {name: rows for i, name in enumerate(names) if (rows := [j for j, n in enumerate(numbers) if n == i])}


def hold(parts: Sequence[nn.Module | None]) -> Any:
    """Return one part as it is, and several teachers' in a list that a module can register; None where none has any."""
    if len(parts) == 1 or not any(part is not None for part in parts):
        return parts[0]
    return nn.ModuleList(parts)  # type: ignore[arg-type]  # it takes None


class Teachers(dict[str, TeacherSide]):
    """Map names to a run's teachers, of which there may be one, or one side without a model.

    Args:
        student, recipe, valid_vocab, vocab, check_heads: as in `TeacherSide`.
        teachers: as `name_teachers` returns them. A `TeacherCache` among them is learned from by the entries that
            batches bring under its name, whatever the recipe learns from.
        weights: of the KD terms; None = equal ones that sum to 1.

    Raises ValueError and TypeError as `TeacherSide` does, naming the teacher, and for what one alone can do.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teachers: Mapping[str, PreTrainedModel | KeptTeacher],
        recipe: Recipe,
        weights: Sequence[float] | None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.models: dict[str, PreTrainedModel] = running(teachers)
        self.caches = {name: one for name, one in teachers.items() if isinstance(one, KeptTeacher)}
        self.weights, self.weights_are_given = read_weights(weights, [*teachers]), weights is not None
        check_recipe(recipe, teachers)
        if len(teachers) > 1 and options.get("shared_vocabulary") is not None:
            raise ValueError(
                f"{len(teachers)} teachers, and shared_vocabulary is of one with another tokenizer; expected it alone"
            )
        for name, one in teachers.items() or [("teacher", None)]:
            role = f"teacher {name!r}" if len(teachers) > 1 else "teacher"
            alone = self.recipe_of(name, recipe)
            if name != next(iter(self.models), name):  # a start is the first one's that runs
                alone = replace(alone, student_init="own")
            with naming(name, teachers):
                if isinstance(one, KeptTeacher):
                    one.check_vocabulary(head_shape(student)[0], options["valid_vocab"])
                    one = None
                self[name] = TeacherSide(student, one, alone, role=role, **options)

    def recipe_of(self, name: str, recipe: Recipe) -> Recipe:
        """Return the run's `recipe` as it is for one of the teachers."""
        if name not in self.caches or recipe.teacher == "none":
            return recipe
        return replace(recipe, teacher="cached", student_init="own", anchor_weight=0.0)

    def learn(
        self,
        batch: StudentBatch,
        teacher_id: Any,
        recipe: Recipe,
        *args: Any,
        train: bool,
        compressed: Any,
        entries: Mapping[str, CachedEntries | CachedStates | None],
    ) -> tuple[Learned, dict[str, Learned]]:
        """Return what all teach together, and each of them: of all rows, or of those that are its own.

        The cross entropy is computed once: with the first teacher, or of each row with its own.

        Args:
            teacher_id: as in `DistillationModel.forward`.
            recipe, args, train: as in `TeacherSide.learn`.
            compressed: the compressed heads, held by `hold`.
            entries: of those that are caches. Without them one is left out of an evaluation.

        Raises ValueError in training for a cache without them, and where none has any.
        """
        heads = self.each(compressed)
        rows = None if teacher_id is None else rows_by_teacher(teacher_id, [*self], len(batch.targets))
        if rows is not None and self.weights_are_given:
            raise ValueError(
                f"{COLUMN}, which sends each row to one teacher, and teacher_weights; expected one of the two"
            )
        learned: dict[str, Learned] = {}
        used = []
        for (name, side), weight, head in zip(self.items(), self.weights, heads, strict=True):
            own, whole = self.recipe_of(name, recipe), batch
            if name in self.caches:
                whole = replace(batch, cached=entries.get(name))
                if whole.cached is None and (own.teacher == "cached" or (self.models and not train)):
                    if train:
                        raise ValueError(
                            f"teacher {name!r} is a cache, and the batch has no entries of it (teacher_indices_{name}, "
                            f"… or teacher_hidden_{name}); expected TeacherCache.dataset's columns under those names, "
                            "as KDTrainer adds them to its data sets"
                        )
                    say_once(f"teacher {name!r} has no entries of the evaluated text, and is left out there")
                    continue
            if rows is None:
                kd_weight = whole.kd_weight if weight == 1 else whole.kd_weight * weight if weight else 0.0
                asked = replace(whole, kd_weight=kd_weight, ce_weight=0.0 if learned else whole.ce_weight)
                if learned and not side.is_needed(asked, own, train=train):
                    continue
                used.append(weight)
            elif name in rows:
                asked = whole.rows(rows[name])
            else:
                continue
            learned[name] = side.learn(asked, own, *args, train=train, compressed=head)
        if not learned:
            raise ValueError("the batch has entries of none of the teachers; expected those of one of them at least")
        every = add_up([*learned.values()], used if rows is None else None)
        for name in self.keys() - learned:  # DDP and FSDP wait for the gradient of every projector
            part = self[name].projector
            if trained := [p for p in ([] if part is None else part.parameters()) if p.requires_grad]:
                every = every._replace(loss=every.loss + 0.0 * sum(p.sum() for p in trained))
        return every, {name: one._replace(loss=one.loss.detach()) for name, one in learned.items()}

    def each(self, held: Any) -> list[Any]:
        """Return the part of each teacher, of what `hold` has made of them."""
        return [held] if len(self) == 1 else list(held or [None] * len(self))

    def describe(self, column: str | None) -> str:
        """Return what a run prints of several: who teaches which rows."""
        if column is not None:
            return f"{len(self)} teachers, each of the rows whose {column!r} names it: {', '.join(self)}"
        weighted = (f"{name} ({weight:.3g})" for name, weight in zip(self, self.weights, strict=True))
        return f"{len(self)} teachers, each of every row, by their weights: {', '.join(weighted)}"

    def share_out(self, batches: Iterable[dict[str, Any]]) -> list[Iterator[dict[str, Any]]]:
        """Return for each teacher that runs the batches' rows that learn from it; all where nothing says which."""

        def own(name: str, some: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for batch in some:
                if (teacher_id := batch.get(COLUMN)) is None:
                    yield batch
                elif rows := rows_by_teacher(teacher_id, [*self], len(teacher_id)).get(name):
                    yield {key: x[rows] if isinstance(x, Tensor) else x for key, x in batch.items()}

        return [
            own(name, some) for name, some in zip(self.models, itertools.tee(batches, len(self.models)), strict=True)
        ]


def add_up(learned: Sequence[Learned], weights: Sequence[float] | None) -> Learned:
    """Return the sum of what several teachers teach.

    kd is their weighted sum, as it stands in the loss; of what else is measured of each the weighted mean.

    Args:
        weights: of the teachers, each of all rows. None: each has rows of its own, and counts by them.
    """
    first = learned[0]
    if len(learned) == 1 and weights in (None, [1.0]):
        return first
    given = None if weights is None else first.loss.new_tensor(weights)
    own = (torch.stack(x) for x in zip(*((x.metrics.tokens, x.counted, x.compared) for x in learned), strict=True))
    by_rows, by_targets, by_compared = own if given is None else (given,) * 3
    weighing = {"ce": by_targets, "anchor": by_compared}  # and the rows of the KD term what else is measured

    def mean(values: Iterable[Tensor], by: Tensor) -> Tensor:
        stacked = torch.stack([*values])
        return (torch.where(by > 0, stacked * by, 0.0).sum() / by.sum()).to(stacked.dtype)

    columns = zip(KDMetrics._fields, zip(*(x.metrics for x in learned), strict=True), strict=True)
    metrics = KDMetrics(**{name: mean(x, weighing.get(name, by_rows)) for name, x in columns})
    if given is None:
        metrics = metrics._replace(tokens=by_rows.sum())
    else:
        same = {name: getattr(first.metrics, name) for name in ("ce", "student_entropy", "tokens")}
        metrics = metrics._replace(kd=metrics.kd * sum(weights or ()), **same)
    compared: Fidelity | None = None
    if len(fidelities := [x.fidelity for x in learned if x.fidelity is not None]) == len(learned):
        pairs = zip(Fidelity._fields, zip(*fidelities, strict=True), strict=True)
        compared = Fidelity(**{name: mean(x, by_compared) for name, x in pairs if not any(y is None for y in x)})
    return Learned(
        sum((x.loss for x in learned[1:]), first.loss),
        metrics,
        by_targets.sum() if given is None else first.counted,
        by_compared.sum() if given is None else first.compared,
        functools.reduce(operator.or_, (x.strange for x in learned)),
        fidelity=compared,
    )
