"""The command line: `kdfast distill`, `kdfast demo`, `kdfast doctor`."""
