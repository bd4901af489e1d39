"""Statistics kernel of the tiled engine: logits live in registers, a few numbers a row leave them.

    statistics   grid (row blocks, splits of V): each program walks its part of the vocabulary tile by tile and folds
                 the logits into the state of `kdfast.kernels.online_softmax`; partial states (splits, state, N)
    combine      merges the parts in order (no atomics: two runs are bit-equal) into row constants and statistics

Where the teacher's vocabulary ends before the student's, what lies beyond is walked on its own, for the student alone.

A divergence that is no KL needs both log-sum-exps first and takes both kernels twice: 2u more operations.

Operations: 2u(Hs) for a projected teacher, u(Hs) + u(Ht) for one with its own head, u(Hs) without. Read per tile:
(2·BLOCK_N + BLOCK_V)·H operands, from L2 mostly; written: 19 numbers a row and split.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import TileConfig, splits_of
from kdfast.kernels.launch import Heads, Term
from kdfast.kernels.online_softmax import (
    PAIR,
    ROWS,
    SIDE,
    TERMS,
    empty_pair,
    empty_side,
    finish,
    finish_terms,
    fold_sparse,
    fold_terms,
    load_rows,
    mix_of,
    rescale_pair,
    rescale_side,
    store_rows,
    store_statistics,
    whole_vocabulary,
)
from kdfast.kernels.online_softmax import (
    fold as fold_tile,
)
from kdfast.kernels.tiles import given_logits, logits, parts, tile


@triton.jit(do_not_specialize=["N", "tiles_per_split", "begin"])
def statistics_kernel(
    xs_ptr, stride_xsn, stride_xsh,  # (N, Hs)
    xt_ptr, stride_xtn, stride_xth,  # (N, Hs) or (N, Ht), or None
    w_ptr, stride_wv, stride_wh,  # (V, Hs)
    wt_ptr, stride_wtv, stride_wth,  # (V, Ht), or None
    bias_s_ptr, bias_t_ptr,  # (V,) or None
    given_ptr, offsets_ptr, STRIDE: tl.constexpr,  # dense teacher logits and their rows' offsets (N,), or None
    bits_ptr, stride_bits,  # (N, words) int32 or None: of a sparse teacher
    labels_ptr, targets_ptr,  # (N,) int64 or None
    temperature_ptr,  # ()
    rows_ptr,  # (10, N): read in the second pass
    out_ptr,  # (splits, state, N)
    N, V, Hs, Ht, tiles_per_split, begin,  # entries from `begin` to V
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64",
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, EVEN_S: tl.constexpr, EVEN_T: tl.constexpr,
    DIVERGENCE: tl.constexpr, BASE: tl.constexpr, CENTRED_P: tl.constexpr, CENTRED_Q: tl.constexpr,
    METRICS: tl.constexpr, MIX: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    TEACHER: tl.constexpr = (xt_ptr is not None) or (given_ptr is not None)
    SPARSE: tl.constexpr = DIVERGENCE == "sparse"
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = n < N
    labels = tl.load(labels_ptr + n, mask=inside, other=0).to(tl.int32) if labels_ptr is not None else n
    targets = tl.load(targets_ptr + n, mask=inside, other=0).to(tl.int32) if targets_ptr is not None else n
    labels = tl.where(labels < V, labels, -1)  # another launch's; a tile past V has a column of its number
    inv_tau = 1 / tl.load(temperature_ptr)
    scale_s = tl.full([1, 1], scale_s, dtype)
    scale_t = tl.full([1, 1], scale_t, dtype)
    softcap_s = tl.full([1, 1], softcap_s, dtype)
    softcap_t = tl.full([1, 1], softcap_t, dtype)
    parameter = tl.full([1, 1], parameter, dtype)
    zero = tl.zeros([BLOCK_N], dtype)
    student, teacher, pair = empty_side(zero), empty_side(zero), empty_pair(zero)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    if SECOND:
        rows = load_rows(rows_ptr + n, N, inside)

    if given_ptr is not None:
        given_ptr += tl.load(offsets_ptr + n, mask=inside, other=0)[:, None]
    if bits_ptr is not None:
        bits_ptr += n.to(tl.int64)[:, None] * stride_bits

    first = begin + split * tiles_per_split * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, V), BLOCK_V):
        products_s, products_t = tile(
            xs_ptr, stride_xsn, stride_xsh, xt_ptr, stride_xtn, stride_xth,
            w_ptr, stride_wv, stride_wh, wt_ptr, stride_wtv, stride_wth,
            n, start + tl.arange(0, BLOCK_V), N, V, V, Hs, Ht,
            dtype, EVEN_S, EVEN_T, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        parts_s, parts_t = parts(products_s, PARTS), parts(products_t, PARTS)
        for i in tl.static_range(PARTS):
            v = start + i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            z_s, _ = logits(parts_s[i], bias_s_ptr, v, V, scale_s, softcap_s, SOFTCAP_S)
            z_t = z_s
            if given_ptr is not None:
                z_t = given_logits(given_ptr, STRIDE, inside[:, None], v[None, :], V, dtype)
            elif TEACHER:
                z_t, _ = logits(parts_t[i], bias_t_ptr, v, V, scale_t, softcap_t, SOFTCAP_T)
            if SPARSE:
                student, teacher = fold_sparse(
                    student, teacher, z_s, v[None, :], labels, inv_tau, bits_ptr, inside[:, None],
                    labels_ptr is not None, METRICS, True,
                )  # fmt: skip
            elif SECOND:
                sums = fold_terms(sums, z_s, z_t, rows, inv_tau, parameter, DIVERGENCE, CENTRED_P, CENTRED_Q, MIX)
            else:
                student, teacher, pair = fold_tile(
                    student, teacher, pair, z_s, z_t, v[None, :], labels, targets, inv_tau,
                    TEACHER, BASE, MIX, labels_ptr is not None, targets_ptr is not None, METRICS, True,
                )  # fmt: skip

    stride = N.to(tl.int64)
    out = out_ptr + n + split * stride * (TERMS if SECOND else 2 * SIDE + PAIR)
    if SECOND:
        store_rows(out, stride, sums, inside)
    else:
        store_rows(out, stride, student, inside)
        if TEACHER or bits_ptr is not None:
            store_rows(out + SIDE * stride, stride, teacher, inside)
            store_rows(out + 2 * SIDE * stride, stride, pair, inside)


@triton.jit
def _load_side(p, stride, mask):
    return (
        tl.load(p, mask=mask, other=0),
        tl.load(p + stride, mask=mask, other=0),
        tl.load(p + 2 * stride, mask=mask, other=0),
        tl.load(p + 3 * stride, mask=mask, other=0),
        tl.load(p + 4 * stride, mask=mask, other=0).to(tl.int32),
        tl.load(p + 5 * stride, mask=mask, other=0),
    )


@triton.jit
def _load_pair(p, stride, mask):
    return (
        tl.load(p, mask=mask, other=0),
        tl.load(p + stride, mask=mask, other=0),
        tl.load(p + 2 * stride, mask=mask, other=0),
        tl.load(p + 3 * stride, mask=mask, other=0),
        tl.load(p + 4 * stride, mask=mask, other=0),
        tl.load(p + 5 * stride, mask=mask, other=0),
        tl.load(p + 6 * stride, mask=mask, other=0),
    )


@triton.jit
def _add_sides(a, b, best):
    """Two states with the same maximum."""
    return (a[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], best, a[5] + b[5])


@triton.jit
def _add_pairs(a, b):
    """Two states with the same maxima."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6])


