"""Compile every kernel exactly as its host launcher launches it, for GPUs that need not be there, and read the result.

    make aot                                                           # every row of the table, minutes
    python tests/kernels/aot.py --quick --arch sm_90 gfx942 --kernel row_kernel

Exit status 1 and a list of what is wrong where a kernel does not compile, has a stack frame (spills lie there), wants
more shared memory than the chip has, or makes of `tl.dot` anything but the architecture's best tensor-core instruction.

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
from dataclasses import asdict, dataclass, field
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

from kdfast.kernels import topk_teacher
from kdfast.kernels.block_sizes import TABLE
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import add_column_sums
from kdfast.kernels.projector import project
from kdfast.kernels.row_kernel import Chunk, row_gradients, row_states, row_terms, solve_rows
from kdfast.kernels.tiled_backward import slab_gradients
from kdfast.kernels.tiled_forward import combine, statistics

# target, multiprocessors, KiB of shared memory a block may have, tensor-core instruction in the PTX or GCN assembly
CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108, 163, "mma.sync"),
    "sm_86": (GPUTarget("cuda", 86, 32), 84, 99, "mma.sync"),
    "sm_89": (GPUTarget("cuda", 89, 32), 128, 99, "mma.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), 132, 227, "wgmma.mma_async"),
    "sm_100": (GPUTarget("cuda", 100, 32), 148, 227, "tcgen05.mma"),
    "sm_120": (GPUTarget("cuda", 120, 32), 170, 99, "mma.sync"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304, 64, "v_mfma"),
}


class Case(NamedTuple):
    kernel: str  # of the launcher's launches the one looked at
    label: str
    launch: Callable[[], Any]
    tensor_core: bool = False  # expected
    allow_stack: str | None = None  # why a stack frame is accepted


TOKENS, CHUNK, FEW, SLAB = 4096, 1024, 48, 8192
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
        yield from tile_cases(V, TOKENS, torch.bfloat16)
        if not quick:
            yield from tile_cases(V, FEW, torch.bfloat16)
            yield from tile_cases(V, TOKENS, torch.float32, tensor_core=tensor_cores_for_fp32)
            if arch != "gfx942" and V == 50257:
                yield from tile_cases(V, TOKENS, torch.float32, tf32=True)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scratch(rows: int, V: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # strided as the chunk loop does
    return meta(rows, PADDED, dtype=dtype)[:, :V]


def heads_of(
    V: int, N: int, dtype: torch.dtype, *, extra: torch.Tensor | None = None, softcap: float | None = None,
    own: int | None = None, teacher: bool = True, given: torch.Tensor | None = None, shared: int | None = None,
    tf32: bool = False,
) -> Heads:  # fmt: skip
    """own: width of the teacher's own head; given: its logits instead; shared: its vocabulary, where smaller."""
    Hs, kd_V = 768, shared or V
    teacher_hidden = meta(N, own or Hs, dtype=dtype) if teacher and given is None else None
    teacher_weight = meta(kd_V, own, dtype=dtype) if own is not None else None
    offsets = None if given is None else meta(N, dtype=torch.int64)
    return Heads(
        meta(N, Hs, dtype=dtype), meta(V, Hs, dtype=dtype), extra, 1.0, softcap,
        teacher_hidden, teacher_weight, extra, 1.0, softcap, given, offsets, V, kd_V, tf32,
        kd_V < V,
    )  # fmt: skip


def term_of(
    N: int, divergence: str, *, labels: bool, heavy: bool, bits: torch.Tensor | None = None, fixed: bool = False
) -> Term:
    """heavy: an anchor and metrics too; fixed: the teacher gets no gradient, as one that is given."""
    ids = meta(N, dtype=torch.int64)
    return Term(
        divergence, 0.5, meta(), meta(3, N), meta(), meta(N, dtype=torch.bool), ids if labels else None,
        ids if heavy else None, labels, divergence != "sparse" and not fixed, heavy, heavy or bits is not None, bits,
    )  # fmt: skip


