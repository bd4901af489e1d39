"""Draws docs/divergences.png: what each divergence rewards, what its gradient looks like, what τ does to it.

    pip install '.[train]'            # matplotlib
    python docs/plot_divergences.py

Everything is computed from `kdfast.divergences` in float64, in seconds; the same picture comes out every time.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdfast import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, SymmetricKL, TotalVariation

# Okabe and Ito's colours, which colour-blind readers can tell apart
STYLES: dict[Divergence, tuple[str, str, str]] = {
    ForwardKL(): ("forward KL", "#0072B2", "-"),
    SkewKL(): ("skew KL, α = 0.1", "#56B4E9", "--"),
    SymmetricKL(): ("symmetric KL", "#000000", "-"),
    JSD(): ("JSD, β = 0.5", "#009E73", "-"),
    SkewReverseKL(): ("skew reverse KL, α = 0.1", "#E69F00", "--"),
    ReverseKL(): ("reverse KL", "#D55E00", "-"),
    TotalVariation(): ("total variation", "#CC79A7", "-"),
}
TEACHER = "#BBBBBB"
TITLE = 9.5


def value(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    return divergence.pointwise(log_p, log_q).sum(-1)


def gradient(divergence: Divergence, z_t: Tensor, z_s: Tensor, tau: float = 1.0) -> Tensor:
    """∂D/∂z_s (*, V)."""
    z_s = z_s.clone().requires_grad_()
    value(divergence, (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1)).sum().backward()
    assert z_s.grad is not None
    return z_s.grad


def normal(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Logits of a Gaussian on the grid."""
    return -0.5 * ((x - mean) / sigma) ** 2


def best_students(panels: list[Axes]) -> None:
    """A teacher with two modes and, for each divergence, the nearest Gaussian, by search over means and widths."""
    x = torch.linspace(-8, 8, 161, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    modes = [(0.6, -3.0, 0.8), (0.4, 3.0, 1.0)]  # weight, mean, width
    log_p = torch.stack(
        [torch.log(one * w) + normal(x, one * mean, one * sigma).log_softmax(-1) for w, mean, sigma in modes]
    ).logsumexp(0)
    means = torch.linspace(-4, 4, 161, dtype=torch.float64)
    sigmas = torch.logspace(-0.5, 0.8, 100, dtype=torch.float64)
    log_q = normal(x, means[:, None, None], sigmas[:, None]).log_softmax(-1).flatten(0, 1)
    for axes, (divergence, (label, colour, _)) in zip(panels, STYLES.items(), strict=False):
        values = value(divergence, log_p, log_q)
        best = int(values.argmin())
        axes.fill_between(x, log_p.exp(), color=TEACHER, linewidth=0)
        axes.plot(x, log_q[best].exp(), color=colour, linewidth=2)
        axes.set_title(label, fontsize=TITLE, color=colour)
        axes.text(0.97, 0.93, f"D = {values[best]:.2f}", transform=axes.transAxes, ha="right", va="top", fontsize=8)
        print(f"{label:26} mean {means[best // 100]:5.2f}  width {sigmas[best % 100]:.2f}  D {values[best]:.3f}")


def gradients_by_offset(axes: Axes) -> None:
    """One id of teacher probability 0.2, the others in the teacher's proportions: then they act as one entry."""
    offset = torch.linspace(-8, 8, 801, dtype=torch.float64)  # 0 is the middle one: total variation's tie
    right = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    z_s = right + torch.stack([offset, torch.zeros_like(offset)], -1)
    for divergence, (label, colour, style) in STYLES.items():
        axes.plot(offset, gradient(divergence, right, z_s)[:, 0], style, color=colour, label=label, linewidth=1.6)
    axes.set_title("gradient towards one id's logit, where the teacher gives it 0.2", fontsize=TITLE)
    axes.set_xlabel("student's logit above the right one")
    axes.set_ylabel("∂D/∂z, τ = 1")
    axes.axhline(0, color="#888888", linewidth=0.6)


def gradients_by_temperature(axes: Axes) -> None:
    """Norm of the gradient over forward KL's, rows of random logits that a student follows at some distance."""
    generator = torch.Generator().manual_seed(0)
    z_t = 3 * torch.randn(64, 1000, dtype=torch.float64, generator=generator)
    z_s = z_t + torch.randn(64, 1000, dtype=torch.float64, generator=generator)
    taus = torch.logspace(-0.3, 1.5, 37, dtype=torch.float64)

    def sizes(divergence: Divergence) -> Tensor:
        return torch.stack([gradient(divergence, z_t, z_s, float(tau)).norm(dim=-1).mean() for tau in taus])

    unit = sizes(ForwardKL())
    for divergence, (label, colour, style) in STYLES.items():
        axes.loglog(taus, sizes(divergence) / unit, style, color=colour, label=label, linewidth=1.6)
    axes.set_title("size of the logits' gradient over forward KL's", fontsize=TITLE)
    axes.set_xlabel("temperature τ")
    axes.set_ylabel("ratio of norms")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], labels=["0.5", "1", "2", "5", "10", "20"])
    axes.set_yticks([0.25, 0.5, 0.81, 1, 2, 5, 10], labels=["0.25", "0.5", "0.81", "1", "2", "5", "10"])
    axes.minorticks_off()


def main() -> None:
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    top.suptitle("the nearest Gaussian student (line) to a teacher with two modes (grey)", fontsize=11)
    panels = list(top.subplots(2, 4, sharex=True, sharey=True).flat)
    best_students(panels)
    left, right = bottom.subplots(1, 2)
    gradients_by_offset(left)
    gradients_by_temperature(right)
    for axes in (*panels, left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    panels[3].tick_params(labelbottom=True)  # nothing stands below it
    for axes in panels[4:7]:
        axes.set_xlabel("id")
    for axes in panels[::4]:
        axes.set_ylabel("probability")
    panels[7].set_axis_off()
    panels[7].legend(*left.get_legend_handles_labels(), loc="lower center", frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_name("divergences.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
