"""Teachers that are run once: their distributions, kept on disk, in place of a live teacher.

    summary = cache_teacher(teacher, {"train": train, "eval": held_out}, "caches/teacher", tokenizer=tokenizer)
    train = TeacherCache("caches/teacher").dataset("train", train, temperature=2.0)

entries.py      what is kept of a distribution     rows.py   compact columns and back
description.py  cache.json, and what must agree    layout.py what lies where, and whether it is whole
write.py        cache_teacher                      read.py   TeacherCache
fits.py         whether a run can learn from it    ../cached.py  a batch's entries as the loss takes them
"""

from kdfast.training.cache.description import CacheError
from kdfast.training.cache.layout import CacheSummary
from kdfast.training.cache.read import CachedBlocks, TeacherCache
from kdfast.training.cache.write import cache_teacher

__all__ = ["CacheError", "CacheSummary", "CachedBlocks", "TeacherCache", "cache_teacher"]
