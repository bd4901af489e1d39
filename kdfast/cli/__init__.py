"""The command line: `kdfast distill | cache | report | demo | doctor | plan`."""
