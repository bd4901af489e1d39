"""Figures on the pages are those of bench/results/, or what the code computes."""

import importlib.util
import json
import math

import documents
import pytest
import torch
from fuzz import interface
from recorder import products

from kdfast import JSD, Head, KDConfig, Projected, fused_kd_loss
from kdfast.divergences import DIVERGENCES
from kdfast.engines import MIN_TOKENS
from kdfast.ops import planning
from kdfast.training.cache.description import Description, Split


def test_teachers():
    page = documents.source("docs/teachers.md")
    results = json.loads((documents.ROOT / "bench/results/cached.json").read_text())
    runs = {(row["case"], row["name"]): row["runs"] for row in results["rows"]}
    names = {"no teacher (`lm_only`)": "lm_only", "live teacher": "live", "`hidden` 254": "hidden-int8-254"}
    names |= {"`hidden` 126": "hidden-int8-126", "`sample` 46": "drawn-46", "`sample` 22": "drawn-22"}
    names |= {"`top_k` 126": "top-126", "`top_k` 30": "top-30"}
    table = page.split("## What a student loses by it")[1].split("**")[0].splitlines()
    for kept, name in names.items():
        cells = []
        for key in ("eval_ce", "kl_teacher_student"):
            found = [run[key] for run in runs["strong", name]]
            assert len(found) == 3
            cells.append(f"{sum(found) / 3:.3f} ± {(max(found) - min(found)) / 2:.3f}")
        (row,) = [line for line in table if line.startswith(f"| {kept}")]
        assert row.endswith(f"| {cells[0]} | {cells[1]} |"), row

    def mean(case, name):
        return sum(run["eval_ce"] for run in runs[case, name]) / len(runs[case, name])

    spread = [run["eval_ce"] for run in runs["strong", "live"]]
    within = mean("strong", "live") + (max(spread) - min(spread)) / 2
    assert all(mean("strong", name) < within for kept, name in names.items() if "sample" in kept or "hidden" in kept)
    sizes = {row["name"]: row["size"] for row in results["rows"] if row["case"] == "strong"}
    for size in (64, 128, 256, 512):  # of likeliest ids alone there is a larger one
        of_size = [name for name in sizes if sizes[name] == size]
        assert max(of_size, key=lambda name: mean("strong", name)).startswith("top-"), size
    worse, none = mean("wide", "top-30"), mean("wide", "lm_only")
    assert f"{worse:.3f} against {none:.3f}" in page
    speed = results["speed"]
    assert f"ran {speed['drawn-46']['trained'] / speed['live']['trained']:.1f} times" in " ".join(page.split())


def test_bytes_per_token():
    page = documents.source("docs/teachers.md")

    def size(method, k, vocab, dtype, temperatures):
        described = Description(
            "", "", "", "", "", vocab, None, method, k, temperatures, dtype, 0, 1, {"a": Split(1, 1, "")}
        )
        return described.bytes_per_token

    for vocab, each in ((65_536, 3), (65_537, 5)):
        assert size("sample", 32, vocab, "float16", (2.0,)) == each * 32 + 2
        assert f"{each}n + 2" in page
    for vocab, each in ((65_536, 4), (65_537, 6)):
        assert size("top_k", 64, vocab, "float16", (2.0,)) == each * 64 + 8
        assert f"{each}k + 8" in page
    assert (size("hidden", 40, 999, "int8", ()), size("hidden", 40, 999, "float16", ())) == (42, 80)
    assert "r + 2 as `int8`, 2r as `float16`" in page
    kept = size("top_k", 64, 50_257, "float16", (2.0,))
    assert f"{kept} bytes per token, or {kept * 1e8 / 1e9:.0f} GB" in page
    assert f"{2 * 50_257 * 1e8 / 1e12:.0f} TB" in page


def test_choosing():
    """Cross entropies, differences and learning rates of bench/results/recipes.md."""
    page = " ".join(documents.source("docs/choosing.md").split())
    results = (documents.ROOT / "bench/results/recipes.md").read_text()

    def row(section, recipe):
        rows = results.split(f"### {section}")[1].split("###")[0].splitlines()
        (cells,) = [[cell.strip() for cell in line.split("|")] for line in rows if line.startswith(f"| {recipe} |")]
        return {"rate": float(cells[2]), "ce": cells[4].split(" ")[0], "less": cells[5].split(" ")[0]}

    solved, alone = row("fresh-192", "svd, head at KL 0.01, KD 2"), row("fresh-192", "lm_only")
    assert f"CE {solved['ce']}, without a teacher {alone['ce']}" in page
    head, alone = row("pretrained-192", "head at KL 0.01, KD 2"), row("pretrained-192", "lm_only")
    assert f"CE {head['ce']}, without a teacher {alone['ce']}" in page
    twice, once = row("pretrained-192", "true head, KD 2"), row("pretrained-192", "true_head")
    assert "2 was better than 0.7" in page
    assert twice["ce"] < once["ce"]
    assert f"up to {twice['rate'] / alone['rate']:.0f} times" in page
    worth = (documents.ROOT / "bench/results/worth.md").read_text().splitlines()
    warm, cool = (
        next(line.split("|")[5].split("±")[0].strip() for line in worth if line.startswith(f"| {recipe} | 259,588"))
        for recipe in ("svd_blocks learning_rate=3e-4", "svd_blocks learning_rate=3e-4 temperature=1")
    )
    assert f"**Temperature**: 2; at 1, one run reached {cool}, not {warm}" in page
    projectors = [row("fresh-192", recipe)["less"].replace("-", "−") for recipe in ("run4", "run5")]
    assert f"no better: {projectors[0]}, {projectors[1]}" in page