def row_cases(arch: str, V: int) -> Iterator[Case]:
    z_s, z_t = scratch(2 * CHUNK, V).split(CHUNK)
    grad_s, grad_t, grad_a = scratch(3 * CHUNK, V, torch.bfloat16).split(CHUNK)
    how = {"config": TABLE[arch, 4, "many"].rows}
    solve = partial(solve_rows, stats=meta(6, TOKENS), **how)
    extra = meta(V, dtype=torch.bfloat16)
    full = partial(heads_of, V, TOKENS, torch.bfloat16, extra=extra, softcap=30.0)
    both = Gradients.of(grad_s, grad_t, decorrelation=meta(CHUNK))
    everything = Gradients.of(grad_s, grad_t, grad_a, meta(CHUNK))

    def chunk(heads: Heads, term: Term, z_t: torch.Tensor | None = z_t) -> Chunk:
        return Chunk(heads, term, z_s, z_t, width=PADDED, start=0)

    lean = heads_of(V, TOKENS, torch.bfloat16)
    for divergence in ("forward_kl", "jsd"):
        most = chunk(full(), term_of(TOKENS, divergence, labels=True, heavy=True))
        yield Case("row_kernel", f"{divergence}, everything, V={V}", partial(solve, most, everything))
        few = "8–16 bytes: ptxas keeps to 128 registers, for two programs a multiprocessor"
        few = few if divergence == "jsd" and arch != "gfx942" else None
        usual = chunk(lean, term_of(TOKENS, divergence, labels=True, heavy=False))
        yield Case("row_kernel", f"{divergence}, CE, V={V}", partial(solve, usual, both), allow_stack=few)
    term = term_of(TOKENS, "forward_kl", labels=True, heavy=False)
    alone = chunk(heads_of(V, TOKENS, torch.bfloat16, teacher=False), term, None)
    yield Case("row_kernel", f"cross entropy alone, V={V}", partial(solve, alone, Gradients.of(None)))
    if V == PADDED:
        return
    usual = chunk(lean, term_of(TOKENS, "alpha_beta", labels=True, heavy=False))
    yield Case("row_kernel", "alpha_beta, CE", partial(solve, usual, both))
    given = full(given=meta(TOKENS, V, dtype=torch.bfloat16), shared=V - 257)
    x = chunk(given, term_of(TOKENS, "skew_kl", labels=True, heavy=False, fixed=True), None)
    launch = partial(solve, x, Gradients.of(grad_s))
    few = "16–48 bytes: ptxas keeps to 128 registers, for two programs a multiprocessor"
    few = few if arch in ("sm_100", "sm_120") else None
    yield Case("row_kernel", "skew_kl, given logits, truncated", launch, allow_stack=few)

    # one slice of the vocabulary: what processes do between their collectives
    constants, states, decorrelate = meta(12, CHUNK), meta(25, CHUNK), {"decorrelate": True, **how}
    for divergence in ("forward_kl", "jsd"):
        x = chunk(full(), term_of(TOKENS, divergence, labels=True, heavy=True))
        yield Case("states_kernel", divergence, partial(row_states, x, states, **decorrelate))
        launch = partial(row_gradients, x, everything, constants=constants, **how)
        yield Case("row_gradients_kernel", divergence, launch)
    few = "16 bytes: ptxas keeps to 128 registers, for two programs a multiprocessor"
    few = few if arch in ("sm_80", "sm_86", "sm_89", "sm_90") else None
    launch = partial(row_terms, x, states, constants=constants, **decorrelate)
    yield Case("terms_kernel", "jsd", launch, allow_stack=few)

    bits = meta(TOKENS, -(-V // 32), dtype=torch.int32)
    x = chunk(full(teacher=False), term_of(TOKENS, "sparse", labels=True, heavy=False, bits=bits), None)
    yield Case("states_kernel", "sparse", partial(row_states, x, states, decorrelate=False, **how))
    launch = partial(row_gradients, x, Gradients.of(grad_s), constants=constants, **how)
    yield Case("row_gradients_kernel", "sparse", launch)


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
    V: int, N: int, dtype: torch.dtype, *, tensor_core: bool = True, tf32: bool = False
) -> Iterator[Case]:
    """The tiled engine's kernels. Lightest: a projected teacher, forward KL, nothing else; heaviest: everything, the
    teacher's own head for a JSD; between them the heaviest that the table's `lean` configuration is for; and the
    heaviest with a width that no block divides."""
    label = f"{'TF32' if tf32 else str(dtype)[6:]}, N={N}, V={V}"
    Hs, even, odd = 768, 1024, 1000
    bias = meta(V, dtype=dtype)
    planes = meta(3, N, SLAB, dtype=dtype)
    stats, constants = meta(6, N), meta(12, N)

    def launches(divergence: str, heavy: bool, plain: bool, Ht: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        extras = {"extra": bias, "softcap": 30.0} if heavy else {}
        heads = heads_of(V, N, dtype, own=Ht if heavy and divergence == "jsd" else None, tf32=tf32, **extras)
        term = term_of(N, divergence, labels=heavy or plain, heavy=heavy)
        decorrelate = heavy or plain
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
                term_of(N, "skew_kl", labels=True, heavy=False, fixed=True),
            ),
            "sparse": (
                heads_of(V, N, dtype, teacher=False), term_of(N, "sparse", labels=True, heavy=False, bits=bits)
            ),
        }  # fmt: skip
        for name, (heads, term) in others.items():
            rest = {"constants": constants, "decorrelate": False}
            of_statistics = partial(statistics, heads, term, stats=stats, **rest)
            of_gradients = partial(slab_gradients, heads, term, Gradients.of(planes[0]), first=0, **rest)
            yield Case("statistics_kernel", f"{name}, {label}", of_statistics, tensor_core)
            yield Case("combine_kernel", f"{name}, {label}", of_statistics)
            yield Case("gradients_kernel", f"{name}, {label}", of_gradients, tensor_core)
    combinations = [("forward_kl", "nothing else", even), ("jsd", "everything", even)]
    if V != PADDED and not tf32:  # the vocabulary enters a tile's masks only: what lies between is seen once
        combinations += [("forward_kl", "CE", even), ("forward_kl", "everything", even)]
        combinations += [("jsd", "everything", odd)] * (N == TOKENS)
        combinations += [("alpha_beta", "CE", even)] * (N == TOKENS and dtype == torch.bfloat16)
    for divergence, flags, Ht in combinations:
        heavy = flags == "everything"
        name = f"{divergence}, {flags}, {label}{', odd width' if Ht == odd else ''}"
        of_statistics, of_gradients = launches(divergence, heavy, flags == "CE", Ht)
        few = "16 bytes on sm_80: the heaviest case" if (divergence, flags) == ("jsd", "everything") else None
        yield Case("statistics_kernel", name, of_statistics, tensor_core, few)
        yield Case("combine_kernel", name, of_statistics)
        if flags == "everything" and Ht == even:  # of one process's splits, where the vocabulary lies in slices
            term = term_of(N, divergence, labels=True, heavy=True)
            merge = partial(
                combine, term, meta(4, 19, N), None, stats=stats, constants=constants, decorrelate=True, teacher=True
            )
            yield Case("combine_kernel", f"merged, {name}", partial(merge, merged=meta(19, N)))
        if flags in ("nothing else", "CE") or (divergence, flags) == ("jsd", "everything"):
            few = {"alpha_beta": "72 bytes on sm_90: three powers more", "forward_kl": "56 on sm_90: saturated rows"}
            yield Case("gradients_kernel", name, of_gradients, tensor_core, few.get(divergence))
    for Ht in (even, odd):
        operands = meta(N, Ht, dtype=dtype), meta(Hs, Ht, dtype=dtype), meta(Hs, dtype=dtype)
        yield Case("projection_kernel", f"{label}, Ht={Ht}", partial(project, *operands, tf32=tf32), tensor_core)


