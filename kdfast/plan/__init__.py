"""Predict the memory of a loss before it is run. `kdfast plan` prints it.

Formulas alone: nothing here allocates, needs a GPU, or imports transformers (but `models`, on request).
"""

from kdfast.plan.memory import METHODS, largest_tokens, peak_bytes, total_bytes
from kdfast.plan.shape import Shape

__all__ = ["METHODS", "Shape", "largest_tokens", "peak_bytes", "total_bytes"]
