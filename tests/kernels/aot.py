"""Compile every kernel exactly as its host launcher launches it, for GPUs that need not be there, and read the result.

    make aot                                                           # every row of the table, half an hour
    python tests/kernels/aot.py --arch sm_90 --kernel row_kernel --case "forward_kl, plain" --classes

Exit status 1 and a list of what is wrong where a kernel does not compile, has a stack frame (spills lie there), wants
more shared memory than the chip has, makes of `tl.dot` anything but the architecture's best tensor-core instruction, or
does not keep to `LIMITS`.

    per_pair   instructions that are executed per pair of logits, pass by pass: loops times their trips over the
               vocabulary, with what the last trips waste. Of a tiled kernel the work on a tile's logits
    branches   of those loops, what lies behind a branch that few trips take (a label's block): its size per pair
    product    of a tiled kernel: the product loops, at a width of 768
    once       instructions in no loop, per pair: once per row; an upper bound, as branches in it are counted
    programs   that a multiprocessor holds, by registers, warps and shared memory

How: a launcher gets tensors on the "meta" device while torch and Triton believe in a GPU of that architecture, and
every launch becomes Triton's own warm-up, which compiles and stops before loading. So signature, specialisation and
options are those of a real launch whose tensors lie at multiples of 16 bytes.

A new kernel: a generator of `Case`s below, and its line in `cases`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from machine_code import Loop, Program, bytes_read, classes, loops_of, read_cuda, read_gcn

from kdfast.kernels import topk_teacher
from kdfast.kernels.block_sizes import TABLE
from kdfast.kernels.divergences import ENTRIES
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import add_column_sums
from kdfast.kernels.projector import project
from kdfast.kernels.row_kernel import Chunk, row_gradients, row_states, row_terms, solve_rows
from kdfast.kernels.tiled_backward import slab_gradients
from kdfast.kernels.tiled_forward import combine, statistics


class Chip(NamedTuple):
    target: GPUTarget
    multiprocessors: int
    shared: int  # KiB a block may have; a multiprocessor of NVIDIA's has one more, and each block takes one
    tensor_core: str  # instruction in the PTX or GCN assembly
    warps: int  # that each of a multiprocessor's four schedulers holds
    programs: int  # that a multiprocessor holds


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 108, 163, "mma.sync", 16, 32),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 84, 99, "mma.sync", 12, 16),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 128, 99, "mma.sync", 12, 24),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 132, 227, "wgmma.mma_async", 16, 32),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 148, 227, "tcgen05.mma", 16, 32),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 170, 99, "mma.sync", 12, 24),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64, "v_mfma", 8, 32),
}
# Kernel, a case's beginning: instructions per pair and, there alone, programs per multiprocessor on sm_90. sm_80 and
# sm_100 may execute 15% more; other chips are listed
LIMITS = {
    ("row_kernel", "forward_kl, plain"): (60, 3),
    ("row_kernel", "reverse_kl, plain"): (60, 3),
    ("row_kernel", "forward_kl, metrics"): (72, 1),
    ("row_kernel", "reverse_kl, metrics"): (72, 1),
    ("row_kernel", "forward_kl alone"): (43, 1),
    ("row_kernel", "own head"): (45, 1),
    ("row_kernel", "cross entropy alone"): (14, 1),
    ("row_kernel", "jsd, plain"): (80, 1),
    ("row_kernel", "skew_kl, plain"): (90, 1),
    ("row_kernel", "skew_reverse_kl, plain"): (90, 1),
    ("row_kernel", "symmetric_kl, plain"): (90, 1),
    ("row_kernel", "total_variation, plain"): (90, 1),
    ("statistics_kernel", "forward_kl, plain, bfloat16, N=4096"): (55, 1),
    ("gradients_kernel", "forward_kl, plain, bfloat16, N=4096"): (33, 1),
}
MARGINS = {"sm_90": 1.0, "sm_80": 1.15, "sm_100": 1.15}


class Case(NamedTuple):
    kernel: str  # of the launcher's launches the one looked at
    label: str
    launch: Callable[[], Any]
    tensor_core: bool = False  # expected
    allow_stack: str | None = None  # why a stack frame is accepted
    pair: int = 0  # bytes that a row kernel reads per pair of logits; 0: its instructions are not counted


TOKENS, CHUNK, FEW, SLAB, VOCAB, WIDTH = 4096, 1024, 48, 8192, 50257, 768
PADDED = 50304  # 50257 is odd, so nothing in a row is known to be aligned but its start; 50304 is its padded twin


def cases(arch: str, quick: bool) -> Iterator[Case]:
    """Every kernel with its lightest and its heaviest flags, over an aligned and an unaligned vocabulary, for every row
    of the table: 16-bit operands, fp32 and, where the chip has them, TF32 products; many tokens and few."""
    tensor_cores_for_fp32 = arch == "gfx942"
    for V in (50257,) if quick else (50257, PADDED):
        yield from row_cases(arch, V)
        yield from column_sums_cases(V)
        if V != PADDED:
            yield from support_cases(V)
        yield from tile_cases(V, TOKENS, torch.bfloat16, usual=not quick and V != PADDED)
        if not quick:
            yield from tile_cases(V, FEW, torch.bfloat16)
            yield from tile_cases(V, TOKENS, torch.float32, tensor_core=tensor_cores_for_fp32)
            if V != PADDED:
                yield from tile_cases(V, TOKENS, torch.float64, tensor_core=False)
            if arch != "gfx942" and V == 50257:
                yield from tile_cases(V, TOKENS, torch.float32, tf32=True)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scratch(rows: int, V: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # strided as the chunk loop does
    return meta(rows, PADDED, dtype=dtype)[:, :V]


def heads_of(
    V: int, N: int, dtype: torch.dtype, *, extra: torch.Tensor | None = None, softcap: float | None = None,
    own: int | None = None, teacher: bool = True, given: torch.Tensor | None = None, shared: int | None = None,
    tf32: bool = False, masked: bool = False,
) -> Heads:  # fmt: skip
    """own: width of the teacher's own head; given: its logits instead; shared: its vocabulary, where smaller; masked:
    KD is over some of the tokens."""
    Hs, kd_V = 768, shared or V
    teacher_hidden = meta(N, own or Hs, dtype=dtype) if teacher and given is None else None
    teacher_weight = meta(kd_V, own, dtype=dtype) if own is not None else None
    offsets = None if given is None else meta(N, dtype=torch.int64)
    return Heads(
        meta(N, Hs, dtype=dtype), meta(V, Hs, dtype=dtype), extra, 1.0, softcap,
        teacher_hidden, teacher_weight, extra, 1.0, softcap, given, offsets, V, kd_V, tf32,
        kd_V < V or masked, meta(V, dtype=torch.bool) if masked else None,
    )  # fmt: skip


def term_of(
    N: int, divergence: str, *, labels: bool, heavy: bool, bits: torch.Tensor | None = None, fixed: bool = False,
    precise: bool = False, dtype: torch.dtype = torch.float32,
) -> Term:  # fmt: skip
    """heavy: an anchor and metrics too; fixed: the teacher gets no gradient, as one that is given; precise: gradients
    in float32; dtype: of what is computed."""
    ids = meta(N, dtype=torch.int64)
    return Term(
        divergence, 0.5, *(meta(*shape, dtype=dtype) for shape in ((), (3, N), ())), meta(N, dtype=torch.bool),
        ids if labels else None, ids if heavy else None, labels, divergence != "sparse" and not fixed, heavy,
        heavy or bits is not None, bits, precise=precise,
    )  # fmt: skip


def row_cases(arch: str, V: int) -> Iterator[Case]:
    z_s, z_t = scratch(2 * CHUNK, V).split(CHUNK)
    grad_s, grad_t, grad_a = scratch(3 * CHUNK, V, torch.bfloat16).split(CHUNK)
    how = {"config": TABLE[arch, 4, "many"].rows}
    extra = meta(V, dtype=torch.bfloat16)
    full = partial(heads_of, V, TOKENS, torch.bfloat16, extra=extra, softcap=30.0)
    lean = heads_of(V, TOKENS, torch.bfloat16)
    usual = partial(term_of, TOKENS, labels=True, heavy=False)
    both = Gradients.of(grad_s, grad_t, decorrelation=meta(CHUNK))
    everything = Gradients.of(grad_s, grad_t, grad_a, meta(CHUNK))

    def chunk(heads: Heads, term: Term, z_t: torch.Tensor | None = z_t) -> Chunk:
        return Chunk(heads, term, z_s, z_t, width=PADDED, start=0)

    def solve(label: str, chunk: Chunk, grads: Gradients, few: str | None = None) -> Case:
        launch = partial(solve_rows, chunk, grads, stats=meta(6, TOKENS), **how)
        label += f", V={V}" * (V == PADDED)
        return Case("row_kernel", label, launch, allow_stack=few, pair=pair_bytes(chunk))

    tight = "8–16 bytes: ptxas keeps to 128 registers, for two programs a multiprocessor"
    divergences = ("forward_kl", "jsd") if V == PADDED else tuple(ENTRIES)
    for divergence in divergences:
        few = None if divergence in ("forward_kl", "reverse_kl") or arch == "gfx942" else tight
        yield solve(f"{divergence}, plain", chunk(lean, usual(divergence)), both, few)
        heavy = chunk(full(), term_of(TOKENS, divergence, labels=True, heavy=True))
        most = {"alpha_beta": "56 bytes on sm_80: three powers more"}
        most |= dict.fromkeys(("forward_kl", "skew_kl"), "16–24 bytes on sm_80 to sm_89, at 128 registers")
        yield solve(f"{divergence}, everything", heavy, everything, most.get(divergence))
        if V != PADDED:
            x = chunk(lean, replace(usual(divergence), metrics=True))
            yield solve(f"{divergence}, metrics", x, both, tight if arch == "sm_100" else few)
    alone = chunk(heads_of(V, TOKENS, torch.bfloat16, teacher=False), usual("forward_kl", fixed=True), None)
    yield solve("cross entropy alone", alone, Gradients.of(grad_s))
    if V == PADDED:
        return
    yield solve("no gradients: cross entropy", alone, Gradients.of(None))
    yield solve("no gradients: forward_kl, CE", chunk(lean, usual("forward_kl", fixed=True)), Gradients.of(None))
    yield solve("own head: forward_kl, CE", chunk(lean, usual("forward_kl", fixed=True)), Gradients.of(grad_s))
    for divergence in ("forward_kl", "jsd"):
        x = chunk(lean, term_of(TOKENS, divergence, labels=False, heavy=False))
        yield solve(f"{divergence} alone", x, Gradients.of(grad_s, grad_t), tight if divergence == "jsd" else None)
        x = chunk(lean, usual(divergence, precise=True))
        yield solve(f"fp32, {divergence}, CE", x, Gradients.of(z_s, z_t), tight)  # in place, as the loop does then
    given = full(given=meta(TOKENS, V, dtype=torch.bfloat16), shared=V - 257)
    few = "16–48 bytes: ptxas keeps to 128 registers, for two programs a multiprocessor"
    few = few if arch in ("sm_100", "sm_120") else None
    x = chunk(given, usual("skew_kl", fixed=True), None)
    yield solve("skew_kl, given logits, truncated", x, Gradients.of(grad_s), few)

    for divergence in ("forward_kl", "jsd"):
        x = chunk(heads_of(V, TOKENS, torch.bfloat16, own=768, masked=True), usual(divergence, fixed=True))
        yield solve(f"some tokens: {divergence}, own head, CE", x, Gradients.of(grad_s))
    x = chunk(full(masked=True), term_of(TOKENS, "forward_kl", labels=True, heavy=True))
    yield solve("some tokens: forward_kl, everything", x, everything)

    # one slice of the vocabulary: what processes do between their collectives
    constants, states, decorrelate = meta(12, CHUNK), meta(25, CHUNK), {"decorrelate": True, **how}
    for divergence in ("forward_kl", "jsd"):
        x = chunk(full(), term_of(TOKENS, divergence, labels=True, heavy=True))
        few = "8 bytes on sm_90, kept to 128 registers" if divergence == "forward_kl" else None
        launch = partial(row_states, x, states, **decorrelate)
        yield Case("states_kernel", divergence, launch, allow_stack=few, pair=pair_bytes(x))
        launch = partial(row_gradients, x, everything, constants=constants, **how)
        yield Case("row_gradients_kernel", divergence, launch, pair=pair_bytes(x))
    few = "16 bytes: ptxas keeps to 128 registers, for two programs a multiprocessor"
    few = few if arch in ("sm_80", "sm_86", "sm_89", "sm_90") else None
    launch = partial(row_terms, x, states, constants=constants, **decorrelate)
    yield Case("terms_kernel", "jsd", launch, allow_stack=few, pair=pair_bytes(x))

    bits = meta(TOKENS, -(-V // 32), dtype=torch.int32)
    x = chunk(full(teacher=False), term_of(TOKENS, "sparse", labels=True, heavy=False, bits=bits), None)
    yield Case("states_kernel", "sparse", partial(row_states, x, states, decorrelate=False, **how))
    launch = partial(row_gradients, x, Gradients.of(grad_s), constants=constants, **how)
    yield Case("row_gradients_kernel", "sparse", launch, pair=pair_bytes(x))


def pair_bytes(chunk: Chunk) -> int:
    """Return the bytes that a kernel reads of one token's logits, biases and mask."""
    heads = chunk.heads
    operands = [chunk.z_s, chunk.z_t, heads.teacher_logits, heads.bias, heads.mask]
    operands += [heads.teacher_bias] * (chunk.z_t is not None)
    return sum(operand.element_size() for operand in operands if operand is not None)


