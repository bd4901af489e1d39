"""Statistics kernel of the tiled engine: logits stay in registers, and only a few numbers per row are written.

    statistics   grid (row blocks, splits of V): each program walks its part of the vocabulary tile by tile and
                 updates the state of `kdfast.kernels.online_softmax`; partial states (splits, state, N)
    combine      merges the parts in order (no atomics: two runs are bit-equal) into row constants and statistics

Ids that the KD term leaves out are walked separately, for the terms at τ = 1 only. A divergence other than forward and
reverse KL needs both log-sum-exps first, so it runs both kernels twice: 2u more operations.

Operations: 2u(Hs) for a projected teacher, u(Hs) + u(Ht) for one with its own head, u(Hs) without. Read per tile:
(2·BLOCK_N + BLOCK_V)·H operands, mostly from L2; written: 15 numbers per row and split.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels import online_softmax as online
from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import TileConfig, splits_of, threads_of_row
from kdfast.kernels.launch import Heads, Term, matrix
from kdfast.kernels.math import added, over_threads
from kdfast.kernels.tiles import both_logits, lanes, masked, of_mask, parts, tile


@triton.jit(do_not_specialize=["N", "tiles_per_split", "begin"])
def statistics_kernel(
    operands, given, bits, tensors,  # `launch.Operands`, `Given`, `Matrix` (N, words) int32, `LossTensors`
    constants_ptr,  # (12, N): read in the second pass
    out_ptr,  # (splits, state, N)
    N, V, Hs, Ht, tiles_per_split, begin,  # covers ids from `begin` to V
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Write partial states of the ids that the mask leaves in the KD term or, if OUTSIDE, of the others."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = n < N
    loss = online.load_loss(tensors, parameter, second, n, inside, dtype, WANT.precise)
    labels = tl.where(loss.labels < V, loss.labels, -1)  # later ids are another launch's, but a last tile goes past V
    targets = loss.targets
    if operands.mask is not None:
        labels = tl.where(tl.load(operands.mask + labels, mask=labels >= 0, other=0) != OUTSIDE, labels, -1)
        targets = tl.where(targets < V, targets, -1)
        targets = tl.where(tl.load(operands.mask + targets, mask=targets >= 0, other=0) != OUTSIDE, targets, -1)
    loss = online.Loss(labels, targets, *loss[2:])
    scales = online.scales_of(scale_s, softcap_s, scale_t, softcap_t, dtype)
    zero = tl.zeros([BLOCK_N, LANES], dtype)
    student, teacher, pair = online.empty_state(zero, WANT.precise)
    total = online.empty_terms(zero)
    if SECOND:
        constants = online.RowConstants(*online.load_tensors(constants_ptr + n, N, inside, online.CONSTANTS))

    given_ptr, bits_ptr = given.logits, bits.pointer
    if given_ptr is not None:
        given_ptr += tl.load(given.offsets + n, mask=inside, other=0)[:, None]
    if bits_ptr is not None:
        bits_ptr += tl.minimum(n, N - 1).to(tl.int64) * bits.row

    first = begin + split * tiles_per_split * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, V), BLOCK_V):
        products_s, products_t = tile(
            operands, n, start + tl.arange(0, BLOCK_V), N, V, V, Hs, Ht, HEADS, dtype, BLOCK_N, BLOCK_V, BLOCK_H
        )
        parts_s, parts_t = parts(products_s, PARTS), parts(products_t, PARTS)
        for i in tl.static_range(PARTS):
            v = start + i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            z_s, _, z_t, _ = both_logits(parts_s[i], parts_t[i], operands, given_ptr, v, V, V, scales, HEADS, dtype)
            if SECOND or given_ptr is not None:  # noqa: SIM114
                z_s, z_t = masked(z_s, z_t, v, V)
            elif start + BLOCK_V > V:  # in the other cases a branch would cost registers
                z_s, z_t = masked(z_s, z_t, v, V)
            if operands.mask is not None:
                z_s, z_t = of_mask(z_s, z_t, operands.mask, v, V, OUTSIDE)
            z_s, z_t, v = lanes(z_s, LANES, VEC), lanes(z_t, LANES, VEC), lanes(v[None, :], LANES, VEC)
            if SECOND:
                total = online.update_terms(total, z_s, z_t, constants, loss, DIVERGENCE, WANT)
            else:
                m_s, m_t = student.m, teacher.m
                if DIVERGENCE.name == "sparse":
                    student, teacher = online.update_sparse(student, teacher, z_s, v, loss, bits_ptr, WANT)
                else:
                    student, teacher, pair = online.update(student, teacher, pair, z_s, z_t, loss, DIVERGENCE, WANT)
                student = online.at_tokens(student, m_s, z_s, v, loss.labels, WANT.ce, WANT.metrics)
                if WANT.teacher:
                    teacher = online.at_tokens(teacher, m_t, z_t, v, loss.targets, WANT.anchor, WANT.metrics)

    stride = N.to(tl.int64)
    out = out_ptr + n + split * stride * (online.TERMS if SECOND else online.STATE)
    if SECOND:
        online.store_tensors(out, stride, over_threads(total), inside)
        return
    student, teacher, pair = online.merge_threads(student, teacher, pair, loss, DIVERGENCE, WANT)
    if WANT.teacher or bits_ptr is not None:
        online.store_tensors(out, stride, student + teacher + pair, inside)
    else:
        online.store_tensors(out, stride, student, inside)


@triton.jit
def _load_side(pointers, stride, mask):
    m, S, S1, E, argmax, target = online.load_tensors(pointers, stride, mask, online.SIDE)
    return online.Side(m, S, S1, E, argmax.to(tl.int32), target)


@triton.jit
def _merge_sides(a, b, c, WANT: tl.constexpr):
    """Return the merged state and the moves of a and of b; in a tie the smaller id is the argmax."""
    m = tl.maximum(a.m, b.m)
    smaller = tl.minimum(a.argmax, b.argmax)
    argmax = tl.where(b.m > a.m, b.argmax, tl.where(a.m > b.m, a.argmax, smaller))
    a, move_a = online.rescale_side(a, m, c, True, WANT.metrics, WANT.precise)
    b, move_b = online.rescale_side(b, m, c, True, WANT.metrics, WANT.precise)
    return online.Side(m, a.S + b.S, a.S1 + b.S1, a.E + b.E, argmax, a.target + b.target), move_a, move_b


@triton.jit(
    do_not_specialize=["stride_parts", "stride_beyond", "stride_c", "stride_stats", "N", "splits", "splits_beyond"]
)
def combine_kernel(
    parts_ptr, stride_parts,  # (splits, state, N)
    beyond_ptr, stride_beyond,  # (splits_beyond, side, N): the student's over ids that the KD term leaves out, or None
    tensors, stride_c, parameter: "fp64",  # `launch.LossTensors`
    stats_ptr, stride_stats,  # (6, N)
    constants_ptr,  # (12, N): the rows' constants and decorrelation
    merged_ptr,  # (state, N) or None; if given, the merged state is written there and nothing else
    N, splits, splits_beyond,
    DIVERGENCE: tl.constexpr, WANT: tl.constexpr, CE_GRADIENT: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
    FURTHER: tl.constexpr,
):  # fmt: skip
    """Merge partial states into statistics and constants. FURTHER: beyond has both sides, the student's first."""
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    stride = N.to(tl.int64)
    parts_ptr += n
    loss = online.load_loss(tensors, parameter, 0.0, n, inside, dtype, WANT.precise)
    zero = tl.zeros([BLOCK], dtype)
    counts = tl.load(tensors.active + n, mask=inside, other=0) != 0
    ce = zero

    if SECOND:
        total = online.empty_terms(zero)
        for split in range(splits):
            p = parts_ptr + split * stride_parts.to(tl.int64)
            total = online.TermSums(*added(total, online.load_tensors(p, stride, inside, online.TERMS)))
        if merged_ptr is not None:
            online.store_tensors(merged_ptr + n, N, total, inside)
            return
        constants = online.RowConstants(*online.load_tensors(constants_ptr + n, N, inside, online.CONSTANTS))
        value, constants, dots = online.finalize_terms(total, constants, loss, DIVERGENCE, WANT)
        if CE_GRADIENT:
            ce = tl.load(stats_ptr + stride_stats + n, mask=inside, other=0)
    else:
        student, teacher, pair = online.empty_state(zero, WANT.precise)
        for split in range(splits):
            p = parts_ptr + split * stride_parts.to(tl.int64)
            other = _load_side(p, stride, inside)
            S_s, S_so = student.S, other.S
            student, move_s, move_so = _merge_sides(student, other, loss.c_s, WANT)
            if WANT.teacher:
                other = _load_side(p + online.SIDE * stride, stride, inside)
                S_t, S_to = teacher.S, other.S
                teacher, move_t, move_to = _merge_sides(teacher, other, loss.c_t, WANT)
                other = online.Pair(*online.load_tensors(p + 2 * online.SIDE * stride, stride, inside, online.PAIR))
                if DIVERGENCE.base != "":
                    a = online.rescale_pair(pair, S_s, S_t, move_s, move_t, DIVERGENCE, WANT)
                    b = online.rescale_pair(other, S_so, S_to, move_so, move_to, DIVERGENCE, WANT)
                    pair = online.Pair(*added(a, b))
        if merged_ptr is not None:
            online.store_tensors(merged_ptr + n, stride, student + teacher + pair, inside)
            return
        value, constants, dots = online.finalize(student, teacher, pair, loss, DIVERGENCE, WANT)
        if beyond_ptr is not None:
            beyond_s, beyond_t = student, teacher
            for split in range(splits_beyond):
                p = beyond_ptr + n + split * stride_beyond.to(tl.int64)
                beyond_s, _, _ = _merge_sides(beyond_s, _load_side(p, stride, inside), loss.c_s, WANT)
                if FURTHER:
                    other = _load_side(p + online.SIDE * stride, stride, inside)
                    beyond_t, _, _ = _merge_sides(beyond_t, other, loss.c_t, WANT)
            student, teacher, constants = online.whole_vocabulary(
                student, teacher, beyond_s, beyond_t, constants, FURTHER, WANT.precise
            )
        ce = online.store_statistics(stats_ptr + n, stride_stats, inside & counts, student, teacher, DIVERGENCE, WANT)

    if WANT.teacher:
        tl.store(stats_ptr + n, value, mask=inside & counts)
    decorrelation = zero
    if WANT.decorrelate:
        kd = tl.load(tensors.coefficients + n, mask=inside, other=0)
        of_ce = tl.load(tensors.coefficients + stride_c + n, mask=inside, other=0)
        ce = ce if CE_GRADIENT else zero
        decorrelation = online.decorrelation_of(dots, ce, kd, of_ce, loss.inv_tau, loss.inv_tau_t)
        decorrelation = tl.where(counts, decorrelation, 0)
    online.store_tensors(constants_ptr + n, N, constants, inside)
    tl.store(constants_ptr + online.CONSTANTS * stride + n, decorrelation, mask=inside)


