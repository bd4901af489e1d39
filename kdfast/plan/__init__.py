"""What a loss will take before it is run: memory, and on a known GPU time. `kdfast plan` prints it.

Formulas and arithmetic alone: nothing here allocates, needs a GPU, or imports transformers (but `models`, on request).
"""

from kdfast.plan.memory import METHODS, largest_tokens, peak_bytes
from kdfast.plan.shape import Shape

__all__ = ["METHODS", "Shape", "largest_tokens", "peak_bytes"]
