r"""Statistics of a row pair's logits, updated block by block: what the row kernel and the tiled kernels share.

z_s, z_t are the student's and the teacher's logits of R rows; a block is [R, BLOCK]. Shifted by the running maximum m,
x = (z − m)/τ and e = exp(x). Of each side (`Side`):

    m, S = Σ e, and at τ = 1: S1 = Σ exp(z − m), E = Σ exp(z − m)·(z − m), the first argmax, the target's logit

A KL divergence needs no second pass. With b the side its expectation is under and o the other, u = x_b − x_o,
w = e_o − e_b (by expm1 where u is small), of both sides (`Pair`):

    G = Σ e_b·u,  D = Σ w      KL = G/S_b + log1p(D/S_b)

2e-5 in float32 at KL 4e-4, where Σ p·(log p − log q) and differences of log-sum-exps lose 2e-3 and more. Where the gap
is large log1p(D/S_b) is taken as log S_o − log S_b. Every other divergence takes a second pass, `update_terms`, which
knows both log-sum-exps (`TermSums`). What a gradient needs to know of each row are its `RowConstants`.

`decorrelate`: engines that round gradients to 16 bits make each row's G_t orthogonal to its G_s first, by adding
decorrelation·G_s, decorrelation = −⟨G_t, G_s⟩/⟨G_s, G_s⟩ (docs/log.md: dW is 3–9% off near convergence otherwise). Any
factor gives the same dW and dX in exact arithmetic, so the dot products may be rough: the softcaps' slopes are left
out, and of the cross entropy's gradient only its norm is counted. For a KL they come from sums over the same pass,
B = p_b·(g − KL) and O = p_o − p_b being the two sides' gradients:

    S2 = Σ e_b², P = Σ e_b·w, U = Σ e_b²·u, R = Σ e_b·u·w, Q = Σ w² (o the student) or Σ e_b²·u² (b the student)

When a maximum moves, sums are rescaled: with r = exp of each maximum's move, Δ = move_b − move_o, ρ = r_o − r_b,
e_b → r_b·e_b, u → u + Δ, w → r_o·w + ρ·e_b.
"""

from collections import namedtuple

import triton
import triton.language as tl

from kdfast.kernels.divergences import terms
from kdfast.kernels.math import added, difference, log1p, sums, tanh, weighted

# Below any logit, yet finite: differences of two such maxima are 0, not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


# What follows is [R] each.
Side = namedtuple("Side", "m S S1 E argmax target")  # argmax int32; target: the target's logit
Pair = namedtuple("Pair", "G D S2 P Q U R")
# Σ f, Σ a_q, Σ a_p and, to decorrelate, sums of products: aq_q = Σ a_q·q, …; otherwise, in the place of those beside
# Σ a of either side, Σ a and Σ of its probabilities without an entry that has most of them, for `D`
TermSums = namedtuple("TermSums", "f a_q aq_aq aq_q a_p q_q ap_aq ap_q p_aq p_q")
# what a gradient needs to know of a row; gap = log S_t − log S_s, A = Σ a, D what an entry with most of the mass gets,
# where a − softmax·A cancels: less the sum of the others; NaN = not known, of gradients that are decorrelated
RowConstants = namedtuple("RowConstants", "m_s log_S_s m_t log_S_t gap A_p A_q log_S1_s log_S1_t D_p D_q")
Dots = namedtuple("Dots", "ts ss")  # ⟨G_t, G_s⟩ and ⟨G_s, G_s⟩ of the KD term over (coefficient/τ)²
Move = namedtuple("Move", "by r")  # of a maximum: (old − new)/τ, and its exponential

Block = namedtuple("Block", "x e move")  # one side's, [R, BLOCK]; the move [R] of its maximum
# what the loss asks of a program's rows: ids [R] of the cross entropy and the anchor; 1/τ of both sides (); [1, 1]
Loss = namedtuple("Loss", "labels targets inv_tau inv_tau_t parameter second")
Scales = namedtuple("Scales", "scale_s softcap_s scale_t softcap_t")  # [1, 1]

