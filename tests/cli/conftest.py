from command_line import kdfast, place, teacher  # noqa: F401
