"""The figures before the first step: at which embedding scale do they hold, and what do they say?

    python bench/recipes/step0.py

The run this project grew out of reported, for gpt2-medium → gpt2 (V = 50257, 1024 → 768, τ = 2), that N(0, 0.01²) in
place of nn.Linear's start of the projector took the KL the loss sees from 9.4 to 3.5, and with the ramp of the KD
weight from 0.7 to 0.1 the loss from 28 to 3.3, at step 0.

Here: teacher hidden states with entries of root mean square r, an embedding of N(0, s²), and a student whose logits
have a standard deviation of 2.8. Only r·s counts: it is 0.02 for a fresh GPT-2 (s = 0.02, r = 1) and near 0.5 for a
trained one (s = 0.14 and r of 3 to 4).
"""

from __future__ import annotations

import torch

from kdfast import Head, LogitProjector, Projected, fused_kd_loss

V, HT, HS, N = 50257, 1024, 768, 64
PRODUCTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # r·s
STUDENT_STD = 2.8  # of its logits
TEMPERATURE = 2.0


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(N, width, generator=generator) for width in (HT, HS))
    embedding = torch.randn(V, HS, generator=generator)
    print("  r·s   KL, nn.Linear's start   KL, N(0, 0.01²)   0.7·τ²·KL, the first   0.1·τ²·KL, the second")
    for product in PRODUCTS:
        kls = []
        for init in ("default", "normal"):
            torch.manual_seed(0)
            projector = LogitProjector(HT, HS, init=init)
            # h·W is what counts: the scale stands with the student's hidden states and the teacher's
            source = Head(student * (STUDENT_STD / HS**0.5 / product), product * embedding)
            projected = Projected(teacher, projector.weight.detach(), projector.bias.detach())
            kls.append(fused_kd_loss(source, projected, temperature=TEMPERATURE, temperature_squared=False).item())
        weighted = 0.7 * TEMPERATURE**2 * kls[0], 0.1 * TEMPERATURE**2 * kls[1]
        print(f"{product:5.2f} {kls[0]:15.2f} {kls[1]:20.2f} {weighted[0]:20.1f} {weighted[1]:22.2f}", flush=True)


if __name__ == "__main__":
    main()