# tensors in each, as they lie in memory one below the other
SIDE: tl.constexpr = tl.constexpr(len(Side._fields))
PAIR: tl.constexpr = tl.constexpr(len(Pair._fields))
STATE: tl.constexpr = tl.constexpr(2 * len(Side._fields) + len(Pair._fields))  # student, teacher, pair
TERMS: tl.constexpr = tl.constexpr(len(TermSums._fields))
CONSTANTS: tl.constexpr = tl.constexpr(len(RowConstants._fields))


@triton.jit
def scales_of(scale_s, softcap_s, scale_t, softcap_t, dtype: tl.constexpr):
    """Return `Scales` in that dtype."""
    return Scales(
        tl.full([1, 1], scale_s, dtype), tl.full([1, 1], softcap_s, dtype),
        tl.full([1, 1], scale_t, dtype), tl.full([1, 1], softcap_t, dtype),
    )  # fmt: skip


@triton.jit
def load_loss(tensors, parameter, second, n, inside, dtype: tl.constexpr):
    """Return what the loss asks of the rows n [R], from `launch.LossTensors`."""
    labels, targets = n, n
    if tensors.labels is not None:
        labels = tl.load(tensors.labels + n, mask=inside, other=0).to(tl.int32)
    if tensors.targets is not None:
        targets = tl.load(tensors.targets + n, mask=inside, other=0).to(tl.int32)
    inv_tau, inv_tau_t = 1 / tl.load(tensors.temperature), 1 / tl.load(tensors.teacher_temperature)
    parameter, second = tl.full([1, 1], parameter, dtype), tl.full([1, 1], second, dtype)
    return Loss(labels, targets, inv_tau, inv_tau_t, parameter, second)


@triton.jit
def transform(z, scale, softcap, SOFTCAP: tl.constexpr):
    """Return softcap·tanh(scale·z/softcap) and its derivative towards z."""
    z = z * scale
    slope = tl.zeros_like(z) + scale
    if SOFTCAP:
        t, flat = tanh(z / softcap)
        z = softcap * t
        slope = flat * scale
    return z, slope


@triton.jit
def empty_side(zero):
    """Return the statistics of no logits; zero [R]."""
    return Side(zero + LOWEST, zero, zero, zero, zero.to(tl.int32), zero)


