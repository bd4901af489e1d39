"""The teacher's side of a run: a small class per kind of teacher, cached entries, fidelity, hidden states."""