def support_cases(V: int) -> Iterator[Case]:
    K = 64
    indices, chosen = meta(TOKENS, K, dtype=torch.int64), meta(TOKENS, K, dtype=torch.bool)
    x, w = meta(TOKENS, 768, dtype=torch.bfloat16), meta(V, 768, dtype=torch.bfloat16)
    plane, values = scratch(TOKENS, V, torch.bfloat16), meta(TOKENS, K, dtype=torch.bfloat16)
    yield Case("bits_kernel", f"K={K}", partial(topk_teacher.bits, indices, chosen, V))
    yield Case("support_logits_kernel", f"K={K}", partial(topk_teacher.support_logits, x, w, indices, meta(TOKENS, K)))
    yield Case("write_kernel", f"K={K}", partial(topk_teacher.write, plane, indices, values))


def column_sums_cases(V: int) -> Iterator[Case]:
    for label, weights in (("plain", None), ("weighted", meta(CHUNK))):
        launch = partial(add_column_sums, scratch(CHUNK, V, torch.bfloat16), weights, meta(V))
        yield Case("column_sums_kernel", f"{label}, V={V}", launch)


def tile_cases(
    V: int, N: int, dtype: torch.dtype, *, usual: bool = False, tensor_core: bool = True, tf32: bool = False
) -> Iterator[Case]:
    """The tiled engine's kernels. Lightest: a projected teacher, forward KL, nothing else; heaviest: everything, the
    teacher's own head for a JSD; between them the heaviest that the table's `lean` configuration is for; and the
    heaviest with a width that no block divides. usual: every divergence."""
    label = f"{'TF32' if tf32 else str(dtype)[6:]}, N={N}, V={V}"
    Hs, even, odd = 768, 1024, 1000
    bias = meta(V, dtype=dtype)
    planes = meta(3, N, SLAB, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    stats, constants = meta(6, N, dtype=wide), meta(12, N, dtype=wide)
    terms = partial(term_of, N, precise=dtype == wide, dtype=wide)

    def launches(divergence: str, flags: str, Ht: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        heavy, decorrelate = flags == "everything", flags != "alone" and dtype != wide
        extras = {"extra": bias, "softcap": 30.0} if heavy else {}
        heads = heads_of(V, N, dtype, own=Ht if heavy and divergence == "jsd" else None, tf32=tf32, **extras)
        term = terms(divergence, labels=flags != "alone", heavy=heavy)
        term = replace(term, metrics=flags in ("metrics", "everything"))
        grads = Gradients.of(*planes[: 3 if heavy else 2])
        return (
            partial(statistics, heads, term, stats=stats, constants=constants, decorrelate=decorrelate),
            partial(slab_gradients, heads, term, grads, constants=constants, first=0, decorrelate=decorrelate),
        )

    if V != PADDED and not tf32:
        bits = meta(N, -(-V // 32), dtype=torch.int32)
        others = {
            "given logits, truncated": (
                heads_of(V, N, dtype, given=meta(N, V, dtype=dtype), shared=V - 257),
                terms("skew_kl", labels=True, heavy=False, fixed=True),
            ),
            "some tokens, own head": (
                heads_of(V, N, dtype, own=even, masked=True), terms("forward_kl", labels=True, heavy=False, fixed=True)
            ),
            "some tokens, everything": (
                heads_of(V, N, dtype, extra=bias, softcap=30.0, masked=True),
                terms("forward_kl", labels=True, heavy=True),
            ),
            "sparse": (
                heads_of(V, N, dtype, teacher=False), terms("sparse", labels=True, heavy=False, bits=bits)
            ),
        }  # fmt: skip
        for name, (heads, term) in others.items():
            rest = {"constants": constants, "decorrelate": False}
            of_statistics = partial(statistics, heads, term, stats=stats, **rest)
            of_gradients = partial(slab_gradients, heads, term, Gradients.of(planes[0]), first=0, **rest)
            yield Case("statistics_kernel", f"{name}, {label}", of_statistics, tensor_core)
            yield Case("combine_kernel", f"{name}, {label}", of_statistics)
            yield Case("gradients_kernel", f"{name}, {label}", of_gradients, tensor_core)
    combinations = [("forward_kl", "alone", even), ("jsd", "everything", even)]
    if V != PADDED and not tf32:  # the vocabulary enters a tile's masks only: what lies between is seen once
        combinations += [("forward_kl", "plain", even), ("forward_kl", "everything", even)]
        combinations += [("jsd", "everything", odd)] * (N == TOKENS)
    if usual:
        combinations += [("forward_kl", "metrics", even), ("jsd", "metrics", even)]
        combinations += [(divergence, "plain", even) for divergence in ENTRIES if divergence != "forward_kl"]
    for divergence, flags, Ht in combinations:
        name = f"{divergence}, {flags}, {label}{', odd width' if Ht == odd else ''}"
        of_statistics, of_gradients = launches(divergence, flags, Ht)
        few = "40 bytes on sm_100: three powers more" if divergence == "alpha_beta" else None
        yield Case("statistics_kernel", name, of_statistics, tensor_core, few)
        few = "8 bytes on sm_90: float64" if dtype == torch.float64 else None
        yield Case("combine_kernel", name, of_statistics, allow_stack=few)
        if flags == "everything" and Ht == even:  # of one process's splits, where the vocabulary lies in slices
            states, how = meta(4, 19, N, dtype=wide), {"decorrelate": True, "teacher": True}
            merge = partial(combine, terms(divergence, labels=True, heavy=True), states, None, stats=stats, **how)
            merge = partial(merge, constants=constants, merged=states[0])
            yield Case("combine_kernel", f"merged, {name}", merge)
        if flags in ("alone", "plain") or (divergence, flags) == ("jsd", "everything"):
            few = {"alpha_beta": "72 bytes on sm_90: three powers more", "skew_reverse_kl": "24 on sm_90"}
            yield Case("gradients_kernel", name, of_gradients, tensor_core, few.get(divergence))
    for Ht in (even, odd):
        operands = meta(N, Ht, dtype=dtype), meta(Hs, Ht, dtype=dtype), meta(Hs, dtype=dtype)
        yield Case("projection_kernel", f"{label}, Ht={Ht}", partial(project, *operands, tf32=tf32), tensor_core)


@dataclass
class Result:
    arch: str
    kernel: str
    case: str
    per_pair: str = ""
    branches: str = ""
    product: str = ""
    once: str = ""
    regs: int = 0  # a thread
    programs: int = 0  # a multiprocessor
    stack: int = 0  # bytes a thread
    warps: int = 0
    shared: int = 0  # bytes a block
    tensor: int = 0  # tensor-core instructions; those of PTX or GCN
    total: int = 0  # instructions
    seconds: float = 0.0  # near 0: from Triton's cache
    blocks: str = ""  # the integer constexprs
    hash: str = ""  # from here on not in the table
    loops: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


COLUMNS = list(Result.__annotations__).index("hash")


@contextmanager
def pretending(arch: str) -> Iterator[None]:
    """What launchers ask of torch and Triton is answered as if a GPU of that architecture were there."""
    target, multiprocessors = CHIPS[arch][:2]
    cuda = target.backend == "cuda"
    # the target is also the device's name, so that what a JITFunction keeps per device it keeps per target
    device = {"get_current_target": lambda: target, "get_current_device": lambda: target}
    driver.set_active(SimpleNamespace(**device, get_current_stream=lambda device: 0))
    properties = SimpleNamespace(multi_processor_count=multiprocessors, gcnArchName=arch)
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(target.arch, 10) if cuda else (9, 4)),
        mock.patch("torch.version.hip", None if cuda else "6.4"),
    ):
        yield


def compile_case(arch: str, quick: bool, index: int) -> list[Result]:
    """Of the index-th case, one result per distinct compilation."""
    launch, compiled = JITFunction.run, {}

    def run(self, *args, grid, warmup, **kwargs):
        if self.__name__ == case.kernel:
            began = time.perf_counter()
            binary = launch(self, *args, grid=grid, warmup=True, **kwargs)
            compiled.setdefault(binary.hash, read(binary, self, case, arch, time.perf_counter() - began))

    with pretending(arch), mock.patch.object(JITFunction, "run", run):
        case = list(cases(arch, quick))[index]
        try:
            case.launch()
        except Exception as e:
            while e.__cause__ is not None:  # Triton's outermost error names only where the call stands
                e = e.__cause__
            message = "\n    ".join([f"does not compile: {type(e).__name__}", *str(e).strip().splitlines()[-6:]])
            return [Result(arch, case.kernel, case.label, wrong=[message])]
    return list(compiled.values()) or [Result(arch, case.kernel, case.label, wrong=["its launcher did not launch it"])]


def read(binary: Any, kernel: JITFunction, case: Case, arch: str, seconds: float) -> Result:
    chip = CHIPS[arch]
    target = chip.target
    result = Result(arch, case.kernel, case.label, seconds=round(seconds, 2), hash=binary.hash)
    result.warps, result.shared = binary.metadata.num_warps, binary.metadata.shared
    constants = {kernel.params[path[0]].name: value for path, value in binary.src.constants.items()}
    numbers = (p.name for p in kernel.params if p.is_constexpr and type(constants[p.name]) is int)
    result.blocks = " ".join(f"{name}={constants[name]}" for name in numbers)
    if target.backend == "cuda":
        assembly, sass = binary.asm["ptx"], disassemble(binary.asm["cubin"])
        result.regs, result.stack = (int(re.search(rf"\b{key}:(\d+)", sass)[1]) for key in ("REG", "STACK"))
        instructions = read_cuda(sass)
    else:
        assembly = binary.asm["amdgcn"]
        counts = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M))
        result.regs, result.stack = int(counts["vgpr_count"]), int(counts["private_segment_fixed_size"])
        instructions = read_gcn(assembly)
    result.total, result.tensor = len(instructions), assembly.count(chip.tensor_core)
    result.programs = programs_of(chip, result)
    count(result, loops_of(instructions), case, constants, result.warps * target.warp_size)
    if result.stack and case.allow_stack is None:
        result.wrong.append(f"stack frame of {result.stack} bytes a thread (spills?)")
    if result.shared > chip.shared * 1024:
        result.wrong.append(f"{result.shared} bytes of shared memory, the chip has {chip.shared * 1024}")
    if (getattr(binary.metadata, "tmem_size", None) or 0) > 512:
        result.wrong.append(f"{binary.metadata.tmem_size} columns of tensor memory, the chip has 512")
    if case.tensor_core and not result.tensor:
        result.wrong.append(f"no {chip.tensor_core}: tl.dot does not run on the architecture's tensor cores")
    return result


