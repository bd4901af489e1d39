"""On-policy distillation: the student or the teacher writes the text that the student is trained on."""
