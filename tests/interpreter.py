"""The Triton engines on CPU tensors, at half the interpreter's price. Import before a kernel is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    from triton.runtime.interpreter import InterpretedFunction

    def call_device_function(self, *args, **kwargs):
        """As the interpreter does, but for our own functions without patching triton.language once more, which the
        launch has done already: half of its time."""
        if self.fn.__module__.startswith("kdfast."):
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    original, InterpretedFunction.__call__ = InterpretedFunction.__call__, call_device_function
