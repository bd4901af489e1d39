"""On-policy distillation: the student, or the teacher, writes what the student is trained on."""