def programs_of(chip: Chip, result: Result) -> int:
    """Return how many programs a multiprocessor holds. A scheduler has 512 registers a lane, dealt out in eights."""
    cuda = chip.target.backend == "cuda"
    warps = 4 * min(chip.warps, 512 // max(8, -(-result.regs // 8) * 8))
    reserved = 1024 if cuda else 0
    room = (chip.shared + cuda) * 1024 // max(1, result.shared + reserved)
    return min(chip.programs, warps // result.warps, room)


def count(result: Result, code: Program, case: Case, constants: dict[str, Any], threads: int) -> None:
    """Fill in what is executed per pair of logits, and what of it breaks a limit."""
    products = [x for loop in code.loops for x in loop.walk() if sum(map(multiplies, x.walk())) == 1 and multiplies(x)]
    if case.kernel in ("statistics_kernel", "gradients_kernel") and products:
        pairs = constants["BLOCK_N"] * constants["BLOCK_V"] / threads  # of a thread in a tile
        walks = [loop for loop in code.loops if loop not in products and any(x in products for x in loop.walk())]
        work = [(x.always, x.branches) for x in walks] or [(code.outside, [])]
        trips = -(-WIDTH // constants["BLOCK_H"])
        result.product = f"{sum(len(x.always) for x in products) * trips / pairs / len(work):.1f}"
        passes = [(len(always) / pairs, len(branches) / pairs) for always, branches in work]
        result.once = f"{len(code.outside) / pairs:.1f}" if walks else ""
        result.loops += [report(x, pairs, trips) for x in products]
        result.loops += [report(x, pairs, 1) for x in walks]
    elif case.pair:
        passes = passes_of(result, code, case.pair, threads)
        result.once = f"{len(code.outside) * threads / VOCAB:.1f}"
    else:
        return
    result.per_pair = "+".join(f"{always:.1f}" for always, _ in passes)
    result.branches = "+".join(f"{branches:.1f}" for _, branches in passes)
    for (kernel, label), (most, programs) in LIMITS.items():
        if kernel == case.kernel and case.label.startswith(label) and result.arch in MARGINS:
            executed, most = sum(always for always, _ in passes), most * MARGINS[result.arch]
            if executed > most:
                result.wrong.append(f"{executed:.1f} instructions per pair, at most {most:.1f}")
            if result.stack and result.arch == "sm_90":
                result.wrong.append(f"stack frame of {result.stack} bytes a thread, of a kernel with a limit")
            if result.programs < programs and result.arch == "sm_90":
                result.wrong.append(f"{result.programs} programs per multiprocessor, at least {programs}")


def passes_of(result: Result, code: Program, pair: int, threads: int) -> list[tuple[float, float]]:
    """Return of each pass over the vocabulary what it executes per pair, and what lies behind branches.

    How many pairs a thread has in a trip is seen by what it loads. Loops with fewer than the most, and beside loops
    without masks those with them, are a pass's end: of the last before them, else of the next after them, that stores
    as they do and has none yet."""
    loops = [(loop, bytes_read(loop.always) // pair) for loop in code.loops]
    loops = [(loop, pairs) for loop, pairs in loops if pairs and not pairs & (pairs - 1)]
    most = max((pairs for _, pairs in loops), default=0)
    mains = [i for i, (_, pairs) in enumerate(loops) if pairs == most]
    mains = [i for i in mains if not loops[i][0].masked] or mains
    ends: dict[int, list[int]] = {i: [] for i in mains}
    for i, (loop, _) in enumerate(loops):
        if i not in ends:
            alike = [j for j in mains if stores(loops[j][0]) == stores(loop) and not ends[j]] or mains
            ends[max((j for j in alike if j < i), default=alike[0])].append(i)
    passes = []
    for main in mains:
        whole = VOCAB // (most * threads)
        left = VOCAB - whole * most * threads
        trips: dict[int, float] = {main: whole if ends[main] else -(-VOCAB // (most * threads))}
        for i in ends[main]:
            once = min(4, loops[i][1])  # pairs; ptxas may have made one trip of several
            trips[i] = -(-left // (once * threads)) * once / loops[i][1]
        for i, n in trips.items():
            result.loops.append(report(loops[i][0], loops[i][1], n))
        executed = sum(len(loops[i][0].always) * n for i, n in trips.items())
        passes.append((executed * threads / VOCAB, len(loops[main][0].branches) / most))
    return passes


def multiplies(loop: Loop) -> bool:
    return bool(classes(loop.always + loop.branches)["tensor"])  # on sm_100 one thread does, behind a branch


def stores(loop: Loop) -> bool:
    return any(re.match(r"STG|(buffer|global|flat)_store", opcode) for opcode in loop.always + loop.branches)


def report(loop: Loop, pairs: float, trips: float) -> dict[str, Any]:
    found = {name: round(n / pairs, 2) for name, n in classes(loop.always).most_common()}
    return {"pairs": pairs, "trips": trips, "instructions": len(loop.always), "branches": len(loop.branches)} | found


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def print_table(results: list[Result]) -> None:
    names = list(Result.__annotations__)[:COLUMNS]
    lines = [names, *([str(getattr(r, name)) for name in names] for r in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(*(f"{c:<{w}} " if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))))


def main() -> int:
    parser = argparse.ArgumentParser(description="compile every kernel ahead of time, check what came out")
    parser.add_argument("--quick", action="store_true", help="one vocabulary size")
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="ARCH", help=" ".join(CHIPS))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="these kernels only")
    parser.add_argument("--case", nargs="+", default=[""], metavar="PART", help="cases with such a part in their label")
    parser.add_argument("--classes", action="store_true", help="what each loop executes, by class of opcode")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: Triton's interpreter does not compile. Unset it")

    tasks = []
    for arch in args.arch:
        with pretending(arch):
            for i, case in enumerate(cases(arch, args.quick)):
                if any(part in case.label for part in args.case) and (not args.kernel or case.kernel in args.kernel):
                    tasks.append((arch, args.quick, i))
    if not tasks:
        parser.error(f"there is no case of {args.kernel or 'any kernel'} with {args.case} in its label")
    began = time.perf_counter()
    lines: dict[tuple[str, str], Result] = {}  # cases that came out as the same compilation share one
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_case, *zip(*tasks, strict=True)):
            for result in found:
                if (same := lines.setdefault((result.arch, result.hash or result.case), result)) is not result:
                    same.case += f" = {result.case}"
    results = list(lines.values())
    print_table(results)
    for r in results if args.classes else ():
        print(f"\n{r.arch} {r.kernel} {r.case}", *r.loops, sep="\n    ")
    wrong = [f"{r.arch} {r.kernel} ({r.case}): {what}" for r in results for what in r.wrong]
    print(f"\n{len(results)} compilations, triton {triton.__version__}, {time.perf_counter() - began:.0f} s")
    print("\n".join([*wrong, f"{len(wrong)} wrong"]))
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