@triton.jit
def empty_pair(zero):
    return Pair(zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def empty_terms(zero):
    return TermSums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def rescale_side(side, m, inv_tau, AT_ONE: tl.constexpr):
    """Return the state as if its maximum had been `m` ([R], no smaller), and the move there."""
    by = (side.m - m) * inv_tau
    r = tl.exp(by)
    S1, E = side.S1, side.E
    if AT_ONE:
        r1 = tl.exp(side.m - m)
        E = r1 * (E + (side.m - m) * S1)
        S1 = r1 * S1
    return Side(m, r * side.S, S1, E, side.argmax, side.target), Move(by, r)


@triton.jit
def rescale_pair(pair, S_s, S_t, move_s, move_t, DIVERGENCE: tl.constexpr, DECORRELATE: tl.constexpr):
    """Return the state after the two sides' moves; S [R] is a side's before its move."""
    S_b, base, other = (S_t, move_t, move_s) if DIVERGENCE.base == "t" else (S_s, move_s, move_t)
    G, D, S2, P, Q, U, R = pair
    r_b, r_o = base.r, other.r
    delta = base.by - other.by
    rho = difference(r_b, r_o, delta)
    if DECORRELATE:
        if DIVERGENCE.base == "s":  # Q = Σ e_b²·u²
            Q = r_b * r_b * (Q + delta * (2 * U + delta * S2))
        else:
            Q = r_o * r_o * Q + rho * (2 * r_o * P + rho * S2)
        R = r_b * (r_o * (R + delta * P) + rho * (U + delta * S2))
        P = r_b * (r_o * P + rho * S2)
        U = r_b * r_b * (U + delta * S2)
        S2 = r_b * r_b * S2
    D = r_o * D + rho * S_b
    G = r_b * (G + delta * S_b)
    return Pair(G, D, S2, P, Q, U, R)


@triton.jit
def update_side(side, z, v, targets, inv_tau, AT_ONE: tl.constexpr, ENTROPY: tl.constexpr, TARGET: tl.constexpr):
    """Return the state with a block added, and the `Block`. z [R, BLOCK], −inf where there is no entry; v [1, BLOCK]
    ids; targets [R] ids."""
    highest = tl.max(z, axis=1)
    m = tl.maximum(side.m, highest)
    argmax = side.argmax
    if ENTROPY:
        first = tl.min(tl.where(z == highest[:, None], v, 2147483647), axis=1)
        argmax = tl.where(highest > side.m, first, argmax)
    side, move = rescale_side(side, m, inv_tau, AT_ONE)
    S1, E, target = side.S1, side.E, side.target
    y = z - m[:, None]
    x = y * inv_tau
    e = tl.exp(x)
    if ENTROPY:
        e1 = tl.exp(y)
        more, more1, more_E = sums((e, e1, weighted(e1, y)))
        S1 += more1
        E += more_E
    elif AT_ONE:
        more, more1 = sums((e, tl.exp(y)))
        S1 += more1
    else:
        more = tl.sum(e, axis=1)
    if TARGET:
        target += tl.sum(tl.where(v == targets[:, None], z, 0), axis=1)
    return Side(m, side.S + more, S1, E, argmax, target), Block(x, e, move)


@triton.jit
def update_pair(pair, S_s, S_t, block_s, block_t, DIVERGENCE: tl.constexpr, DECORRELATE: tl.constexpr):
    """Return the state with both sides' `Block`s added; S [R] is a side's before them."""
    pair = rescale_pair(pair, S_s, S_t, block_s.move, block_t.move, DIVERGENCE, DECORRELATE)
    base, other = (block_t, block_s) if DIVERGENCE.base == "t" else (block_s, block_t)
    u = base.x - other.x
    w = difference(base.e, other.e, u)
    eu = weighted(base.e, u)
    if DECORRELATE:
        of_student = eu if DIVERGENCE.base == "s" else w
        more = sums((eu, w, base.e * base.e, base.e * w, of_student * of_student, base.e * eu, eu * w))
    else:
        more = sums((eu, w))
    return Pair(*added(pair, more))


@triton.jit
def update(
    student, teacher, pair, z_s, z_t, v, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, TARGETS: tl.constexpr
):
    """Return the states with a block of both sides added: the first pass. TARGETS: look for the targets' logits (a
    caller that has the logits in memory need not)."""
    S_s, S_t = student.S, teacher.S
    student, block_s = update_side(
        student, z_s, v, loss.labels, loss.inv_tau, WANT.ce or WANT.metrics, WANT.metrics, WANT.ce and TARGETS
    )
    if WANT.teacher:
        at_one: tl.constexpr = WANT.anchor or WANT.metrics
        teacher, block_t = update_side(
            teacher, z_t, v, loss.targets, loss.inv_tau_t, at_one, WANT.metrics, WANT.anchor and TARGETS
        )
        if DIVERGENCE.base != "":
            pair = update_pair(pair, S_s, S_t, block_s, block_t, DIVERGENCE, WANT.decorrelate)
    return student, teacher, pair


@triton.jit
def update_sparse(student, bucket, z, v, loss, bits_ptr, inside, WANT: tl.constexpr, TARGETS: tl.constexpr):
    """As `update` for a teacher that is given by a few entries a row: the student's side and, where bits_ptr [R, 1] is
    given, in the teacher's place the student's without the entries whose bits are set. inside [R, 1]."""
    student, _ = update_side(
        student, z, v, loss.labels, loss.inv_tau, WANT.ce or WANT.metrics, WANT.metrics, WANT.ce and TARGETS
    )
    if bits_ptr is not None:
        word = tl.load(bits_ptr + v // 32, mask=inside & (z > -float("inf")), other=0)
        rest = tl.where(((word >> (v % 32)) & 1) == 0, z, -float("inf"))
        bucket, _ = update_side(bucket, rest, v, loss.labels, loss.inv_tau, False, False, False)
    return student, bucket


@triton.jit
def finalize(student, teacher, pair, DIVERGENCE: tl.constexpr, TEACHER: tl.constexpr, DECORRELATE: tl.constexpr):
    """Return what the first pass knows: the divergence of a KL (else 0) [R], the `RowConstants` and the `Dots`."""
    zero = tl.zeros_like(student.m)
    log_S_s, log_S_t = tl.log(student.S), zero
    gap, value, A_p, A_q, dot, square = zero, zero, zero, zero, zero, zero
    if TEACHER:
        log_S_t = tl.log(teacher.S)
        gap = log_S_t - log_S_s
    if TEACHER and DIVERGENCE.base != "":
        S_b = teacher.S if DIVERGENCE.base == "t" else student.S
        S_o = student.S if DIVERGENCE.base == "t" else teacher.S
        d = pair.D / S_b
        rise = tl.where(tl.abs(d) < 0.5, log1p(d), tl.log(S_o) - tl.log(S_b))  # log S_o − log S_b
        value = pair.G / S_b + rise
        if DIVERGENCE.base == "t":
            gap, A_p = -rise, value
        else:
            gap, A_q = rise, value
        if DECORRELATE:
            c = rise - value
            ratio = S_o / S_b
            scale = 1 / (S_b * S_b)
            dot = scale / ratio * (pair.R - d * pair.U + c * (pair.P - d * pair.S2))
            if DIVERGENCE.base == "t":
                square = scale / (ratio * ratio) * (pair.Q + d * (d * pair.S2 - 2 * pair.P))
            else:
                square = scale * (pair.Q + c * (2 * pair.U + c * pair.S2))
    log_S1_s, log_S1_t = tl.log(student.S1), tl.log(teacher.S1)
    constants = RowConstants(student.m, log_S_s, teacher.m, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, zero, zero)
    return value, constants, Dots(dot, square)


@triton.jit
def whole_vocabulary(student, beyond, constants):
    """Return the student's side and the constants where entries beyond the shared ones have been added to `beyond`: a
    cross entropy and an entropy see them, the KD term and the argmax do not."""
    log_S1_s = tl.log(beyond.S1) + (beyond.m - constants.m_s)
    m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, _, log_S1_t, D_p, D_q = constants
    constants = RowConstants(m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, D_p, D_q)
    return Side(beyond.m, student.S, beyond.S1, beyond.E, student.argmax, beyond.target), constants


@triton.jit
def update_terms(total, z_s, z_t, constants, loss, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Return the `TermSums` with a block added: the second pass."""
    NAME: tl.constexpr = DIVERGENCE.name
    p, q, g, log_p, log_q = probabilities(z_s, z_t, constants, loss)
    f, a_p, a_q = terms(NAME, p, q, g, log_p, log_q, loss.parameter, loss.second)
    if WANT.decorrelate:
        more = sums((f, a_q, a_q * a_q, a_q * q, a_p, q * q, a_p * a_q, a_p * q, p * a_q, p * q), False)
    else:
        more = sums((f, a_q)) + sums((tl.where(q > 0.5, 0, a_q), tl.where(q > 0.5, 0, q)))
        if WANT.teacher_gradient:
            more += sums((a_p, tl.where(p > 0.5, 0, a_p), tl.where(p > 0.5, 0, p)))
    return TermSums(*added(total, more))


@triton.jit
def finalize_terms(total, constants, DECORRELATE: tl.constexpr):
    """Return as `finalize` does, with what only the second pass knows."""
    f, A_q, aq_aq, aq_q, A_p, q_q, ap_aq, ap_q, p_aq, p_q = total
    dot, square, D_p, D_q = tl.zeros_like(f), tl.zeros_like(f), float("nan") + f, float("nan") + f
    if DECORRELATE:
        dot = ap_aq - A_q * ap_q - A_p * p_aq + A_p * A_q * p_q
        square = aq_aq + A_q * (A_q * q_q - 2 * aq_q)
    else:
        D_q, D_p = A_q * aq_q - aq_aq, A_p * ap_aq - q_q  # of the sums that stand in their place
    # a row whose logits are NaN has NaN in `gap`, though its terms may have summed to something
    m_s, log_S_s, m_t, log_S_t, gap, _, _, log_S1_s, log_S1_t, _, _ = constants
    constants = RowConstants(m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, log_S1_s, log_S1_t, D_p, D_q)
    return f + 0 * gap, constants, Dots(dot, square)


@triton.jit
def decorrelation_of(dots, ce, kd_coefficient, ce_coefficient, inv_tau, inv_tau_t):
    """Return −⟨G_t, G_s⟩/⟨G_s, G_s⟩ of the rows, [R]; ce [R]: their cross entropy where its gradient is part of G_s,
    else 0.

    The cross entropy's gradient, softmax − onehot, has a norm between 1 and √2 times 1 − exp(−ce)."""
    k = kd_coefficient * inv_tau
    wrong = ce_coefficient * (1 - tl.exp(-ce))
    factor = -k * kd_coefficient * inv_tau_t * dots.ts / (k * k * dots.ss + 1.5 * wrong * wrong)
    return tl.where(tl.abs(factor) < 1e4, factor, 0)  # 0 for NaN too


@triton.jit
def probabilities(z_s, z_t, constants, loss):
    """Return (p, q, g = log p − log q, log p, log q) of a block at τ. g is NaN where neither side has any mass."""
    x_s = (z_s - constants.m_s[:, None]) * loss.inv_tau
    x_t = (z_t - constants.m_t[:, None]) * loss.inv_tau_t
    log_p, log_q = x_t - constants.log_S_t[:, None], x_s - constants.log_S_s[:, None]
    return tl.exp(log_p), tl.exp(log_q), (x_t - x_s) - constants.gap[:, None], log_p, log_q


@triton.jit
def store_tensors(pointers, stride, tensors, mask):
    """Write the tensors of a NamedTuple, [R] each, one below the other."""
    for i in tl.static_range(len(tensors)):
        tl.store(pointers + i * stride.to(tl.int64), tensors[i], mask=mask)


@triton.jit
def load_tensors(pointers, stride, mask, COUNT: tl.constexpr):
    """Return COUNT tensors as `store_tensors` left them, as a tuple."""
    out = (tl.load(pointers, mask=mask, other=0),)
    for i in tl.static_range(1, COUNT):
        out += (tl.load(pointers + i * stride.to(tl.int64), mask=mask, other=0),)
    return out


@triton.jit
def store_statistics(stats_ptr, stride, mask, student, teacher, DIVERGENCE: tl.constexpr, WANT: tl.constexpr):
    """Write what two sides' states say, rows 1 to 5 of stats (the divergence, row 0, is the caller's), and return the
    cross entropy [R], 0 where it is not wanted. stats_ptr [R]. With a sparse teacher row 5, the agreement, is the
    student's argmax."""
    ce, stride = tl.zeros_like(student.m), stride.to(tl.int64)
    if WANT.ce:
        ce = tl.log(student.S1) - (student.target - student.m)
        tl.store(stats_ptr + stride, ce, mask=mask)
    if WANT.anchor:
        tl.store(stats_ptr + 2 * stride, tl.log(teacher.S1) - (teacher.target - teacher.m), mask=mask)
    if WANT.metrics:
        tl.store(stats_ptr + 3 * stride, tl.log(student.S1) - student.E / student.S1, mask=mask)
        if DIVERGENCE.name == "sparse":
            tl.store(stats_ptr + 5 * stride, student.argmax.to(ce.dtype), mask=mask)
        elif WANT.teacher:
            tl.store(stats_ptr + 4 * stride, tl.log(teacher.S1) - teacher.E / teacher.S1, mask=mask)
            tl.store(stats_ptr + 5 * stride, (student.argmax == teacher.argmax).to(ce.dtype), mask=mask)
    return ce
