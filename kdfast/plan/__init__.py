"""Predict the memory of a loss, and the price of a token, before a run. `kdfast plan` prints them.

Formulas alone: nothing here allocates, needs a GPU, or imports transformers (but `models`, on request).
"""

from kdfast.plan.memory import METHODS, Shape, largest_tokens, peak_bytes, total_bytes

__all__ = ["METHODS", "Shape", "largest_tokens", "peak_bytes", "total_bytes"]