COMBINE_BLOCK = 128


def statistics(
    heads: Heads, term: Term, *, stats: Tensor, constants: Tensor, decorrelate: bool, config: TileConfig | None = None
) -> None:
    """Fill stats (6, N) where computed, and constants (12, N): the `RowConstants` and the decorrelation."""
    if heads.hidden.shape[0] == 0:
        return
    out = {"stats": stats, "constants": constants, "decorrelate": decorrelate, "teacher": heads.teacher}

    def launch(config: TileConfig) -> None:
        shared, beyond = partial_states(heads, term, decorrelate=decorrelate, config=config)
        combine(term, shared, beyond, **out, further=heads.further)
        if heads.teacher and term.entry.base == "":
            sums, _ = partial_states(heads, term, decorrelate=decorrelate, config=config, constants=constants)
            combine(term, sums, None, **out, second=True)

    launch(config or config_of(heads, term, launch))


def config_of(heads: Heads, term: Term, launch: Callable[[TileConfig], Any]) -> TileConfig:
    """Return the configuration of the statistics kernel; launch(config) does its work."""
    kernel = "full" if heads.intricate or term.intricate else "lean"
    if heads.teacher_logits is not None or term.bits is not None:
        kernel = "given"
    return choose(kernel, heads.weight, heads.hidden.shape[0], launch, widths=heads.widths())


