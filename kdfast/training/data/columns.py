"""Columns of a data set: names that batches cannot have, and images, which must not be lost silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset

# arguments of DistillationModel.forward that are not data
ARGUMENTS = (
    "self", "temperature", "kd_weight", "num_items_in_batch", "kd_items_in_batch", "with_fidelity", "with_metrics",
    "with_log_probs", "ce_weight", "write", "backbone_inputs",
)  # fmt: skip
# outputs of processors for images, video and sound, and TRL's names of the source columns
MEDIA = frozenset(("pixel_values", "pixel_values_videos", "input_features", "input_values"))
RAW = ("images", "videos")
BROUGHT = frozenset(("teacher_indices", "teacher_hidden"))  # columns of a teacher that ran earlier, either one
MEDIA_TYPES = ("Image", "Video", "Audio")  # feature types of `datasets`


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise ValueError for a column whose name is another argument of the model's forward."""
    for name in names:
        if name in ARGUMENTS:
            raise ValueError(
                f"{where} has a column {name!r}, which is the name of an argument of the loss and no input of a model. "
                f"Rename the column, as dataset.rename_column({name!r}, 'my_{name}') does"
            )


def by_name(**datasets: Any) -> dict[str, Any]:
    """Return data sets by their names in errors: the argument's name, or argument['name'] for items of a dict."""
    named: dict[str, Any] = {}
    for argument, given in datasets.items():
        several = isinstance(given, dict)
        named |= {f"{argument}[{name!r}]": one for name, one in given.items()} if several else {argument: given}
    return named


def check_columns(datasets: Mapping[str, Any], loses_unused: bool) -> None:
    """Raise ValueError for a column that cannot be used in training, or would be lost.

    Args:
        datasets: as `by_name` returns them. Data sets that do not list their columns are not checked.
        loses_unused: columns that no model reads are dropped before the collator, as Trainer's own does.
    """
    for argument, dataset in datasets.items():
        check_names(argument, names_of(dataset))
        raw = [name for name in media_columns(dataset) if name not in MEDIA]  # a model reads or refuses those
        if raw and loses_unused:
            raise ValueError(unread(argument, raw[0]))


def unread(where: str, name: str) -> str:
    """Return the error message for a column that is not a model's input and is not turned into one."""
    return (
        f"{where} has a column {name!r} of images, video or sound, which nobody reads. Pass a data_collator that makes "
        f"the model's inputs of row[{name!r}] (pixel_values, …), as its processor does, or remove the column"
    )


def is_raw(name: str, value: Any) -> bool:
    """Return whether a row's value contains images or videos that are not inputs yet."""
    one = next(iter(value), None) if isinstance(value, list) else value
    return one is not None and (name in RAW or type(one).__module__.partition(".")[0] == "PIL")


def media_columns(dataset: Any) -> list[str]:
    """Return the columns with images, video or sound, by type or usual name."""
    features = getattr(dataset, "features", None) or {}
    return [name for name in names_of(dataset) if name in MEDIA or name in RAW or _is_media(features.get(name))]


def names_of(dataset: Any) -> Iterable[str]:
    """Return the names of a data set's columns, or of its first row's entries; () if it has neither."""
    names = getattr(dataset, "column_names", None)
    is_map = isinstance(dataset, list | Dataset) and not isinstance(dataset, IterableDataset)
    if names is None and is_map and hasattr(dataset, "__len__") and len(dataset):
        names = dataset[0]
    return names if isinstance(names, list | dict) else ()


def brings_teacher(dataset: Any) -> bool:
    """Return whether the rows contain entries of a teacher that ran earlier."""
    return not BROUGHT.isdisjoint(names_of(dataset))


def _is_media(feature: Any) -> bool:
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)  # of a list's items
    return type(feature).__name__ in MEDIA_TYPES