@dataclass
class Result:
    arch: str
    kernel: str
    case: str
    blocks: str = ""  # the integer constexprs
    warps: int = 0
    regs: int = 0  # a thread
    stack: int = 0  # bytes a thread
    shared: int = 0  # bytes a block
    tensor: int = 0  # tensor-core instructions; those of PTX or GCN
    mufu: int = 0  # exp, log, 1/x and their kin
    total: int = 0  # instructions
    seconds: float = 0.0  # near 0: from Triton's cache
    hash: str = ""  # from here on not in the table
    wrong: list[str] = field(default_factory=list)


@contextmanager
def pretending(arch: str) -> Iterator[None]:
    """What launchers ask of torch and Triton is answered as if a GPU of that architecture were there."""
    target, multiprocessors, _, _ = CHIPS[arch]
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
    target, _, shared, tensor_core = CHIPS[arch]
    result = Result(arch, case.kernel, case.label, seconds=round(seconds, 2), hash=binary.hash)
    result.warps, result.shared = binary.metadata.num_warps, binary.metadata.shared
    constants = {kernel.params[path[0]].name: value for path, value in binary.src.constants.items()}
    numbers = (p.name for p in kernel.params if p.is_constexpr and type(constants[p.name]) is int)
    result.blocks = " ".join(f"{name}={constants[name]}" for name in numbers)
    if target.backend == "cuda":
        assembly, sass = binary.asm["ptx"], disassemble(binary.asm["cubin"])
        result.regs, result.stack = (int(re.search(rf"\b{key}:(\d+)", sass)[1]) for key in ("REG", "STACK"))
        opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ +)?(?!NOP)([A-Z][\w.]*)", sass, re.M)
    else:
        assembly = binary.asm["amdgcn"]
        counts = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M))
        result.regs, result.stack = int(counts["vgpr_count"]), int(counts["private_segment_fixed_size"])
        opcodes = re.findall(r"^\t([a-z]\w+)", assembly, re.M)
    result.mufu = sum(bool(re.match(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_", opcode)) for opcode in opcodes)
    result.total, result.tensor = len(opcodes), assembly.count(tensor_core)
    if result.stack and case.allow_stack is None:
        result.wrong.append(f"stack frame of {result.stack} bytes a thread (spills?)")
    if result.shared > shared * 1024:
        result.wrong.append(f"{result.shared} bytes of shared memory, the chip has {shared * 1024}")
    if (getattr(binary.metadata, "tmem_size", None) or 0) > 512:
        result.wrong.append(f"{binary.metadata.tmem_size} columns of tensor memory, the chip has 512")
    if case.tensor_core and not result.tensor:
        result.wrong.append(f"no {tensor_core}: tl.dot does not run on the architecture's tensor cores")
    return result


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def print_table(results: list[Result]) -> None:
    lines = [list(asdict(results[0]))[:-2], *([str(cell) for cell in asdict(r).values()][:-2] for r in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(*(f"{c:<{w}} " if i < 4 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))))


def main() -> int:
    parser = argparse.ArgumentParser(description="compile every kernel ahead of time, check what came out")
    parser.add_argument("--quick", action="store_true", help="one vocabulary size")
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="ARCH", help=" ".join(CHIPS))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="these kernels only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: Triton's interpreter does not compile. Unset it")

    tasks = []
    for arch in args.arch:
        with pretending(arch):
            kernels = [case.kernel for case in cases(arch, args.quick)]
        tasks += [(arch, args.quick, i) for i, name in enumerate(kernels) if not args.kernel or name in args.kernel]
    if not tasks:
        parser.error(f"--kernel {' '.join(args.kernel)}: there is no such kernel")
    began = time.perf_counter()
    lines: dict[tuple[str, str], Result] = {}  # cases that came out as the same compilation share one
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_case, *zip(*tasks, strict=True)):
            for result in found:
                if (same := lines.setdefault((result.arch, result.hash or result.case), result)) is not result:
                    same.case += f" = {result.case}"
    results = list(lines.values())
    print_table(results)
    wrong = [f"{r.arch} {r.kernel} ({r.case}): {what}" for r in results for what in r.wrong]
    print(f"\n{len(results)} compilations, triton {triton.__version__}, {time.perf_counter() - began:.0f} s")
    print("\n".join([*wrong, f"{len(wrong)} wrong"]))
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