def test_products_of_a_step():
    """docs/performance.md: u = 2·N·V·H operations, counted in what the `torch` engine multiplies."""
    N, V, Hs, Ht = 24, 300, 16, 40
    labels = torch.randint(V, (N,))

    def counted(kind, **options):
        h_s, W = torch.randn(N, Hs, requires_grad=True), torch.randn(V, Hs, requires_grad=True)
        P = torch.randn(Hs, Ht, requires_grad=True)
        h_t, W_t = torch.randn(N, Ht), torch.randn(V, Ht)
        teacher = Projected(h_t, P) if kind == "projected" else Head(h_t, W_t)
        with products() as calls:
            fused_kd_loss(Head(h_s, W), teacher, labels, ce_weight=1.0, engine="torch", **options).backward()
        return sum(call.operations for call in calls)

    page = " ".join(documents.source("docs/performance.md").split())
    u = 2 * N * V * Hs
    assert [counted("projected", teacher_grad=how) // u for how in ("full", "projector", "none")] == [6, 5, 4]
    assert 'A projected teacher takes 6u, 5u with `teacher_grad="projector"`, 4u with `"none"`' in page
    assert counted("head") == 3 * u + 2 * N * V * Ht
    assert "a teacher with its own head takes 3u(Hs) + u(Ht)" in page


def test_budgets():
    page = " ".join(documents.source("docs/performance.md").split())
    assert planning.CPU_SCRATCH == planning.SLAB_SCRATCH == 128 << 20
    assert "one chunk of logits (128 MiB)" in page
    assert "a slab of gradients in place of the chunk | 128 MiB" in page
    assert f"below what {MIN_TOKENS} tokens need, `auto` takes `triton_tiled`" in page
    said = " ".join(fused_kd_loss.__doc__.split())
    most = 1.5 * planning.DEVICE_TOKENS
    assert f"elsewhere {planning.DEVICE_SCRATCH >> 20} MiB or {planning.DEVICE_TOKENS} to {most:.0f} tokens" in said


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_what_the_loss_says_it_gathers():
    from kdfast.kernels.online_softmax import SIDE, STATE, TERMS

    least, most = 4 * STATE.value, 4 * (STATE.value + 2 * SIDE.value)
    said = f"gather {least} to {most} bytes per token and process, {4 * TERMS.value} more unless the divergence is"
    assert said in " ".join(fused_kd_loss.__doc__.split())


def test_a_gkd_loss_in_our_trainer(tmp_path):
    """docs/peers.md's table of keys gives GKD's loss: a JSD alone, at τ = 1."""
    page = documents.source("docs/peers.md")
    assert '| `recipe="teacher_head"`, `beta` |' in page
    assert "`ce_weight=0.0`, `kd_weight=1.0`" in page
    assert "`temperature=1.0` for the loss" in page
    settings = {"recipe": "teacher_head", "beta": 0.5, "ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0}
    found = KDConfig(output_dir=str(tmp_path), use_cpu=True, **settings).resolved("teacher_head")
    assert found.make_divergence() == JSD(0.5)
    assert (found.kd_weight, found.ce_weight, found.temperature) == (1, 0, 1)
    assert (found.kd_until, found.anchor_weight, found.hidden_weight) == (1, 0, 0)


def test_sizes_of_the_fuzzer():
    """tests/fuzz/README.md says how many wrong values there are, and how they are spoiled."""
    page = documents.source("tests/fuzz/README.md")
    assert f"({len(interface.JUNK)} values" in page
    assert f"({len(interface.SPOILED)} ways" in page


def test_the_nearest_gaussian():
    """docs/choosing.md: who covers both modes of docs/divergences.png, and who takes one."""
    x, means = torch.linspace(-8, 8, 81, dtype=torch.float64), torch.linspace(-4, 4, 41, dtype=torch.float64)
    widths = torch.logspace(-0.5, 0.8, 30, dtype=torch.float64)

    def gaussian(mean, width):
        return (-0.5 * ((x - mean) / width) ** 2).log_softmax(-1)

    modes = [math.log(weight) + gaussian(mean, width) for weight, mean, width in ((0.6, -3, 0.8), (0.4, 3, 1.0))]
    log_p, log_q = torch.stack(modes).logsumexp(0), gaussian(means[:, None, None], widths[:, None])
    covering = set()
    for name, cls in DIVERGENCES.items():
        nearest = cls().pointwise(log_p, log_q).sum(-1).argmin()
        if widths[nearest % len(widths)] > 2:
            covering.add(name)
    assert covering == {"forward_kl", "skew_kl", "symmetric_kl", "jsd", "alpha_beta"}
    page = " ".join(documents.source("docs/choosing.md").split())
    assert "covers both modes under forward, skew and symmetric KL, and here JSD and α-β (not drawn)," in page