def partial_states(
    heads: Heads, term: Term, *, decorrelate: bool, config: TileConfig, constants: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return partial states (splits, state, N) of the KD term's ids, and those of the student's side, or of both sides,
    of the other ids (None if there are no others). constants (12, N): if given, this is the second pass, which returns
    only its terms."""
    shared = _partial_states(heads, term, constants, config, decorrelate, 0, heads.kd_vocab)
    if not heads.truncated or constants is not None:
        return shared, None
    rest, begin = rest_of(term, heads), heads.kd_vocab if heads.mask is None else 0
    seen = heads if heads.further else heads.student_alone()
    return shared, _partial_states(seen, rest, None, config, decorrelate, begin, heads.vocab, outside=True)


def rest_of(term: Term, heads: Heads) -> Term:
    """Return the loss for ids that the KD term leaves out."""
    if heads.further:
        return replace(term, divergence="total_variation", bits=None)  # its first pass has both sides and no pair
    return replace(term, divergence="sparse", targets=None, bits=None)


def _partial_states(
    heads: Heads, term: Term, constants: Tensor | None, config: TileConfig, decorrelate: bool, begin: int, end: int,
    outside: bool = False,
) -> Tensor:  # fmt: skip
    """Return partial states of the ids from `begin` to `end`; with a mask, those in it or, if `outside`, the others."""
    N, second = heads.hidden.shape[0], constants is not None
    row_blocks, tiles = triton.cdiv(N, config.block_n), max(1, triton.cdiv(end - begin, config.block_v))
    splits = splits_of(row_blocks, tiles, heads.hidden.device)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    partial = term.coefficients.new_empty(splits, online.TERMS.value if second else online.STATE.value, N)
    tensors = term.tensors()._replace(labels=None, targets=None) if second else term.tensors()
    columns = config.block_v // config.parts
    lanes, vec = (1, 2) if term.precise else threads_of_row(partial.device, columns)  # merging lanes rounds once more
    lanes = min(lanes, columns // vec)
    statistics_kernel[(row_blocks, splits)](
        heads.operands(), heads.given(), matrix(term.bits), tensors, constants, partial,
        N, end, *heads.widths(), per_split, begin, *heads.scalars(), term.parameter, term.second,
        HEADS=heads.flags(config), DIVERGENCE=term.entry, WANT=term.statistics_flags(heads.teacher, decorrelate),
        SECOND=second, OUTSIDE=outside, LANES=lanes, VEC=vec, PARTS=config.parts, **config.blocks(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial


def combine(
    term: Term, parts: Tensor, beyond: Tensor | None, *, stats: Tensor, constants: Tensor, decorrelate: bool,
    teacher: bool, second: bool = False, merged: Tensor | None = None, further: bool = False,
) -> None:  # fmt: skip
    """Merge partial states, of this process's splits or of all processes, in order; fill stats (6, N) and constants
    (12, N).

    parts (splits, state, N), beyond (splits, ≥ side, N): with contiguous rows; teacher: there are two sides of logits;
    merged (state, N): if given, only the merged state is written, there; further: beyond has both sides."""
    N = constants.shape[1]
    assert parts.stride()[1:] == (N, 1)
    assert beyond is None or beyond.stride()[1:] == (N, 1)
    rest = (None, 0) if beyond is None else (beyond, beyond.stride(0))
    combine_kernel[(triton.cdiv(N, COMBINE_BLOCK),)](
        parts, parts.stride(0), *rest, term.tensors(), term.coefficients.stride(0), term.parameter,
        stats, stats.stride(0), constants, merged,
        N, parts.shape[0], 0 if beyond is None else beyond.shape[0],
        DIVERGENCE=term.entry, WANT=term.statistics_flags(teacher or term.bits is not None, decorrelate),
        CE_GRADIENT=term.ce_gradient, SECOND=second, BLOCK=COMBINE_BLOCK, FURTHER=further, num_warps=4,
    )  # fmt: skip
