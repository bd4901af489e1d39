"""What pyproject.toml says of warnings, for processes that pytest does not run."""

import warnings


def are_errors():
    """Raise this project's own warnings and show those of others, but for numpy's opinion of what kernels mask out."""
    warnings.simplefilter("default")
    warnings.filterwarnings("error", module=r"(kdfast|tests|examples)\b")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter|numpy")
    warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)  # Triton 3.4's interpreter
