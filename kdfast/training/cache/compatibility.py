"""Whether a run can learn from the caches that its data sets bring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdfast.training.cache.description import CacheError
from kdfast.training.cache.read import cached_blocks
from kdfast.training.hf import head_shape

if TYPE_CHECKING:
    from kdfast.schedules import Schedule
    from kdfast.training.model import DistillationModel


def check_datasets(model: DistillationModel, datasets: Mapping[str, Any], temperature: Schedule | None) -> None:
    """Args: `datasets` argument → data set; `temperature` a schedule in the recipe's place, or None.

    Raises CacheError naming the argument that does not fit `model` or its recipe.
    """
    recipe = model.recipe
    for argument, dataset in datasets.items():
        if isinstance(dataset, dict):
            check_datasets(model, {f"{argument}[{name!r}]": one for name, one in dataset.items()}, temperature)
            continue
        for blocks in cached_blocks(dataset):
            blocks.cache.check_vocabulary(head_shape(model.student)[0], model.valid_vocab)
            if recipe.teacher != "cached":
                continue
            if temperature is not None:
                raise CacheError(
                    f"temperature_schedule is given, and {argument} has a teacher's entries for "
                    f"temperature={blocks.temperature:g}; leave it out"
                )
            if set(recipe.temperatures) != {blocks.temperature}:
                raise CacheError(
                    f"{argument} has a teacher's entries for temperature={blocks.temperature:g}, and the run is at "
                    f"{', '.join(f'{tau:g}' for tau in recipe.temperatures)}; expected the same, throughout the run"
                )
            if blocks.description.method == "sample" and recipe.divergence in ("reverse_kl", "symmetric_kl"):
                raise CacheError(
                    f"divergence={recipe.divergence!r} and {argument} has ids drawn at random, against which it is "
                    "infinite; expected another divergence, or a cache made with cache_method: top_k"
                )
