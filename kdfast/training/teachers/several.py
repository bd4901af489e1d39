"""Several teachers: names and weights, which of them each row learns from, and the sum of their losses."""

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
from kdfast.plan.price import Price, price_per_token, size_of
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

COLUMN = "teacher_id"  # TRL's column that routes a row to a teacher


def name_teachers(given: Any) -> dict[str, Any]:
    """Return teachers by name, from one teacher, a list, or a mapping from names to teachers; {} for None.

    A name is the last part of the folder or hub name that a teacher or cache was loaded from, with a number added if
    several share it; "teacher_0" and so on if it has none.

    Raises ValueError for an empty list, a model given twice, or a name that cannot be part of a key in logs.
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
    """Prefix errors with the teacher's name if there are several."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if len(teachers) < 2:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"teacher {name!r}: {error}") from error


def read_weights(given: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """Return a weight per teacher, by default equal ones that sum to 1. Raise ValueError for wrong ones."""
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
    """Return the result of `find_valid_vocab` for all teachers that run, which share the text's tokenizer."""
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
    """Return `choose_recipe`'s choice for the first teacher that runs; the others must work with it."""
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
    """Return the teachers that are not caches."""
    return {name: one for name, one in teachers.items() if not isinstance(one, KeptTeacher)}


def check_recipe(recipe: Recipe, teachers: Mapping[str, Any]) -> None:
    """Raise ValueError if the recipe needs a single teacher, or teachers that are not caches."""
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
    """Return the number of the teacher that a row's `value` names, by name or number. Raise ValueError for neither."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    value = int(value) if isinstance(value, str) and value.isdecimal() else value  # from an untyped file
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    raise ValueError(
        f"{column}={value!r} names no teacher; expected {', '.join(map(repr, names))}, or a number from 0 to "
        f"{len(names) - 1}"
    )


def column_of(given: str | None, weights: Any, n_teachers: int, columns: Iterable[str]) -> str | None:
    """Return the column that routes rows to teachers: `given`, or COLUMN if it is among `columns`.

    None: every row learns from all teachers, or there is only one. Raises ValueError for a column with weights.
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
    """Return the column that routes rows of `datasets` (as `by_name` returns them) to teachers.

    None: every row learns from all. Raises ValueError if a data set lacks it, packs rows, or does not list columns.
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
    """Return the number of the teacher that a row learns from. Raise ValueError if it names none."""
    if not isinstance(row, Mapping) or column not in row:
        raise ValueError(
            f"a row has no column {column!r}, which says what teacher it learns from ({', '.join(names)}). Add it, or "
            "leave teacher_column out: all teachers then teach every row, under teacher_weights"
        )
    return teacher_number(row[column], names, column)


def rows_by_teacher(teacher_id: Any, names: Sequence[str], n_rows: int) -> dict[str, list[int]]:
    """Return the indices of the rows that learn from each teacher with any; `teacher_id` as in `Teachers.learn`."""
    values = list(teacher_id.tolist() if isinstance(teacher_id, Tensor) else teacher_id)
    if len(values) != n_rows:
        raise ValueError(f"{COLUMN} has {len(values)} values for {n_rows} rows; expected one for each")
    numbers = [teacher_number(value, names) for value in values]
    return {name: rows for i, name in enumerate(names) if (rows := [j for j, n in enumerate(numbers) if n == i])}


def hold(parts: Sequence[nn.Module | None]) -> Any:
    """Return a single part as it is, several teachers' parts as a module list, and None if there are none."""
    if len(parts) == 1 or not any(part is not None for part in parts):
        return parts[0]
    return nn.ModuleList(parts)  # type: ignore[arg-type]  # it takes None


class Teachers(dict[str, TeacherSide]):
    """A mapping from names to a run's teachers; with one teacher, or one side without a model, it has one entry.

    Args:
        student, recipe, valid_vocab, vocab, check_heads: as in `TeacherSide`.
        teachers: as `name_teachers` returns them. The student learns from a `TeacherCache` by the entries that batches
            bring under its name, whatever the recipe learns from.
        weights: of the KD terms; None = equal weights that sum to 1.

    Raises ValueError and TypeError as `TeacherSide` does, naming the teacher, and for what needs a single teacher.
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
            if name != next(iter(self.models), name):  # a start comes from the first teacher that runs
                alone = replace(alone, student_init="own")
            with naming(name, teachers):
                if isinstance(one, KeptTeacher):
                    one.check_vocabulary(head_shape(student)[0], options["valid_vocab"])
                    one = None
                self[name] = TeacherSide(student, one, alone, role=role, **options)

    def recipe_of(self, name: str, recipe: Recipe) -> Recipe:
        """Return the run's `recipe` as it applies to one of the teachers."""
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
        """Return what the student learns from all teachers together, and from each, over all rows or over its own.

        The cross entropy is computed once: with the first teacher, or for each row with its own.

        Args:
            teacher_id: as in `DistillationModel.forward`.
            recipe, args, train: as in `TeacherSide.learn`.
            compressed: the compressed heads, as from `hold`.
            entries: the caches' entries. In evaluations, a cache without entries is left out.

        Raises ValueError in training if a cache has no entries, and in evaluations if no teacher remains.
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
        for name in self.keys() - learned:  # DDP and FSDP wait for every projector's gradient
            part = self[name].projector
            if trained := [p for p in ([] if part is None else part.parameters()) if p.requires_grad]:
                every = every._replace(loss=every.loss + 0.0 * sum(p.sum() for p in trained))
        return every, {name: one._replace(loss=one.loss.detach()) for name, one in learned.items()}

    def each(self, held: Any) -> list[Any]:
        """Return each teacher's part of what `hold` returned."""
        return [held] if len(self) == 1 else list(held or [None] * len(self))

    def describe(self, column: str | None) -> str:
        """Return the line a run prints about several teachers: which rows learn from which."""
        if column is not None:
            return f"{len(self)} teachers, each of the rows whose {column!r} names it: {', '.join(self)}"
        weighted = (f"{name} ({weight:.3g})" for name, weight in zip(self, self.weights, strict=True))
        return f"{len(self)} teachers, each of every row, by their weights: {', '.join(weighted)}"

    def price(
        self, student: PreTrainedModel, recipe: Recipe, held: Any, passes: float | None, *, routed: bool
    ) -> Price:
        """Return the cost of training on one token, with a teacher's single pass over the text shared out.

        held: compressed or cached heads, as from `hold`. passes: how often the run goes over its text, if it makes a
        cache first. routed: each row learns from one teacher.
        """
        ours, prices = size_of(student), []
        for (name, side), part in zip(self.items(), self.each(held), strict=True):
            head = self.caches[name].head if name in self.caches else part
            own, rank = self.recipe_of(name, recipe), None if head is None else head.rank
            size = None if side.model is None else size_of(side.model)
            prices.append(price_per_token(own, ours, size, rank=rank, passes=passes))
        if len(prices) == 1:
            return prices[0]
        if routed:  # which teacher a row has, only the text says
            return Price(prices[0].lm_only, sum(price.teacher for price in prices) // len(prices))
        asked = [price.teacher for price, weight in zip(prices, self.weights, strict=True) if weight]
        again = 6 * ours.vocab * ours.width * recipe.kd_until  # the student's head, per further teacher
        return Price(prices[0].lm_only, round(sum(asked) + again * max(len([*filter(None, asked)]) - 1, 0)))

    def share_out(self, batches: Iterable[dict[str, Any]]) -> list[Iterator[dict[str, Any]]]:
        """Return, for each teacher that runs, the batches' rows that learn from it; without a column, all rows."""

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
    """Return the sum of several teachers' losses.

    kd is their weighted sum, as in the loss; the other values are weighted means.

    Args:
        weights: one per teacher, each over all rows. None: each teacher has its own rows, which weight it.
    """
    first = learned[0]
    if len(learned) == 1 and weights in (None, [1.0]):
        return first
    given = None if weights is None else first.loss.new_tensor(weights)
    own = (torch.stack(x) for x in zip(*((x.metrics.tokens, x.counted, x.compared) for x in learned), strict=True))
    by_rows, by_targets, by_compared = own if given is None else (given,) * 3
    weighing = {"ce": by_targets, "anchor": by_compared}  # other values are weighted by the KD term's rows

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