@triton.jit
def _merge_sides(a, b, inv_tau):
    """(state, moves and their exponentials of a and of b); in a tie the smaller id is the argmax."""
    m = tl.maximum(a[0], b[0])
    best = tl.where(b[0] > a[0], b[4], tl.where(a[0] > b[0], a[4], tl.minimum(a[4], b[4])))
    a, move_a, r_a = rescale_side(a, m, inv_tau, True)
    b, move_b, r_b = rescale_side(b, m, inv_tau, True)
    return _add_sides(a, b, best), move_a, r_a, move_b, r_b


@triton.jit(do_not_specialize=["stride_c", "stride_stats", "N", "splits", "splits_beyond"])
def combine_kernel(
    parts_ptr,  # (splits, state, N)
    beyond_ptr,  # (splits_beyond, state, N): the student's side past the shared vocabulary, or None
    active_ptr,  # (N,) bool
    coefficients_ptr, stride_c,  # (3, N)
    temperature_ptr,  # ()
    stats_ptr, stride_stats,  # (6, N)
    rows_ptr,  # (10, N): the rows' constants and mix
    merged_ptr,  # (state, N) or None; given = the merged state goes there, and no further
    N, splits, splits_beyond,
    TEACHER: tl.constexpr, SPARSE: tl.constexpr, BASE: tl.constexpr,
    CE: tl.constexpr, CE_GRADIENT: tl.constexpr, ANCHOR: tl.constexpr,
    METRICS: tl.constexpr, MIX: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    stride = N.to(tl.int64)
    parts_ptr += n
    inv_tau = 1 / tl.load(temperature_ptr)
    zero = tl.zeros([BLOCK], dtype)
    counts = tl.load(active_ptr + n, mask=inside, other=0) != 0
    ce = zero

    if SECOND:
        sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        for split in range(splits):
            p = parts_ptr + split * stride * TERMS
            a = _load_pair(p, stride, inside)
            b = _load_pair(p + (TERMS - PAIR) * stride, stride, inside)
            sums = (
                sums[0] + a[0], sums[1] + a[1], sums[2] + a[2], sums[3] + a[3], sums[4] + a[4], sums[5] + a[5],
                sums[6] + a[6], sums[7] + b[4], sums[8] + b[5], sums[9] + b[6],
            )  # fmt: skip
        if merged_ptr is not None:
            store_rows(merged_ptr + n, N, sums, inside)
            return
        value, rows, products = finish_terms(sums, load_rows(rows_ptr + n, N, inside))
        if CE_GRADIENT:
            ce = tl.load(stats_ptr + stride_stats + n, mask=inside, other=0)
    else:
        student, teacher, pair = empty_side(zero), empty_side(zero), empty_pair(zero)
        for split in range(splits):
            p = parts_ptr + split * stride * (2 * SIDE + PAIR)
            other = _load_side(p, stride, inside)
            S_s, S_so = student[1], other[1]
            student, move_s, r_s, move_so, r_so = _merge_sides(student, other, inv_tau)
            if TEACHER:
                other = _load_side(p + SIDE * stride, stride, inside)
                S_t, S_to = teacher[1], other[1]
                teacher, move_t, r_t, move_to, r_to = _merge_sides(teacher, other, inv_tau)
                other = _load_pair(p + 2 * SIDE * stride, stride, inside)
                if BASE == "t":
                    a = rescale_pair(pair, S_t, move_t, move_s, r_t, r_s, "t" if MIX else "")
                    b = rescale_pair(other, S_to, move_to, move_so, r_to, r_so, "t" if MIX else "")
                    pair = _add_pairs(a, b)
                elif BASE == "s":
                    a = rescale_pair(pair, S_s, move_s, move_t, r_s, r_t, "s" if MIX else "")
                    b = rescale_pair(other, S_so, move_so, move_to, r_so, r_to, "s" if MIX else "")
                    pair = _add_pairs(a, b)
        if merged_ptr is not None:
            store_rows(merged_ptr + n, N, student, inside)
            store_rows(merged_ptr + SIDE * stride + n, N, teacher, inside)
            store_rows(merged_ptr + 2 * SIDE * stride + n, N, pair, inside)
            return
        value, rows, products = finish(student, teacher, pair, BASE, MIX, TEACHER)
        if beyond_ptr is not None:
            beyond = student
            for split in range(splits_beyond):
                other = _load_side(beyond_ptr + n + split * stride * (2 * SIDE + PAIR), stride, inside)
                beyond, _, _, _, _ = _merge_sides(beyond, other, inv_tau)
            student, rows = whole_vocabulary(student, beyond, rows)
        ce = store_statistics(
            stats_ptr + n, stride_stats, inside & counts, student, teacher, TEACHER, SPARSE, CE, ANCHOR, METRICS
        )

    if TEACHER:
        tl.store(stats_ptr + n, value, mask=inside & counts)
    mix = zero
    if MIX:
        coefficients = (
            tl.load(coefficients_ptr + n, mask=inside, other=0),
            tl.load(coefficients_ptr + stride_c + n, mask=inside, other=0),
            zero,
        )
        mix = tl.where(counts, mix_of(products, ce if CE_GRADIENT else zero, coefficients, inv_tau), 0)
    store_rows(rows_ptr + n, N, rows, inside)
    tl.store(rows_ptr + ROWS * stride + n, mix, mask=inside)


COMBINE_BLOCK = 128


def statistics(
    heads: Heads, term: Term, *, stats: Tensor, rows: Tensor, mix: bool, config: TileConfig | None = None
) -> None:
    """Fill stats (6, N) where computed and rows (10, N): the constants of each row, then `mix`."""
    if heads.hidden.shape[0] == 0:
        return
    if config is None:
        out = {"stats": stats, "rows": rows, "mix": mix}
        config = config_of(heads, term, lambda c: statistics(heads, term, **out, config=c))
    shared, beyond = fold(heads, term, mix=mix, config=config)
    combine(term, shared, beyond, stats=stats, rows=rows, mix=mix, teacher=heads.teacher)
    if heads.teacher and term.entry.base == "":
        sums = fold(heads, term, mix=mix, config=config, rows=rows)[0]
        combine(term, sums, None, stats=stats, rows=rows, mix=mix, teacher=True, second=True)


def config_of(heads: Heads, term: Term, launch: Callable[[TileConfig], Any]) -> TileConfig:
    kernel = "full" if heads.intricate or term.intricate else "lean"
    if heads.teacher_logits is not None or term.bits is not None:
        kernel = "given"
    return choose(kernel, heads.weight, heads.hidden.shape[0], launch, widths=heads.widths())


def fold(
    heads: Heads,
    term: Term,
    *,
    mix: bool,
    config: TileConfig,
    rows: Tensor | None = None,  # (10, N): given = this is the second pass
) -> tuple[Tensor, Tensor | None]:
    """(splits, state, N) partial states of the shared vocabulary, in the second pass its terms; and of the student's
    side of what lies beyond, None where nothing does."""
    flags = {"METRICS": term.metrics, "MIX": mix, "SECOND": rows is not None}
    shared = _fold(heads, term, rows, config, flags, 0, heads.kd_vocab)
    if not heads.truncated or rows is not None:
        return shared, None
    student = replace(term, divergence="sparse", targets=None, bits=None)
    return shared, _fold(heads.student_alone(), student, None, config, flags, heads.kd_vocab, heads.vocab)


def _fold(
    heads: Heads, term: Term, rows: Tensor | None, config: TileConfig, flags: dict[str, Any], begin: int, end: int
) -> Tensor:
    """Partial states of the entries from `begin` to `end`."""
    N, second = heads.hidden.shape[0], rows is not None
    row_blocks, tiles = triton.cdiv(N, config.block_n), max(1, triton.cdiv(end - begin, config.block_v))
    splits = splits_of(row_blocks, tiles, heads.hidden.device)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    partial = term.coefficients.new_empty(splits, TERMS.value if second else 2 * SIDE.value + PAIR.value, N)
    statistics_kernel[(row_blocks, splits)](
        *heads.pointers(), *heads.given(), *term.excluded(),
        None if second else term.labels, None if second else term.targets,
        term.temperature, rows, partial,
        N, end, *heads.widths(), per_split, begin, *heads.scalars(), term.parameter,
        **heads.flags(config), **term.divergence_flags(), **flags, PARTS=config.parts, **config.blocks(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial


def combine(
    term: Term,
    parts: Tensor,  # (splits, state, N), from `fold`
    beyond: Tensor | None,  # (splits, state, N)
    *,
    stats: Tensor,  # (6, N)
    rows: Tensor,  # (10, N)
    mix: bool,
    teacher: bool,  # there are two sides of logits
    second: bool = False,
    merged: Tensor | None = None,  # (state, N); given = the merged state goes there, and no further
) -> None:
    """Merge partial states in order, of this process's splits or of all processes'; fill stats and rows."""
    N = rows.shape[1]
    assert parts.is_contiguous()
    assert beyond is None or beyond.is_contiguous()
    combine_kernel[(triton.cdiv(N, COMBINE_BLOCK),)](
        parts, beyond, term.active, term.coefficients, term.coefficients.stride(0), term.temperature,
        stats, stats.stride(0), rows, merged, N, parts.shape[0], 0 if beyond is None else beyond.shape[0],
        TEACHER=teacher or term.bits is not None, SPARSE=term.sparse, BASE=term.entry.base,
        CE=term.labels is not None, CE_GRADIENT=term.ce_gradient, ANCHOR=term.targets is not None,
        METRICS=term.metrics, MIX=mix, SECOND=second, BLOCK=COMBINE_BLOCK, num_warps=4,
    )  # fmt: skip
