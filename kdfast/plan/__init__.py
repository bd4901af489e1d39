"""What a loss will take before it is run: memory, and on a known GPU time. `kdfast plan` prints it.

Formulas and arithmetic alone: nothing here allocates, needs a GPU, or imports transformers (but `models`, on request).
"""

from kdfast.plan.gpus import GPUS, Gpu, get_gpu
from kdfast.plan.memory import METHODS, largest_tokens, peak_bytes, total_bytes
from kdfast.plan.shape import Shape
from kdfast.plan.timing import operations, predicted_seconds

__all__ = [
    "GPUS",
    "METHODS",
    "Gpu",
    "Shape",
    "get_gpu",
    "largest_tokens",
    "operations",
    "peak_bytes",
    "predicted_seconds",
    "total_bytes",
]
