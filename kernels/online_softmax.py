r"""Statistics of a row pair's logits, updated block by block, for the row kernel and the tiled kernels.

z_s, z_t are the student's and the teacher's logits of R rows. A block is [R, J, LANES, VEC], in which each thread has
its own lane, and a row's state is [R, LANES]: threads wait for each other only in `merge_threads`, once per row. With
c = log₂e/τ and the running maximum m, x = z·c − m·c and e = 2^x. Each side (`Side`) has

    m, S = Σ e, and at τ = 1: S1 = Σ e1, E = Σ e1·x1, the first argmax, the target's logit

A KL divergence needs no second pass. With b the side of its expectation, o the other, u = (x_b − x_o)·ln 2 and
φ(u) = u + e^−u − 1, both sides together (`Pair`) have

    F = Σ e_b·φ(u),  G = Σ e_b·u      KL = F/S_b + log1p(d) − d,  d = (F − G)/S_b = (S_o − S_b)/S_b

Every summand of F is non-negative and of second order, and d, of first order, has its own digits: the error in float32
at KL 4e-4 is 3e-6, where Σ p·(log p − log q) and differences of log-sum-exps lose 2e-3 and more. Far apart, where d has
no digits, KL = G/S_b + log S_o − log S_b. Every other divergence takes a second pass, `update_terms`, with both
log-sum-exps known (`TermSums`). The numbers per row that gradients need are `RowConstants`.

PRECISE is for gradients stored in float32 or float64: then c is 1/τ, x = (z − m)·c is 0 at the maximum itself, and
e = exp(x), so that the gradient of a token with all the mass is minus that of the others. For gradients in 16 bits x is
one fused multiply-add with m·c rounded. That shifts all logits of a side by the rounding (`shift`), which changes no
probability and no divergence.

`decorrelate`: engines that round gradients to 16 bits first make each row's G_t nearly orthogonal to its G_s, by adding
decorrelation·G_s (docs/log.md: dW is 3–9% off near convergence otherwise). Any factor gives the same dW and dX in exact
arithmetic. For a KL it is −⟨G_t, G_s⟩/⟨G_s, G_s⟩ in the metric 1/p_b, in which one more sum gives the products: the
variance of u under p_b, from V = Σ e_b·u², or near p ≈ q twice the divergence, which both equal there. With a second
pass it is ⟨G_t, G_t⟩/⟨G_s, G_s⟩, each in the metric of its own side, at most 1.

When a maximum moves, sums are rescaled: with r = exp of each maximum's move and Δ = move_b − move_o, e_b → r_b·e_b and
u → u + Δ; Σ e_o is S_b + F − G.
"""

from collections import namedtuple

import triton
import triton.language as tl

from kdfast.kernels.divergences import factors, in_log2, terms
from kdfast.kernels.math import (
    LN2,
    LOG2E,
    NEAR,
    along,
    curve,
    log1p,
    log1p_less,
    over_threads,
    tanh,
    thread_max,
    thread_sum,
)

# Below any logit, yet finite: differences of two such maxima are 0, not NaN. Maxima that are rounded (not PRECISE) are
# at least HARDLY, since rounding the maximum of logits masked by −1e10 would be off by hundreds.
LOWEST: tl.constexpr = tl.constexpr(-1e30)
HARDLY: tl.constexpr = tl.constexpr(-1e8)


