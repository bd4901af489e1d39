"""The private methods of transformers.Trainer that are overridden: as listed, few, and all in the installed version."""

import transformers

from kdfast.training.durable.trainer import READERS
from kdfast.training.trainer import PRIVATE_OVERRIDES, KDTrainer


def ours():
    return [cls for cls in KDTrainer.__mro__ if cls.__module__.startswith("kdfast")]


def private(cls):
    return {name for name in vars(cls) if name.startswith("_") and not name.endswith("__")}


def missing(names):
    return [name for name in names if not callable(getattr(transformers.Trainer, name, None))]


def test_each_is_listed_with_its_reason():
    overridden = {name for cls in ours() for name in private(cls) & private(transformers.Trainer)}
    assert overridden == PRIVATE_OVERRIDES.keys()
    assert all(PRIVATE_OVERRIDES.values())


def test_they_are_few_and_in_one_class_each():
    assert len(ours()) <= 2
    assert len(PRIVATE_OVERRIDES) <= 8
    for name in PRIVATE_OVERRIDES:
        assert sum(name in vars(cls) for cls in ours()) == 1, name


def test_the_installed_transformers_has_them():
    names = [*PRIVATE_OVERRIDES, *READERS]
    assert not missing(names), f"transformers {transformers.__version__} has no Trainer.{missing(names)[0]}"
    assert missing(["_not_there"]) == ["_not_there"]
