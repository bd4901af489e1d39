"""The teacher's side of a run: one small class per kind of teacher, cached entries, fidelity, hidden states."""