# Fields are [R, LANES] during a pass over the vocabulary, and [R] after it.
Side = namedtuple("Side", "m S S1 E argmax target")  # argmax int32; target: the target's logit
Pair = namedtuple("Pair", "F G V")
# Σ f and Σ a. To decorrelate, v = Σ a²/p of either side (symmetric KL: Σ p·g², α-β: Σ a_p·g, in v_p). If PRECISE,
# instead of v Σ a without an entry that has most of the probability, and the sum of the other probabilities, for `D`
TermSums = namedtuple("TermSums", "f a_p a_q v_p v_q p_rest q_rest")
# numbers per row that gradients need: gap = log S_t − log S_s; A = Σ a, or Σ p_b·u for a KL; D: the gradient at an
# entry with most of the mass, where a − softmax·A cancels, minus the sum of the others; NaN = not known
RowConstants = namedtuple("RowConstants", "m_s log_S_s m_t log_S_t gap A_p A_q log_S1_s log_S1_t D_p D_q")
Dots = namedtuple("Dots", "ts ss")  # ⟨G_t, G_s⟩ and ⟨G_s, G_s⟩ of the KD term, divided by (coefficient/τ)²
Move = namedtuple("Move", "by r")  # of a maximum: (old − new)·c, and 2 to that power
Block = namedtuple("Block", "x e move")  # one side's, in log2, and the move [R, LANES] of its maximum
# the loss of a program's rows: ids [R] of the cross entropy and the anchor; 1/τ and log₂e/τ, (), of both sides
Loss = namedtuple("Loss", "labels targets inv_tau inv_tau_t c_s c_t parameter second series")
Scales = namedtuple("Scales", "scale_s softcap_s scale_t softcap_t")

# number of tensors in each, which lie in memory one after the other
SIDE: tl.constexpr = tl.constexpr(len(Side._fields))
PAIR: tl.constexpr = tl.constexpr(len(Pair._fields))
STATE: tl.constexpr = tl.constexpr(2 * len(Side._fields) + len(Pair._fields))  # student, teacher, pair
TERMS: tl.constexpr = tl.constexpr(len(TermSums._fields))
CONSTANTS: tl.constexpr = tl.constexpr(len(RowConstants._fields))


@triton.jit
def power(x, PRECISE: tl.constexpr):
    """Return e^x if PRECISE, else 2^x."""
    return tl.exp(x) if PRECISE else tl.exp2(x)


@triton.jit
def scales_of(scale_s, softcap_s, scale_t, softcap_t, dtype: tl.constexpr):
    """Return the `Scales` in `dtype`."""
    return Scales(
        tl.full([], scale_s, dtype), tl.full([], softcap_s, dtype),
        tl.full([], scale_t, dtype), tl.full([], softcap_t, dtype),
    )  # fmt: skip


@triton.jit
def load_loss(tensors, parameter, second, n, inside, dtype: tl.constexpr, PRECISE: tl.constexpr):
    """Return the `Loss` of the rows n [R], from `launch.LossTensors`."""
    labels, targets = n, n
    if tensors.labels is not None:
        labels = tl.load(tensors.labels + n, mask=inside, other=0).to(tl.int32)
    if tensors.targets is not None:
        targets = tl.load(tensors.targets + n, mask=inside, other=0).to(tl.int32)
    inv_tau, inv_tau_t = 1 / tl.load(tensors.tau), 1 / tl.load(tensors.teacher_tau)
    parameter, second = tl.full([], parameter, dtype), tl.full([], second, dtype)
    ONE: tl.constexpr = 1.0 if PRECISE else LOG2E
    return Loss(labels, targets, inv_tau, inv_tau_t, inv_tau * ONE, inv_tau_t * ONE, parameter, second, tensors.series)


