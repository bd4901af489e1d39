r"""Statistics of a row pair's logits, folded block by block: what the row kernel and the tiled kernels share.

z_s, z_t are the student's and the teacher's logits of R rows; a block is [R, BLOCK]. Shifted by the running maximum m,
x = (z − m)/τ and e = exp(x). Of each side:

    m, S = Σ e, and at τ = 1: S1 = Σ exp(z − m), E = Σ exp(z − m)·(z − m), the first argmax, the target's logit

A KL divergence needs no second pass. With b the side its expectation is under and o the other, u = x_b − x_o,
w = e_o − e_b (by expm1 where u is small):

    G = Σ e_b·u,  D = Σ w      KL = G/S_b + log1p(D/S_b)

2e-5 in float32 at KL 4e-4, where Σ p·(log p − log q) and differences of log-sum-exps lose 2e-3 and more. Where the gap
is large log1p(D/S_b) is taken as log S_o − log S_b. Every other divergence takes a second pass, `fold_terms`, which
knows both log-sum-exps.

`MIX`: engines that round gradients to 16 bits make each row's G_t orthogonal to its G_s first,
mix = −⟨G_t, G_s⟩/⟨G_s, G_s⟩ (docs/log.md: dW is 3–9% off near convergence otherwise). Any mix gives the same dW and dX
in exact arithmetic, so the dot products may be rough: the softcaps' slopes are left out, and of the cross entropy's
gradient only its norm is counted. For a KL they come from sums over the same pass, B = p_b·(g − KL) and O = p_o − p_b
being the two sides' gradients:

    S2 = Σ e_b², P = Σ e_b·w, U = Σ e_b²·u, R = Σ e_b·u·w, Q = Σ w² (o the student) or Σ e_b²·u² (b the student)

When a maximum moves, sums are rescaled: with r = exp of each maximum's move, Δ = move_b − move_o, ρ = r_o − r_b,
e_b → r_b·e_b, u → u + Δ, w → r_o·w + ρ·e_b.
"""

import triton
import triton.language as tl

from kdfast.kernels.divergences import terms
from kdfast.kernels.math import difference, log1p, tanh, weighted
from kdfast.kernels.reductions import sum2, sum3, sum7

# Below any logit, yet finite: differences of two such maxima are 0, not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)
SIDE: tl.constexpr = tl.constexpr(6)  # tensors in a side's state
PAIR: tl.constexpr = tl.constexpr(7)  # in a pair's
TERMS: tl.constexpr = tl.constexpr(10)  # in the second pass's
ROWS: tl.constexpr = tl.constexpr(9)  # in the rows' constants, what a gradient needs to know of each row


@triton.jit
def transform(z, scale, softcap, SOFTCAP: tl.constexpr):
    """softcap·tanh(scale·z/softcap) and its derivative towards z."""
    z = z * scale
    slope = tl.zeros_like(z) + scale
    if SOFTCAP:
        t, flat = tanh(z / softcap)
        z = softcap * t
        slope = flat * scale
    return z, slope


@triton.jit
def empty_side(zero):
    """zero: [R]."""
    return (zero + LOWEST, zero, zero, zero, zero.to(tl.int32), zero)


