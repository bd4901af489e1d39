"""Highest live bytes of a run on CPU tensors: what PyTorch's CPU allocator was asked for and gave back, in order.

The profiler reports every allocation, those inside autograd's backward, inside operators and of the intermediates that
a C++ kernel makes for itself among them. (A TorchDispatchMode would see results of operators only, and nothing inside
a custom operator.) Buffers of the matrix library are not PyTorch's: only the resident set shows those.
"""

from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def highest_live_bytes(run):
    """Above what is live now."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(0, *accumulate(changes))
