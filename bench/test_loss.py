"""Forward and backward of the loss, in time and memory, against its own GEMMs, eager and the peers.

`pytest bench/test_loss.py -s` prints the tables; results go to bench/results/. Sizes: KDFAST_BENCH_TOKENS (4096),
KDFAST_BENCH_ROUNDS (3). Every contender's gradients are checked against float64 rows before it is timed.

Operations: u(H) = 2·N·V·H. Bytes of an eager run beyond inputs: z, log-softmax and gradient of both sides, N·V·4 each.
Memory is the peak resident set above inputs and gradients, in a process of its own; a contender that saves dW in the
forward and returns a scaled copy counts that saved one.
"""

from __future__ import annotations

import json
import os
import statistics

import measure
import pytest
import torch
from contenders import CONTENDERS, TEMPERATURE, Case

TOKENS = int(os.environ.get("KDFAST_BENCH_TOKENS", "4096"))
ROUNDS = int(os.environ.get("KDFAST_BENCH_ROUNDS", "3"))
SIZES = {"V": 50257, "Hs": 768, "Ht": 1024}  # gpt2-medium → gpt2
TITLES = {
    "projected": "Projected teacher, all gradients (hidden, W, projector)",
    "head": "Teacher with its own head, student's gradients: the work TRL and Liger share",
}


def exact_hidden_gradient(case: Case, rows: int) -> torch.Tensor:
    """Float64 gradient of the first rows' hidden states, each row being independent of the others."""
    hs = case.hs[:rows].detach().double().requires_grad_()
    W = case.W.detach().double()
    ht = case.ht[:rows].double()
    z_t = ht @ case.P.detach().double().T @ W.T if case.kind == "projected" else ht @ case.Wt.double().T
    log_q, log_p = (hs @ W.T / TEMPERATURE).log_softmax(-1), (z_t / TEMPERATURE).log_softmax(-1)
    torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).div(case.N).backward()
    return hs.grad


@pytest.mark.parametrize("kind", ["projected", "head"])
def test_loss(kind):
    case = Case(kind, TOKENS, **SIZES)
    exact = exact_hidden_gradient(case, 32)
    rows = []
    for contender in CONTENDERS:
        missing = "cannot do this case" if kind not in contender.kinds else contender.missing()
        row = {"contender": contender.name, "operations": contender.operations.get(kind), "missing": missing}
        rows.append(row)
        if missing:
            continue
        case.clear()
        contender.run(case)  # warm-up
        if contender.checked:
            row["hidden_gradient_error"] = float((case.hs.grad[:32].double() - exact).norm() / exact.norm())
            assert row["hidden_gradient_error"] < 1e-4, contender.name
    able = [(c, row) for c, row in zip(CONTENDERS, rows, strict=True) if not row["missing"]]

    def fresh(contender):
        def run():
            case.clear()
            contender.run(case)

        return run

    seconds = measure.alternate([fresh(contender) for contender, _ in able], ROUNDS)
    floor = seconds[0]
    for (contender, row), times in zip(able, seconds, strict=True):
        memory = json.loads(
            measure.in_fresh_process("memory", kind, contender.name, str(TOKENS), *map(str, SIZES.values()))
        )
        row |= {
            "seconds": statistics.median(times),
            "all_seconds": times,
            "of_floor_b": measure.ratio(floor, times),
            "tokens_per_second": TOKENS / statistics.median(times),
            "peak_bytes": memory["peak_above_inputs"] - (memory["gradients"] if contender.checked else 0),
        }
    report(kind, rows)
    timed = {row["contender"]: row for _, row in able}
    assert timed["kdfast torch"]["peak_bytes"] < timed["eager"]["peak_bytes"]


def report(kind, rows):
    machine = measure.machine()
    lines = [
        f"\n### {TITLES[kind]}",
        f"N={TOKENS}, V={SIZES['V']}, Hs={SIZES['Hs']}, Ht={SIZES['Ht']}, fp32, forward and backward; "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}; "
        f"median of {ROUNDS} alternating rounds\n",
        "| contender | operations | seconds | floor B / time | tokens/s | memory | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["missing"]:
            lines.append(f"| {row['contender']} | | {row['missing']} | | | | |")
            continue
        error = row.get("hidden_gradient_error")
        lines.append(
            f"| {row['contender']} | {row['operations']} | {row['seconds']:.2f} | {row['of_floor_b']:.0%} "
            f"| {row['tokens_per_second']:.0f} | {row['peak_bytes'] / 2**20:.0f} MiB | "
            f"{'' if error is None else f'{error:.0e}'} |"
        )
    print("\n".join(lines))
    folder = measure.ROOT / "bench/results"
    folder.mkdir(exist_ok=True)
    path = folder / f"loss-{kind}-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    result = {"machine": machine, "sizes": {"N": TOKENS, **SIZES}, "dtype": "float32", "rounds": ROUNDS, "rows": rows}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
