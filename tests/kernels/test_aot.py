"""`make aot` as a gauge: it reads loops right, and the kernels that matter most keep to its limits on one chip."""

import json
import os
import subprocess
import sys

import machine_code
import pytest

# A row kernel in small: an early way out, a loop with a label's block out of its way, a loop in a loop, a trap
SASS = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;  /* 0x000 */
        /*0010*/               @P0 BRA 0x100 ;
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   NOP ;
        /*0060*/              @!P1 BRA 0x0c0 ;
        /*0070*/                   FADD.FTZ R4, R4, R5 ;
        /*0080*/               @P2 BRA 0x020 ;
        /*0090*/               @P3 FFMA R4, R4, R5, R6 ;
        /*00a0*/              @!P3 EXIT ;
        /*00b0*/                   BRA 0x100 ;
        /*00c0*/                   ISETP.NE.AND P1, PT, R4, R5, PT ;
        /*00d0*/                   FSEL R4, R4, R5, P1 ;
        /*00e0*/                   BRA 0x070 ;
        /*0100*/                   IMAD.MOV.U32 R9, RZ, RZ, R8 ;
        /*0110*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0120*/                   BRA.U !UP0, 0x110 ;
        /*0130*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0140*/               @P0 BRA 0x100 ;
        /*0150*/                   EXIT ;
        /*0160*/                   BRA 0x160;
"""
GCN = """
kernel:
\tv_mov_b32_e32 v0, 0
\ts_cbranch_scc1 .LBB0_3
.LBB0_1:  ; a loop
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_load_ushort v5, v4, s[0:3], 0 offen
\ts_cbranch_execz .LBB0_2
\tv_exp_f32_e32 v0, v0
.LBB0_2:
\tv_pk_fma_f32 v[0:1], v[0:1], v[2:3], v[4:5]
\ts_cbranch_scc0 .LBB0_1
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
\tv_of_another_function v0
"""


def test_loops_of_nvidias_machine_code():
    code = machine_code.loops_of(machine_code.read_cuda(SASS))
    row, tile = code.loops
    assert row.always == ["LDG.E.128.CONSTANT", "LDG.E.64", "MUFU.EX2", "BRA", "FADD.FTZ", "BRA"]
    assert row.branches == ["ISETP.NE.AND", "FSEL", "BRA"]
    assert machine_code.bytes_read(row.always) == 16 + 8
    assert not row.masked
    assert tile.always == ["IMAD.MOV.U32", "STG.E.128", "BRA"]
    assert [loop.always for loop in tile.walk()][1:] == [["HGMMA.64x128x16.F32.BF16", "BRA.U"]]
    assert code.outside == ["LDG.E", "BRA", "FFMA", "EXIT", "BRA", "EXIT"]  # the trap is never reached
    assert machine_code.classes(row.always) == {"global": 2, "MUFU": 1, "control": 2, "ADD": 1}
    assert machine_code.classes(tile.inner[0].always) == {"tensor": 1, "control": 1}


def test_loops_of_amds_assembly():
    code = machine_code.loops_of(machine_code.read_gcn(GCN))
    (loop,) = code.loops
    assert loop.always == [
        "global_load_dwordx4", "buffer_load_ushort", "s_cbranch_execz", "v_pk_fma_f32", "s_cbranch_scc0"
    ]  # fmt: skip
    assert loop.branches == ["v_exp_f32_e32"]
    assert machine_code.bytes_read(loop.always) == 16 + 2
    assert code.outside == ["v_mov_b32_e32", "s_cbranch_scc1", "s_endpgm"]


def test_kernels_keep_to_their_limits(tmp_path):
    """A few of `aot.LIMITS`, in a process of its own: where Triton interprets, it does not compile."""
    pytest.importorskip("triton")
    cases = ["forward_kl, plain", "forward_kl, metrics", "cross entropy alone", "jsd, plain"]
    cases += ["forward_kl, plain, bfloat16, N=4096"]
    options = ["--arch", "sm_90", "--quick", "--jobs", "1", "--json", tmp_path / "aot.json", "--case", *cases]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([".", environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "tests/kernels/aot.py", *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "aot.json").read_text())
    assert {case for case in cases for result in results if result["case"].startswith(case)} == {*cases}
    for result in results:
        passes = [float(figure) for figure in result["per_pair"].split("+") if figure]
        passes_of = 3 if "jsd" in result["case"] else 2
        assert len(passes) == {"row_kernel": passes_of, "combine_kernel": 0}.get(result["kernel"], 1), result
        assert all(5 < figure < 500 for figure in passes), result
        assert result["programs"] >= 1
