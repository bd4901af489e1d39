"""The Triton engines on CPU tensors, at a third of the interpreter's price. Import before a kernel is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    def call_device_function(self, *args, **kwargs):
        """Call it without patching triton.language once more, which would be two thirds of the time: the launch has
        done so, and the first call of a function of triton's own has done so to the module that those see."""
        own = self.fn.__module__.startswith("kdfast.")
        if own or not triton.language.core.is_builtin(triton.language.core.load):
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    original, InterpretedFunction.__call__ = InterpretedFunction.__call__, call_device_function

    # Triton 3.4 refuses products of float64 before its interpreter, which has them, sees any. All else is tested in it
    if triton.__version__.startswith("3.4."):
        from triton.language.semantic import TritonSemantic

        from kdfast.kernels import block_sizes

        def dot(self, lhs, rhs, acc, *others):
            if not lhs.dtype.is_fp64():
                return refusing(self, lhs, rhs, acc, *others)
            return self.tensor(self.builder.create_dot(lhs.handle, rhs.handle, acc.handle, None, 0), acc.type)

        refusing, TritonSemantic.dot = TritonSemantic.dot, dot
        block_sizes.MULTIPLIES_FLOAT64 = True
