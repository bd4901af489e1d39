"""Read machine code: its loops, and what a trip through each executes, from the disassembly of one kernel.

Blocks of instructions and the branches between them make a graph; a back edge, to a block that every way there passes
through, makes a loop. Of a loop's own blocks, those on every way round are executed at every trip. The others are
behind a branch: a label's block, which one trip per row takes, or what a maximum's rise costs.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

CUDA_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);", re.M)
GCN_LINE = re.compile(r"^(?:(\.LBB\w+):|\t([a-z]\w+)(.*))", re.M)
# Classes of opcode, in the order they are tried: what NVIDIA's and AMD's are called from their beginning
CLASSES = {
    "MUFU": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "tensor": r"[HIQDOU]?\w*MMA|v_mfma|v_smfma",
    "FMA": r"FFMA|DFMA|HFMA|v_(pk_)?(fma|fmac|fmaak|fmamk)_",
    "MUL": r"FMUL|DMUL|HMUL|v_(pk_)?mul_f",
    "ADD": r"FADD|DADD|HADD|v_(pk_)?(add|sub|subrev)_f",
    "compare": r"FSETP|FSEL|FMNMX|FSET|FCHK|DSETP|v_(cmp|cmpx|max|min|max3|maximum)\w*_f|v_cndmask",
    "convert": r"F2F|I2F|F2I|FRND|v_cvt|v_perm",
    "global": r"LDG|STG|LD\b|ST\b|UTMA|UBLKCP|ATOM\b|ATOMG|RED|global_|buffer_|flat_",
    "local": r"LDL|STL|scratch_",
    "shared": r"LDS|STS|ATOMS|ds_",
    "shuffle": r"SHFL|REDUX|MATCH|VOTE|v_readlane|v_readfirstlane|v_writelane|v_mov_b32_dpp",
    "control": r"BAR|BSSY|BSYNC|BRA|EXIT|WARP|RET|CALL|YIELD|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|SYNCS|ERRBAR|CCTL|NANOSLEEP"
    r"|BREAK|BMOV|UCGABAR|ARRIVES|s_(c?branch|barrier|waitcnt|nop|endpgm|setprio|sleep|delay)",
    "move": r"MOV|UMOV|R2UR|S2R|S2UR|CS2R|U?LDC|PRMT|UPRMT|SEL|R2P|P2R|v_mov|v_accvgpr|s_mov|s_load",
    "integer": r"[IU][A-Z]|LOP|LEA|SHF|SGXT|VI|POPC|FLO|BMSK|PLOP|BREV|v_\w+_[iub]\d+|v_[a-z0-9_]+|s_\w+",
}  # fmt: skip
CLASS = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in CLASSES.items()))


@dataclass
class Instruction:
    opcode: str
    goes_on: bool = True  # the next may follow
    predicated: bool = False
    target: int | None = None  # index of the instruction that a branch goes to


@dataclass
class Loop:
    blocks: set[int]
    always: list[str]  # opcodes of a trip, without those of loops inside
    branches: list[str]  # behind a branch
    masked: bool = False  # it reads memory under predicates
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        yield self
        for loop in self.inner:
            yield from loop.walk()


@dataclass
class Program:
    outside: list[str]  # opcodes in no loop; what cannot be reached is nowhere
    loops: list[Loop]  # outermost, in the order of their first instructions


def classes(opcodes: list[str]) -> Counter[str]:
    matches = ((opcode, CLASS.match(opcode)) for opcode in opcodes)
    return Counter(match.lastgroup if match else opcode for opcode, match in matches)


def read_cuda(sass: str) -> list[Instruction]:
    """Return the instructions but NOPs."""
    lines = [m for m in CUDA_LINE.finditer(sass) if m[3] != "NOP"]
    addresses = [int(m[1], 16) for m in lines]
    instructions = []
    for _, predicate, opcode, operands in (m.groups() for m in lines):
        name, to = opcode.partition(".")[0], re.search(r"0x([0-9a-f]+)\s*$", operands)
        instruction = Instruction(opcode, predicated=bool(predicate))
        if name == "BRA" and to:
            instruction.target = bisect_left(addresses, int(to[1], 16))
            instruction.goes_on = bool(predicate) or "," in operands
        elif name in ("EXIT", "RET"):
            instruction.goes_on = bool(predicate)
        instructions.append(instruction)
    return instructions


def read_gcn(assembly: str) -> list[Instruction]:
    instructions, labels, targets = [], {}, {}
    for label, opcode, operands in (m.groups() for m in GCN_LINE.finditer(assembly.partition(".Lfunc_end")[0])):
        if label:
            labels[label] = len(instructions)
            continue
        if re.match("s_c?branch", opcode):
            targets[len(instructions)] = operands.split()[0]
        goes_on = opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")
        instructions.append(Instruction(opcode, goes_on))
    for at, label in targets.items():
        instructions[at].target = labels[label]
    return instructions


def loops_of(instructions: list[Instruction]) -> Program:
    starts = sorted(
        {0}
        | {x.target for x in instructions if x.target is not None}
        | {i + 1 for i, x in enumerate(instructions) if x.target is not None or not x.goes_on}
    )
    starts = [start for start in starts if start < len(instructions)]
    block_at = {start: b for b, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    after: list[set[int]] = []
    for end in ends:
        last = instructions[end - 1]
        follow = {end} if last.goes_on else set()
        after.append({block_at[i] for i in follow | ({last.target} - {None}) if i in block_at})

    reached, todo = {0}, [0]
    while todo:
        new = after[todo.pop()] - reached
        reached |= new
        todo += new
    before: dict[int, set[int]] = {b: set() for b in reached}
    for b in reached:
        for c in after[b]:
            before[c].add(b)
    dominators = {b: set(reached) for b in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            new = set.intersection(*(dominators[c] for c in before[b])) | {b}
            changed |= new != dominators[b]
            dominators[b] = new

    bodies: dict[int, set[int]] = {}  # by their first block
    latches: dict[int, set[int]] = {}
    for b in reached:
        for head in after[b] & dominators[b]:
            body, todo = bodies.setdefault(head, {head}), [b]
            latches.setdefault(head, set()).add(b)
            while todo:
                if (c := todo.pop()) not in body:
                    body.add(c)
                    todo += before[c]

    def opcodes(blocks: set[int]) -> list[str]:
        return [instructions[i].opcode for b in sorted(blocks) for i in range(starts[b], ends[b])]

    found: list[Loop] = []
    for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):  # inner ones first
        inner = [loop for loop in found if loop.blocks < body]
        own = body.difference(*(loop.blocks for loop in inner))
        always = own & set.intersection(*(dominators[latch] for latch in latches[head]))
        found = [loop for loop in found if loop not in inner]
        reads = [x for b in always for x in instructions[starts[b] : ends[b]] if x.opcode.startswith("LDG.")]
        inner.sort(key=lambda loop: min(loop.blocks))
        masked = any(x.predicated for x in reads)
        found.append(Loop(body, opcodes(always), opcodes(own - always), masked, inner))
    found.sort(key=lambda loop: min(loop.blocks))
    return Program(opcodes(reached.difference(*(loop.blocks for loop in found))), found)


def bytes_read(opcodes: list[str]) -> int:
    """Return the bytes that a thread reads from memory, straight into registers."""
    total = 0
    for opcode in opcodes:
        if opcode.startswith("LDG."):
            width = re.search(r"\.[US]?(8|16|64|128|256)$", opcode.replace(".CONSTANT", ""))
            total += int(width[1]) // 8 if width else 4
        elif m := re.match(r"(?:buffer|global|flat)_load_(?:dword(?:x(\d))?|[us]?(byte|short))", opcode):
            total += {"byte": 1, "short": 2}.get(m[2] or "", 4 * int(m[1] or 1))
    return total