@triton.jit
def empty_pair(zero):
    return (zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def rescale_side(side, m, inv_tau, AT_ONE: tl.constexpr):
    """The state as if its maximum had been `m` ([R], no smaller), the move (old − new)/τ and its exponential."""
    old, S, S1, E, best, target = side
    move = (old - m) * inv_tau
    r = tl.exp(move)
    if AT_ONE:
        r1 = tl.exp(old - m)
        E = r1 * (E + (old - m) * S1)
        S1 = r1 * S1
    return (m, r * S, S1, E, best, target), move, r


@triton.jit
def rescale_pair(pair, S_b, move_b, move_o, r_b, r_o, MIX: tl.constexpr):
    """S_b: the base's Σ e before the move."""
    G, D, S2, P, Q, U, R = pair
    delta = move_b - move_o
    rho = difference(r_b, r_o, delta)
    if MIX == "s":  # Q = Σ e_b²·u²
        Q = r_b * r_b * (Q + delta * (2 * U + delta * S2))
    elif MIX != "":
        Q = r_o * r_o * Q + rho * (2 * r_o * P + rho * S2)
    if MIX != "":
        R = r_b * (r_o * (R + delta * P) + rho * (U + delta * S2))
        P = r_b * (r_o * P + rho * S2)
        U = r_b * r_b * (U + delta * S2)
        S2 = r_b * r_b * S2
    D = r_o * D + rho * S_b
    G = r_b * (G + delta * S_b)
    return (G, D, S2, P, Q, U, R)


@triton.jit
def fold_side(
    side, z, v, targets, inv_tau, AT_ONE: tl.constexpr, ENTROPY: tl.constexpr, TARGET: tl.constexpr
):
    """Fold a block in. z [R, BLOCK], −inf where there is no entry; v [1, BLOCK] ids; targets [R] ids.

    Returns the state, x and e of the block, and the move and its exponential for `fold_pair`."""
    block = tl.max(z, axis=1)
    m = tl.maximum(side[0], block)
    if ENTROPY:
        first = tl.min(tl.where(z == block[:, None], v, 2147483647), axis=1)
        best = tl.where(block > side[0], first, side[4])
    else:
        best = side[4]
    side, move, r = rescale_side(side, m, inv_tau, AT_ONE)
    _, S, S1, E, _, target = side
    y = z - m[:, None]
    x = y * inv_tau
    e = tl.exp(x)
    if ENTROPY:
        e1 = tl.exp(y)
        more, more1, more_E = sum3(e, e1, weighted(e1, y))
        S1 += more1
        E += more_E
    elif AT_ONE:
        more, more1 = sum2(e, tl.exp(y))
        S1 += more1
    else:
        more = tl.sum(e, axis=1)
    S += more
    if TARGET:
        target += tl.sum(tl.where(v == targets[:, None], z, 0), axis=1)
    return (m, S, S1, E, best, target), x, e, move, r


@triton.jit
def fold_pair(pair, S_b, x_b, x_o, e_b, e_o, move_b, move_o, r_b, r_o, MIX: tl.constexpr):
    """Fold a block in; S_b is the base's Σ e before the block. MIX: "", or the base's side, "t" or "s"."""
    G, D, S2, P, Q, U, R = rescale_pair(pair, S_b, move_b, move_o, r_b, r_o, MIX)
    u = x_b - x_o
    w = difference(e_b, e_o, u)
    eu = weighted(e_b, u)
    if MIX != "":
        other = eu if MIX == "s" else w
        more = sum7(eu, w, e_b * e_b, e_b * w, other * other, e_b * eu, eu * w)
        return (G + more[0], D + more[1], S2 + more[2], P + more[3], Q + more[4], U + more[5], R + more[6])
    else:
        more_G, more_D = sum2(eu, w)
        return (G + more_G, D + more_D, S2, P, Q, U, R)


@triton.jit
def fold(
    student, teacher, pair, z_s, z_t, v, labels, targets, inv_tau,
    TEACHER: tl.constexpr, BASE: tl.constexpr, MIX: tl.constexpr, CE: tl.constexpr, ANCHOR: tl.constexpr,
    METRICS: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """The first pass over a block of both sides. BASE: the divergence's `Entry.base`; TARGETS: look for the targets'
    logits (a caller that has the logits in memory need not)."""
    S_s, S_t = student[1], teacher[1]
    student, x_s, e_s, move_s, r_s = fold_side(student, z_s, v, labels, inv_tau, CE or METRICS, METRICS, CE and TARGETS)
    if TEACHER:
        teacher, x_t, e_t, move_t, r_t = fold_side(
            teacher, z_t, v, targets, inv_tau, ANCHOR or METRICS, METRICS, ANCHOR and TARGETS
        )
        if BASE == "t":
            pair = fold_pair(pair, S_t, x_t, x_s, e_t, e_s, move_t, move_s, r_t, r_s, "t" if MIX else "")
        elif BASE == "s":
            pair = fold_pair(pair, S_s, x_s, x_t, e_s, e_t, move_s, move_t, r_s, r_t, "s" if MIX else "")
    return student, teacher, pair


@triton.jit
def fold_sparse(
    student, bucket, z, v, labels, inv_tau, bits_ptr, inside, CE: tl.constexpr, METRICS: tl.constexpr,
    TARGETS: tl.constexpr,
):  # fmt: skip
    """As `fold` for a teacher that is given by a few entries a row: the student's side and, where bits_ptr [R, 1] is
    given, in the teacher's place the student's without the entries whose bits are set. inside [R, 1]."""
    student, _, _, _, _ = fold_side(student, z, v, labels, inv_tau, CE or METRICS, METRICS, CE and TARGETS)
    if bits_ptr is not None:
        word = tl.load(bits_ptr + v // 32, mask=inside & (z > -float("inf")), other=0)
        rest = tl.where(((word >> (v % 32)) & 1) == 0, z, -float("inf"))
        bucket, _, _, _, _ = fold_side(bucket, rest, v, labels, inv_tau, False, False, False)
    return student, bucket


@triton.jit
def whole_vocabulary(student, beyond, rows):
    """The student's side and the rows' constants where entries beyond the shared ones have been folded into `beyond`:
    a cross entropy and an entropy see them, the KD term and the argmax do not."""
    m, S1 = beyond[0], beyond[2]
    n_s = tl.log(S1) + (m - rows[0])
    rows = (rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], n_s, rows[8])
    return (m, student[1], S1, beyond[3], student[4], beyond[5]), rows


@triton.jit
def store_rows(pointers, stride, rows, mask):
    """The rows' constants, [R] each, one below the other."""
    for i in tl.static_range(len(rows)):
        tl.store(pointers + i * stride, rows[i], mask=mask)


@triton.jit
def load_rows(pointers, stride, mask):
    return (
        tl.load(pointers, mask=mask, other=0),
        tl.load(pointers + stride, mask=mask, other=0),
        tl.load(pointers + 2 * stride, mask=mask, other=0),
        tl.load(pointers + 3 * stride, mask=mask, other=0),
        tl.load(pointers + 4 * stride, mask=mask, other=0),
        tl.load(pointers + 5 * stride, mask=mask, other=0),
        tl.load(pointers + 6 * stride, mask=mask, other=0),
        tl.load(pointers + 7 * stride, mask=mask, other=0),
        tl.load(pointers + 8 * stride, mask=mask, other=0),
    )


@triton.jit
def finish(student, teacher, pair, BASE: tl.constexpr, MIX: tl.constexpr, TEACHER: tl.constexpr):
    """After the first pass: the divergence of a KL (else 0), the rows' constants, and ⟨G_t, G_s⟩ and ⟨G_s, G_s⟩ of the
    KD term over (coefficient/τ)². All [R]; the constants are

    (m_s, log S_s, m_t, log S_t, log S_t − log S_s, Σ a_p, Σ a_q, log S1_s, log S1_t)
    """
    m_s, S_s, S1_s = student[0], student[1], student[2]
    m_t, S_t, S1_t = teacher[0], teacher[1], teacher[2]
    zero = tl.zeros_like(m_s)
    ls_s, ls_t = tl.log(S_s), zero
    gap, value, A_p, A_q, dot, square = zero, zero, zero, zero, zero, zero
    if TEACHER:
        ls_t = tl.log(S_t)
        gap = ls_t - ls_s
    if TEACHER and BASE != "":
        S_b = S_t if BASE == "t" else S_s
        S_o = S_s if BASE == "t" else S_t
        G, D, S2, P, Q, U, R = pair
        d = D / S_b
        rise = tl.where(tl.abs(d) < 0.5, log1p(d), tl.log(S_o) - tl.log(S_b))  # log S_o − log S_b
        value = G / S_b + rise
        if BASE == "t":
            gap = -rise
            A_p = value
        else:
            gap = rise
            A_q = value
        if MIX:
            c = rise - value
            ratio = S_o / S_b
            scale = 1 / (S_b * S_b)
            dot = scale / ratio * (R - d * U + c * (P - d * S2))
            if BASE == "t":
                square = scale / (ratio * ratio) * (Q + d * (d * S2 - 2 * P))
            else:
                square = scale * (Q + c * (2 * U + c * S2))
    return value, (m_s, ls_s, m_t, ls_t, gap, A_p, A_q, tl.log(S1_s), tl.log(S1_t)), (dot, square)


@triton.jit
def fold_terms(
    sums, z_s, z_t, rows, inv_tau, parameter, DIVERGENCE: tl.constexpr, CENTRED_P: tl.constexpr,
    CENTRED_Q: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """The second pass over a block: Σf, Σa_p, Σa_q and, for `mix`, the products of a_p, a_q, p and q."""
    F, A_p, A_q, ss, sy, yy, ts, ty, us, uy = sums
    p, q, g = probabilities(z_s, z_t, rows, inv_tau)
    f, a_p, a_q = terms(DIVERGENCE, p, q, g, parameter)
    F += tl.sum(f, axis=1)
    if not CENTRED_P:
        A_p += tl.sum(a_p, axis=1)
    if not CENTRED_Q:
        A_q += tl.sum(a_q, axis=1)
    if MIX:
        ss += tl.sum(a_q * a_q, axis=1)
        ts += tl.sum(a_p * a_q, axis=1)
        if not CENTRED_Q:
            sy += tl.sum(a_q * q, axis=1)
            yy += tl.sum(q * q, axis=1)
            ty += tl.sum(a_p * q, axis=1)
        if not CENTRED_P:
            us += tl.sum(p * a_q, axis=1)
            if not CENTRED_Q:
                uy += tl.sum(p * q, axis=1)
    return (F, A_p, A_q, ss, sy, yy, ts, ty, us, uy)


@triton.jit
def finish_terms(sums, rows):
    """As `finish`, with what only the second pass knows."""
    F, A_p, A_q, ss, sy, yy, ts, ty, us, uy = sums
    m_s, ls_s, m_t, ls_t, gap, _, _, n_s, n_t = rows
    dot = ts - A_q * ty - A_p * us + A_p * A_q * uy
    square = ss + A_q * (A_q * yy - 2 * sy)
    # a row whose logits are NaN has NaN in `gap`, though its terms may have summed to something
    return F + 0 * gap, (m_s, ls_s, m_t, ls_t, gap, A_p, A_q, n_s, n_t), (dot, square)


@triton.jit
def mix_of(products, ce, coefficients, inv_tau):
    """mix = −⟨G_t, G_s⟩/⟨G_s, G_s⟩ of the rows; ce [R] their cross entropy where its gradient is part of G_s, else 0.

    The cross entropy's gradient, softmax − onehot, has a norm between 1 and √2 times 1 − exp(−ce)."""
    dot, square = products
    c_kd, c_ce, _ = coefficients
    k = c_kd * inv_tau
    wrong = c_ce * (1 - tl.exp(-ce))
    mix = -k * k * dot / (k * k * square + 1.5 * wrong * wrong)
    return tl.where(tl.abs(mix) < 1e4, mix, 0)  # 0 for NaN too


@triton.jit
def probabilities(z_s, z_t, rows, inv_tau):
    """(p, q, g = log p − log q) of a block at τ. g is NaN where neither side has any mass."""
    m_s, ls_s, m_t, ls_t, gap, _, _, _, _ = rows
    x_s = (z_s - m_s[:, None]) * inv_tau
    x_t = (z_t - m_t[:, None]) * inv_tau
    return tl.exp(x_t - ls_t[:, None]), tl.exp(x_s - ls_s[:, None]), (x_t - x_s) - gap[:, None]


@triton.jit
def cross_entropy(side):
    """−log softmax at τ = 1 of the target's logit; [R]."""
    m, _, S1, _, _, target = side
    return tl.log(S1) - (target - m)


@triton.jit
def entropy(side):
    _, _, S1, E, _, _ = side
    return tl.log(S1) - E / S1


@triton.jit
def store_statistics(
    stats_ptr, stride, mask, student, teacher,
    TEACHER: tl.constexpr, SPARSE: tl.constexpr, CE: tl.constexpr, ANCHOR: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """Write what two sides' states say, rows 1 to 5 of stats (the divergence, row 0, is the caller's); returns the
    cross entropy [R], 0 where it is not wanted. stats_ptr [R]. SPARSE: the student's argmax, for the agreement."""
    ce = tl.zeros_like(student[0])
    if CE:
        ce = cross_entropy(student)
        tl.store(stats_ptr + stride, ce, mask=mask)
    if ANCHOR:
        tl.store(stats_ptr + 2 * stride, cross_entropy(teacher), mask=mask)
    if METRICS:
        tl.store(stats_ptr + 3 * stride, entropy(student), mask=mask)
        if SPARSE:
            tl.store(stats_ptr + 5 * stride, student[4].to(ce.dtype), mask=mask)
        elif TEACHER:
            tl.store(stats_ptr + 4 * stride, entropy(teacher), mask=mask)
            tl.store(stats_ptr + 5 * stride, (student[4] == teacher[4]).to(ce.dtype), mask=mask)
    return ce
