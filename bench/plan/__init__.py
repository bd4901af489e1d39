"""Predictions for every contender, to be held against what is measured: peak memory, and on a known GPU seconds.

`kdfast.plan` has eager's and our engines' memory; the other libraries' formulas, read off one release of each, and
everything about time are here.
"""

from .gpus import GPUS, Gpu, get_gpu
from .memory import METHODS, live_bytes, peak_bytes
from .timing import operations, predicted_seconds

__all__ = ["GPUS", "METHODS", "Gpu", "get_gpu", "live_bytes", "operations", "peak_bytes", "predicted_seconds"]