@triton.jit
def transform(z, scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return softcap·tanh(scale·z/softcap) and its derivative with respect to z."""
    slope = tl.full([], 1.0, z.dtype)
    if SCALED:
        z = z * scale
        slope = scale
    if SOFTCAP:
        t, flat = tanh(z / softcap)
        z = softcap * t
        slope = flat * slope
    return z, slope


@triton.jit
def empty_side(zero, PRECISE: tl.constexpr):
    """Return the statistics of no logits; zero [R, LANES]."""
    return Side(zero + (LOWEST if PRECISE else HARDLY), zero, zero, zero, zero.to(tl.int32), zero)


@triton.jit
def empty_state(zero, PRECISE: tl.constexpr):
    """Return the student's and the teacher's `Side` and their `Pair` for no logits."""
    return empty_side(zero, PRECISE), empty_side(zero, PRECISE), Pair(zero, zero, zero)


@triton.jit
def empty_terms(zero):
    return TermSums(zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def scaled(m, c):
    """Return m·c rounded, as a product that no compiler fuses with a later subtraction."""
    return tl.fma(m, c, 0.0)


@triton.jit
def exponent(z, m, c, PRECISE: tl.constexpr):
    """Return (z − m)·c of a block; m [R] or [R, LANES]."""
    if PRECISE:
        return (z - along(m, z)) * c
    else:
        return tl.fma(z, c, along(-scaled(m, c), z))


@triton.jit
def shift(m, c, PRECISE: tl.constexpr):
    """Return `exponent` at the maximum itself: 0, or the rounding of m·c."""
    return tl.zeros_like(m) if PRECISE else tl.fma(m, c, -scaled(m, c))


@triton.jit
def log_sum(S, m, c, PRECISE: tl.constexpr):
    """Return log Σ exp((z − m)/τ) [R], which is at least 0, from S = Σ 2^exponent."""
    log_S = tl.log(S) - LN2 * shift(m, c, PRECISE)
    return tl.where((log_S < 0) & (S > 0.5), 0, log_S)


@triton.jit
def move_of(m, to, c, PRECISE: tl.constexpr):
    """Return the `Move` of a maximum from m to `to`, which is at least m."""
    by = (m - to) * c if PRECISE else scaled(m, c) - scaled(to, c)
    return Move(by, power(by, PRECISE))


@triton.jit
def rescale_side(side, m, c, AT_ONE: tl.constexpr, ENTROPY: tl.constexpr, PRECISE: tl.constexpr):
    """Return the state as if its maximum had been `m`, which is at least as large, and the move there."""
    move = move_of(side.m, m, c, PRECISE)
    S1, E = side.S1, side.E
    if AT_ONE:
        one = move_of(side.m, m, 1.0 if PRECISE else LOG2E, PRECISE)
        if ENTROPY:
            E = one.r * (E + one.by * S1)
        S1 = one.r * S1
    return Side(m, move.r * side.S, S1, E, side.argmax, side.target), move


@triton.jit
def rescale_pair(pair, S_s, S_t, move_s, move_t, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the state as if the maxima had moved so; S_s, S_t: the sides' before the move."""
    base, other = (move_t, move_s) if DIVERGENCE.base == "t" else (move_s, move_t)
    S_b, S_o = (S_t, S_s) if DIVERGENCE.base == "t" else (S_s, S_t)
    r_b, r_o, delta = base.r, other.r, base.by - other.by
    u = delta * LOG2E if WANT.precise else delta
    delta = delta if WANT.precise else delta * LN2
    phi, near, here = u * (u * curve(u)), tl.abs(u) < NEAR, r_b > 0  # sums without mass left may have been infinite
    V = pair.V
    if WANT.decorrelate:
        V = r_b * (V + delta * (2 * pair.G + delta * S_b))
    G = tl.where(here, r_b * (pair.G + delta * S_b), 0)
    of_o = tl.where(near, r_b * (phi - delta) * (pair.F - pair.G), (r_o - r_b) * S_o)
    F = tl.where(here, r_b * (pair.F + tl.where(near, phi, delta) * S_b) + of_o, r_o * S_o)
    return Pair(F, G, V)


@triton.jit
def update_side(side, z, c, AT_ONE: tl.constexpr, ENTROPY: tl.constexpr, PRECISE: tl.constexpr):
    """Return the state with a block added, and the `Block`. z: −inf where there is no entry. The caller updates argmax
    and target."""
    m = tl.maximum(side.m, thread_max(z))
    side, move = rescale_side(side, m, c, AT_ONE, ENTROPY, PRECISE)
    S1, E = side.S1, side.E
    x = exponent(z, m, c, PRECISE)
    e = power(x, PRECISE)
    if AT_ONE:
        x1 = exponent(z, m, 1.0 if PRECISE else LOG2E, PRECISE)
        e1 = power(x1, PRECISE)
        S1 += thread_sum(e1)
        if ENTROPY:
            E += thread_sum(e1 * tl.maximum(x1, -1e4))  # 2^−1e4 is 0, and 0·∞ must be 0
    return Side(m, side.S + thread_sum(e), S1, E, side.argmax, side.target), Block(x, e, move)


@triton.jit
def update_pair(pair, S_s, S_t, block_s, block_t, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the state with both sides' `Block`s added; S_s, S_t: the sides' before that."""
    pair = rescale_pair(pair, S_s, S_t, block_s.move, block_t.move, DIVERGENCE, WANT)
    base, other = (block_t, block_s) if DIVERGENCE.base == "t" else (block_s, block_t)
    NAT: tl.constexpr = 1.0 if WANT.precise else LN2  # in the exponents' units
    u = base.x - other.x
    near = tl.abs(u) < NEAR * LN2 / NAT
    u = tl.where(base.e == 0, 0, u)
    eu = base.e * u
    log2 = u * LOG2E if WANT.precise else u
    second_order = (base.e * log2 if WANT.precise else eu) * (log2 * curve(log2))
    F = pair.F + thread_sum(tl.where(near, second_order, (other.e - base.e) + eu * NAT))
    V = pair.V
    if WANT.decorrelate:
        V += thread_sum(eu * u) * (NAT * NAT)
    return Pair(F, pair.G + thread_sum(eu) * NAT, V)


@triton.jit
def update(student, teacher, pair, z_s, z_t, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the states with a block of both sides added, in the first pass."""
    S_s, S_t = student.S, teacher.S
    student, block_s = update_side(student, z_s, loss.c_s, WANT.ce or WANT.metrics, WANT.metrics, WANT.precise)
    if WANT.teacher:
        at_one: tl.constexpr = WANT.anchor or WANT.metrics
        teacher, block_t = update_side(teacher, z_t, loss.c_t, at_one, WANT.metrics, WANT.precise)
        if DIVERGENCE.base != "":
            pair = update_pair(pair, S_s, S_t, block_s, block_t, DIVERGENCE, WANT)
    return student, teacher, pair


@triton.jit
def with_argmax(side, argmax):
    return Side(side.m, side.S, side.S1, side.E, argmax, side.target)


@triton.jit
def with_target(side, target):
    return Side(side.m, side.S, side.S1, side.E, side.argmax, target)


@triton.jit
def at_tokens(side, m, z, v, targets, TARGET: tl.constexpr, ARGMAX: tl.constexpr):
    """Return the state with the target's logit and the argmax updated by a block of new tokens; m: the maximum before
    that block."""
    argmax, target = side.argmax, side.target
    if ARGMAX:
        first = tl.where(z == along(side.m, z), v, 2147483647)
        argmax = tl.where(side.m > m, tl.min(tl.min(first, axis=3), axis=1), argmax)
    if TARGET:
        target += thread_sum(tl.where(v == along(targets, z), z, 0))
    return Side(side.m, side.S, side.S1, side.E, argmax, target)


@triton.jit
def update_sparse(student, bucket, z, v, loss, bits_ptr, WANT: tl.constexpr):
    """Return the states with a block added, for a sparse teacher: the student's side and, if bits_ptr (one per row) is
    given, in the teacher's place the student's without the entries whose bits are set."""
    student, _ = update_side(student, z, loss.c_s, WANT.ce or WANT.metrics, WANT.metrics, WANT.precise)
    if bits_ptr is not None:
        word = tl.load(along(bits_ptr, z) + v // 32, mask=z > -float("inf"), other=0)
        rest = tl.where(((word >> (v % 32)) & 1) == 0, z, -float("inf"))
        bucket, _ = update_side(bucket, rest, loss.c_s, False, False, WANT.precise)
    return student, bucket


@triton.jit
def merge_side(side, c, AT_ONE: tl.constexpr, ENTROPY: tl.constexpr, PRECISE: tl.constexpr):
    """Return the state of all threads [R], and each thread's `Move` there. The argmax is the first of the maximum."""
    m = tl.max(side.m, axis=1)
    first = tl.min(tl.where(side.m == m[:, None], side.argmax, 2147483647), axis=1)
    side, move = rescale_side(side, tl.zeros_like(side.m) + m[:, None], c, AT_ONE, ENTROPY, PRECISE)
    S, S1, E, target = over_threads((side.S, side.S1, side.E, side.target))
    return Side(m, S, S1, E, first, target), move


@triton.jit
def merge_threads(student, teacher, pair, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the states of all threads, [R] each."""
    S_s, S_t = student.S, teacher.S
    at_one: tl.constexpr = WANT.anchor or WANT.metrics
    student, move_s = merge_side(student, loss.c_s, WANT.ce or WANT.metrics, WANT.metrics, WANT.precise)
    teacher, move_t = merge_side(teacher, loss.c_t, at_one, WANT.metrics, WANT.precise)
    if WANT.teacher and DIVERGENCE.base != "":
        pair = rescale_pair(pair, S_s, S_t, move_s, move_t, DIVERGENCE, WANT)
    return student, teacher, Pair(*over_threads(pair))


@triton.jit
def finalize(student, teacher, pair, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the results of the first pass: a KL's value (else 0) [R], the `RowConstants` and the `Dots`."""
    zero = tl.zeros_like(student.m)
    log_S_s, log_S_t = log_sum(student.S, student.m, loss.c_s, WANT.precise), zero
    gap, value, A_p, A_q, dot, square = zero, zero, zero, zero, zero, zero
    if WANT.teacher:
        log_S_t = log_sum(teacher.S, teacher.m, loss.c_t, WANT.precise)
        gap = tl.log(teacher.S) - tl.log(student.S)
    if WANT.teacher and DIVERGENCE.base != "":
        S_b = teacher.S if DIVERGENCE.base == "t" else student.S
        mean, d = pair.G / S_b, (pair.F - pair.G) / S_b
        near = tl.abs(d) < 0.5
        apart = -gap if DIVERGENCE.base == "t" else gap
        rise = tl.where(near, log1p(d), apart)  # log S_o − log S_b
        value = tl.where(near, pair.F / S_b + log1p_less(d), mean + apart)
        if DIVERGENCE.base == "t":
            gap, A_p = -rise, mean
        else:
            gap, A_q = rise, mean
        if WANT.decorrelate:
            variance = pair.V / S_b - mean * mean
            dot = -tl.minimum(variance, 2 * value)
            square = 2 * value if DIVERGENCE.base == "t" else variance
    ONE: tl.constexpr = 1.0 if WANT.precise else LOG2E
    log_S1_s = log_sum(student.S1, student.m, ONE, WANT.precise)
    log_S1_t = log_sum(teacher.S1, teacher.m, ONE, WANT.precise)
    constants = RowConstants(student.m, log_S_s, teacher.m, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, zero, zero)
    return value, constants, Dots(dot, square)


@triton.jit
def whole_vocabulary(
    student, teacher, beyond_s, beyond_t, constants, FURTHER: tl.constexpr, PRECISE: tl.constexpr
):  # fmt: skip
    """Return both sides and the constants, given sides `beyond` that include ids which the KD term leaves out: cross
    entropy and entropy cover these, KD term and argmax do not. FURTHER: the teacher's too."""
    ONE: tl.constexpr = 1.0 if PRECISE else LOG2E
    m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, D_p, D_q = constants
    log_S1_s = log_sum(beyond_s.S1, beyond_s.m, ONE, PRECISE) + (beyond_s.m - m_s)
    student = Side(beyond_s.m, student.S, beyond_s.S1, beyond_s.E, student.argmax, beyond_s.target)
    if FURTHER:
        log_S1_t = log_sum(beyond_t.S1, beyond_t.m, ONE, PRECISE) + (beyond_t.m - m_t)
        teacher = Side(beyond_t.m, teacher.S, beyond_t.S1, beyond_t.E, teacher.argmax, beyond_t.target)
    constants = RowConstants(m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, D_p, D_q)
    return student, teacher, constants


@triton.jit
def update_terms(total, z_s, z_t, constants, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the `TermSums` with a block added, in the second pass."""
    if DIVERGENCE.in_log2 and not WANT.precise:
        x_p, x_q = log2_probabilities(z_s, z_t, constants, loss)
        p, q, f, a_p, a_q = in_log2(DIVERGENCE, x_p, x_q, loss.series, loss.parameter)
        if DIVERGENCE.name == "symmetric_kl":
            u = tl.where(p > 0, x_p - x_q, 0)
            more = (f, a_p, a_q, p * u * u)
        else:
            by_p, by_q = p * a_p, q * a_q
            more = (f, by_p, by_q, by_p * a_p, by_q * a_q)
    else:
        p, q, g, log_p, log_q = probabilities(z_s, z_t, constants, loss, WANT.precise)
        f, a_p, a_q = terms(DIVERGENCE.name, p, q, g, log_p, log_q, loss.parameter, loss.second)
        if WANT.precise:
            most_q, most_p = q > 0.5, p > 0.5
            more = (f, a_p, a_q, tl.where(most_p, 0, a_p), tl.where(most_q, 0, a_q))
            more += (tl.where(most_p, 0, p), tl.where(most_q, 0, q))
        else:
            more = (f, a_p, a_q, tl.where(a_p == 0, 0, a_p * g))
    out = (total[0] + thread_sum(more[0]),)
    for i in tl.static_range(1, len(total)):
        out += (total[i] + thread_sum(more[i]) if i < len(more) else total[i],)
    return TermSums(*out)


@triton.jit
def finalize_terms(total, constants, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the same results as `finalize`, completed by the second pass."""
    f, A_p, A_q, v_p, v_q, p_rest, q_rest = total
    dot, square, D_p, D_q = tl.zeros_like(f), tl.zeros_like(f), float("nan") + f, float("nan") + f
    if WANT.precise:
        D_p, D_q = A_p * p_rest - v_p, A_q * q_rest - v_q
    else:
        v, square = v_p, 2 * f
        if DIVERGENCE.in_log2:
            of_f, of_p, of_q = factors(DIVERGENCE.name, loss.parameter)
            _, sum_s = normalizer(constants.m_s, constants.log_S_s, loss.c_s)
            _, sum_t = normalizer(constants.m_t, constants.log_S_t, loss.c_t)
            f, A_p, A_q = f * of_f, A_p * of_p / sum_t, A_q * of_q / sum_s
            v, square = v_p * of_p * of_p - A_p * A_p, v_q * of_q * of_q - A_q * A_q
            if DIVERGENCE.name == "symmetric_kl":
                mean = A_p / (1 - loss.parameter)
                v, square = v_p * (LN2 * LN2) - mean * mean, 2 * f
        dot = -tl.minimum(v, square)
    # `gap` is NaN if the row's logits are, even if its terms summed to a number
    m_s, log_S_s, m_t, log_S_t, gap, _, _, log_S1_s, log_S1_t, _, _ = constants
    nan = 0 * gap
    A_p, A_q = A_p + nan, A_q + nan
    constants = RowConstants(m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, D_p, D_q)
    return f + nan, constants, Dots(dot, square)


@triton.jit
def decorrelation_of(dots, ce, kd_coefficient, ce_coefficient, inv_tau, inv_tau_t):
    """Return −⟨G_t, G_s⟩/⟨G_s, G_s⟩ of the rows [R]. ce [R]: their cross entropy if its gradient is part of G_s, else
    0; the square of that gradient, Σ (q − onehot)²/q, is exp(ce) − 1."""
    k = kd_coefficient * inv_tau
    of_ce = ce_coefficient * ce_coefficient * (tl.exp(tl.minimum(ce, 80)) - 1)
    factor = -k * kd_coefficient * inv_tau_t * dots.ts / (k * k * dots.ss + of_ce)
    return tl.where(tl.abs(factor) < 1e4, factor, 0)  # 0 for NaN too


@triton.jit
def probabilities(z_s, z_t, constants, loss, PRECISE: tl.constexpr):
    """Return p, q, g = log p − log q, log p and log q of a block at τ. g is NaN where neither side has any mass."""
    x_s = exponent(z_s, constants.m_s, loss.c_s, PRECISE)
    x_t = exponent(z_t, constants.m_t, loss.c_t, PRECISE)
    NAT: tl.constexpr = 1.0 if PRECISE else LN2
    log_S_s = constants.log_S_s / NAT + shift(constants.m_s, loss.c_s, PRECISE)
    log_S_t = constants.log_S_t / NAT + shift(constants.m_t, loss.c_t, PRECISE)
    log_p, log_q = x_t - along(log_S_t, z_s), x_s - along(log_S_s, z_s)
    g = (x_t - x_s) * NAT - along(constants.gap, z_s)
    return power(log_p, PRECISE), power(log_q, PRECISE), g, log_p * NAT, log_q * NAT


@triton.jit
def normalizer(m, log_S, c):
    """Return log2 Σ 2^(z·c), rounded, and the sum of the probabilities computed with it, [R] each."""
    M, log2_S = scaled(m, c), log_S * LOG2E + shift(m, c, False)
    L = M + log2_S
    return L, tl.exp2((M - L) + log2_S)


@triton.jit
def log2_probabilities(z_s, z_t, constants, loss):
    """Return log2 p and log2 q of a block, rounded once each."""
    L_s, _ = normalizer(constants.m_s, constants.log_S_s, loss.c_s)
    L_t, _ = normalizer(constants.m_t, constants.log_S_t, loss.c_t)
    return tl.fma(z_t, loss.c_t, along(-L_t, z_t)), tl.fma(z_s, loss.c_s, along(-L_s, z_s))


@triton.jit
def store_tensors(pointers, stride, tensors, mask):
    """Write the tensors of a tuple, [R] each, one after the other."""
    for i in tl.static_range(len(tensors)):
        tl.store(pointers + i * stride.to(tl.int64), tensors[i], mask=mask)


@triton.jit
def load_tensors(pointers, stride, mask, COUNT: tl.constexpr):
    """Return a tuple of COUNT tensors that `store_tensors` wrote."""
    out = (tl.load(pointers, mask=mask, other=0),)
    for i in tl.static_range(1, COUNT):
        out += (tl.load(pointers + i * stride.to(tl.int64), mask=mask, other=0),)
    return out


@triton.jit
def store_statistics(stats_ptr, stride, mask, student, teacher, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Write rows 1 to 5 of stats from two sides' states (the caller writes row 0, the divergence), and return the cross
    entropy [R], 0 if not computed. stats_ptr [R]. With a sparse teacher row 5, the agreement, is the student's argmax.
    """
    ce, stride = tl.zeros_like(student.m), stride.to(tl.int64)
    ONE: tl.constexpr = 1.0 if WANT.precise else LOG2E
    if WANT.ce:
        ce = log_sum(student.S1, student.m, ONE, WANT.precise) - (student.target - student.m)
        tl.store(stats_ptr + stride, ce, mask=mask)
    if WANT.anchor:
        anchor = log_sum(teacher.S1, teacher.m, ONE, WANT.precise) - (teacher.target - teacher.m)
        tl.store(stats_ptr + 2 * stride, anchor, mask=mask)
    if WANT.metrics:
        tl.store(stats_ptr + 3 * stride, tl.log(student.S1) - student.E / student.S1 / ONE, mask=mask)
        if DIVERGENCE.name == "sparse":
            tl.store(stats_ptr + 5 * stride, student.argmax.to(ce.dtype), mask=mask)
        elif WANT.teacher:
            tl.store(stats_ptr + 4 * stride, tl.log(teacher.S1) - teacher.E / teacher.S1 / ONE, mask=mask)
            tl.store(stats_ptr + 5 * stride, (student.argmax == teacher.argmax).to(ce.dtype), mask=mask)
    return ce
