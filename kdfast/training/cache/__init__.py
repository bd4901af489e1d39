"""Teachers that run once: their distributions are kept on disk and replace a live teacher.

    summary = cache_teacher(teacher, {"train": train, "eval": held_out}, "caches/teacher", tokenizer=tokenizer)
    train = TeacherCache("caches/teacher").dataset("train", train, temperature=2.0)

description.py  cache.json and the folder's layout    entries.py  a distribution as rows on disk, and back
write.py        cache_teacher                    read.py     TeacherCache, and whether a run can learn from it
imported.py     import_log_probs                 formats.py  log-probabilities as others print them
servers.py      cache_from_server
"""

from kdfast.training.cache.description import CacheError, CacheSummary
from kdfast.training.cache.imported import import_log_probs
from kdfast.training.cache.read import CachedBlocks, TeacherCache
from kdfast.training.cache.servers import cache_from_server
from kdfast.training.cache.write import cache_teacher

__all__ = [
    "CacheError",
    "CacheSummary",
    "CachedBlocks",
    "TeacherCache",
    "cache_from_server",
    "cache_teacher",
    "import_log_probs",
]
