"""Predict a loss's memory and a run's operations per token before the run. `kdfast plan` prints them.

These are formulas: nothing here allocates, needs a GPU or imports transformers (except `models`, on request).
"""

from kdfast.plan.memory import METHODS, Shape, largest_tokens, peak_bytes, total_bytes

__all__ = ["METHODS", "Shape", "largest_tokens", "peak_bytes", "total_bytes"]
