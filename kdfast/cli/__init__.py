"""The command line: `kdfast distill | cache | data | merge | report | demo | doctor | plan`."""
