"""The command line: `kdfast COMMAND`, and what each command does."""

COMMANDS = {  # a line each of `kdfast --help`
    "distill": "train a student to match a teacher, as CONFIG.yaml says",
    "cache": "run a teacher over a text once, and keep what students need",
    "data": "show how CONFIG.yaml's first row is read, and count the rows",
    "merge": "write a whole model from a LoRA run: its base and its adapter",
    "report": "compare runs, finished or not: curves and a table on one page",
    "plan": "predict the loss's memory, and how many tokens fit",
    "demo": "distill a small model on this machine, from text to results",
    "doctor": "list versions and devices, and the engine that would run here",
}


def as_sentence(what: str) -> str:
    """Return what a command does as its own help page begins with it."""
    return f"{what[0].upper()}{what[1:]}."
