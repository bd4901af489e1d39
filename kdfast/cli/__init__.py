"""The command line: `kdfast distill | cache | data | report | demo | doctor | plan`."""
