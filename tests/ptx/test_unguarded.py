"""The check of asynchronous work in PTX: small kernels written by hand, and what Triton compiles."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from fastbf.backend import _release
from tests.ptx.unguarded import faults

HEADER = """
.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 256
{
	mov.u32 %r1, %tid.x;
	mov.b32 %r2, global_smem;
	shl.b32 %r3, %r1, 4;
	add.s32 %r4, %r2, %r3;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b32 %r5, [kernel_param_1];
"""
#: 256 threads copy 4096 bytes to the first buffer, to the second.
COPY = "cp.async.cg.shared.global [ %r4 + 0 ], [ %rd1 + 0 ], 0x10;"
COPY_2 = "cp.async.cg.shared.global [ %r4 + 4096 ], [ %rd1 + 0 ], 0x10;"
ARRIVE = "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
#: A product with 16 columns of 64 rows of 128 bytes, from the first buffer on; its left operand is in registers.
DESCRIPTOR = "mov.b64 %rd2, 4611686293372403712;"
SUMS = ",".join(f"%r{i}" for i in range(100, 108))
WGMMA = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
    f"{{{SUMS}}}, {{%r20,%r21,%r22,%r23}}, %rd2, p, 1, 1, 0; wgmma.commit_group.sync.aligned;"
)
WAIT, WAIT_1 = "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"


def found(*body: str, tile=None) -> list[str]:
    text = HEADER + "\n".join(body) + "\nret;\n}\n"
    return faults(text, () if tile is None else (tile,))


def loop(*body: str) -> tuple[str, ...]:
    return (
        "mov.b32 %r9, 0;",
        "$L_top:",
        *body,
        "add.s32 %r9, %r9, 1;",
        "setp.lt.s32 %p1, %r9, %r5;",
        "@%p1 bra $L_top;",
    )


@pytest.mark.parametrize("write", [COPY, "st.shared.v4.b32 [ %r4 + 0 ], {%r6, %r6, %r6, %r6};"])
def test_what_a_product_reads_is_not_overwritten_before_the_wait(write):
    begun = (COPY, ARRIVE, DESCRIPTOR, WGMMA)
    assert any("overwrites what wgmma" in fault for fault in found(*begun, write))
    assert not found(*begun, WAIT, "bar.sync 0;", write)
    assert not found(*begun, COPY_2)  # another place


def test_a_wait_holds_for_the_own_warps_and_a_barrier_for_the_rest():
    begun = (COPY, ARRIVE, DESCRIPTOR, WGMMA)
    assert any("other warps" in fault for fault in found(*begun, WAIT, COPY))
    assert any("other warps" in fault for fault in found(*begun, "bar.sync 0;", WAIT, COPY))


def test_a_wait_for_all_but_some_groups():
    begun = (COPY, ARRIVE, DESCRIPTOR, WGMMA, "wgmma.commit_group.sync.aligned;")
    assert not found(*begun, WAIT_1, "bar.sync 0;", COPY)  # the empty group may be under way
    assert found(*begun, "wgmma.wait_group.sync.aligned 2;", "bar.sync 0;", COPY)


@pytest.mark.parametrize(("wait", "expected"), [(WAIT, False), (WAIT_1, True)])
def test_over_the_back_edge_of_a_loop(wait, expected):
    """The copy stands before the product, and meets that of the iteration before."""
    assert bool(found(DESCRIPTOR, *loop("bar.sync 0;", COPY, ARRIVE, WGMMA, wait))) == expected


@pytest.mark.parametrize(("buffers", "expected"), [(1, True), (2, False), (3, False)])
def test_buffers_that_take_turns(buffers, expected):
    """A product of one iteration is under way while the next copies into another buffer, if there is another."""
    turn = (
        "add.s32 %r10, %r10, 1;", f"setp.ge.s32 %p2, %r10, {buffers};", "selp.b32 %r10, 0, %r10, %p2;",
        "shl.b32 %r11, %r10, 12;", "add.s32 %r12, %r4, %r11;", "shr.u32 %r13, %r11, 4;", "cvt.u64.u32 %rd3, %r13;",
        "or.b64 %rd2, %rd3, 4611686293372403712;",
    )  # fmt: skip
    copy = "cp.async.cg.shared.global [ %r12 + 0 ], [ %rd1 + 0 ], 0x10;"
    body = (*turn, copy, ARRIVE, WGMMA, WAIT_1)
    assert any("overwrites what wgmma" in fault for fault in found("mov.b32 %r10, 0;", *loop(*body))) == expected


@pytest.mark.parametrize(
    "instruction",
    ["mov.b32 %r21, 0;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r4+8192];"],
)
def test_registers_of_the_left_operand_are_not_written_before_the_wait(instruction):
    begun = (COPY, ARRIVE, DESCRIPTOR, WGMMA)
    assert any("writes registers" in fault for fault in found(*begun, instruction))
    assert not found(*begun, WAIT, instruction)


def test_registers_that_a_product_adds_to_are_not_touched_before_the_wait():
    begun = (COPY, ARRIVE, DESCRIPTOR, WGMMA)
    read, written = "mov.b32 %r50, %r101;", "mov.b32 %r101, 0;"
    assert found(*begun, read)
    assert found(*begun, written)
    assert not found(*begun, WAIT, read, written)
    assert not found(*begun, WGMMA, WAIT)  # the next adds to the same


STORE, LOAD = "st.shared.v4.b32 [ %r4 + 0 ], {%r6, %r6, %r6, %r6};", "ld.shared.b32 %r6, [%r4+0];"


def test_a_product_reads_what_other_threads_stored_after_a_barrier():
    assert any("may still store" in fault for fault in found(DESCRIPTOR, STORE, WGMMA, WAIT))
    assert not found(DESCRIPTOR, STORE, "bar.sync 0;", WGMMA, WAIT)


def test_a_copy_overwrites_what_other_threads_loaded_after_a_barrier():
    assert any("may still load" in fault for fault in found(STORE, "bar.sync 0;", LOAD, COPY))
    assert not found(STORE, "bar.sync 0;", LOAD, "bar.sync 0;", COPY)
    assert not found(STORE, "bar.sync 0;", LOAD, COPY_2)


def test_nothing_is_stored_over_what_others_may_still_copy():
    waited = (COPY, "cp.async.commit_group; cp.async.wait_group 0;")
    assert any("may still copy" in fault for fault in found(*waited, STORE))
    assert not found(*waited, "bar.sync 0;", STORE)


def test_groups_that_nobody_waits_for_do_not_add_up():
    """The walk comes to an end, and says what it found."""
    assert found(*loop(COPY, "cp.async.commit_group;", LOAD))


@pytest.mark.parametrize("order", ["cp.async.wait_group 0;", "bar.sync 0;", "cp.async.commit_group;"])
def test_what_orders_work_for_some_threads_only(order):
    some = ("setp.lt.u32 %p3, %r1, 128;", f"@%p3 {order}")
    assert any("some threads only" in fault for fault in found(COPY, *some))


def test_a_loop_that_some_threads_leave_sooner():
    body = ("setp.lt.s32 %p1, %r9, %r1;", "@%p1 bra $L_top;")
    loaded = ("mov.b32 %r9, 0;", "$L_top:", LOAD, COPY, "cp.async.commit_group;", "add.s32 %r9, %r9, 1;", *body)
    assert any("where a copy may be under way" in fault for fault in found(*loaded))


@pytest.mark.parametrize(
    "instruction", ["cp.async.bulk.commit_group;", "wgmma.unheard.of;", "mbarrier.test_wait.b64 %p9, [%r4], %rd1;"]
)
def test_an_unknown_instruction_of_the_families(instruction):
    assert any("does not know" in fault for fault in found(COPY, ARRIVE, instruction))


@pytest.mark.parametrize("access", ["ld.volatile.shared.b32 %r6, [%r4+0];", "atom.shared.add.u32 %r6, [%r4+0], 1;"])
def test_other_ways_to_touch_shared_memory(access):
    assert any("where a copy may be under way" in fault for fault in found(COPY, "cp.async.commit_group;", access))


@pytest.mark.parametrize("address", ["%r4 + 262144", "%r50 + 8192"])
def test_addresses_have_32_bits_and_end(address):
    before = ("sub.s32 %r50, %r4, 8192;", COPY, "cp.async.commit_group;")
    assert found(*before, f"ld.shared.b32 %r6, [{address}];")


def test_what_is_copied_is_read_after_a_wait_and_a_barrier():
    assert any("under way" in fault for fault in found(COPY, "cp.async.commit_group;", LOAD))
    assert any(
        "other threads may still copy" in fault
        for fault in found(COPY, "cp.async.commit_group; cp.async.wait_group 0;", LOAD)
    )
    assert not found(COPY, ARRIVE, LOAD)
    groups = (COPY, "cp.async.commit_group;", COPY_2, "cp.async.commit_group; cp.async.wait_group 1; bar.sync 0;")
    assert not found(*groups, LOAD)
    assert found(*groups, "ld.shared.b32 %r6, [%r4+4096];")
    assert found(COPY, "cp.async.wait_all;", LOAD)  # no barrier
    assert not found(COPY, "cp.async.wait_all; bar.sync 0;", LOAD)


def test_a_product_waits_for_its_copies_too():
    assert found(COPY, "cp.async.commit_group;", DESCRIPTOR, WGMMA, WAIT)
    assert not found(COPY, ARRIVE, DESCRIPTOR, WGMMA, WAIT)


def test_nothing_is_stored_where_a_copy_is_under_way():
    store = "st.shared.b32 [ %r4 + {} ], %r6;"
    assert found(COPY, "cp.async.commit_group;", store.format(0))
    assert not found(COPY, "cp.async.commit_group;", store.format(4096))


def test_only_threads_whose_guard_holds_copy():
    few = ("setp.lt.u32 %p3, %r1, 16;", f"@%p3 {COPY} cp.async.commit_group;")
    assert not found(*few, "ld.shared.b32 %r6, [%r2+256];")
    assert found(*few, "ld.shared.b32 %r6, [%r2+240];")


def test_an_address_that_is_not_known_is_everywhere():
    unknown = ("ld.global.b32 %r30, [%rd1];", "cp.async.cg.shared.global [ %r30 + 0 ], [ %rd1 + 0 ], 0x10;")
    assert found(COPY, ARRIVE, DESCRIPTOR, WGMMA, *unknown)
    assert not found(COPY, ARRIVE, DESCRIPTOR, WGMMA, WAIT, "bar.sync 0;", *unknown)


def test_a_number_that_grows_without_end():
    """The walk comes to an end, as from some point on the number is not known."""
    body = ("shl.b32 %r40, %r9, 2;", "add.s32 %r41, %r2, %r40;", "st.shared.b32 [ %r41 + 0 ], %r6;")
    assert not found(*loop(COPY, ARRIVE, *body, "bar.sync 0;"))
    assert found(*loop(COPY, "cp.async.commit_group;", *body, "cp.async.wait_group 0;", "bar.sync 0;"))


MMA = (
    "mov.b64 %rd4, 4611686293305294848;", "mov.b32 %r60, 134743184;",
    "tcgen05.mma.cta_group::1.kind::f16 [ %r61 + 0 ], %rd4, %rd4, %r60, %p5;",
)  # fmt: skip
BARRIER = "add.s32 %r62, %r2, 65536; mbarrier.init.shared::cta.b64 [%r62], 1;"
SIGNAL = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r62];"
AWAIT = (
    "{{\nwaitLoop:\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%r62], {};\n@!complete bra.uni waitLoop;\n}}"
)


def test_products_that_arrive_at_a_barrier():
    begun = (COPY, ARRIVE, BARRIER, *MMA, SIGNAL)
    assert any("overwrites what tcgen05" in fault for fault in found(*begun, COPY, tile=64))
    assert not found(*begun, AWAIT.format(0), COPY, tile=64)
    assert found(*begun, AWAIT.format(1), COPY, tile=64)  # the phase before
    second = (*begun, AWAIT.format(0), *MMA, SIGNAL)
    assert found(*second, AWAIT.format(0), COPY, tile=64)
    assert not found(*second, AWAIT.format(1), COPY, tile=64)


COMPILE = """
import json, sys
from fastbf.kernels.attention_configs import Config
from tests import aot
from tests.aot_jobs import attention_jobs
from tests.ptx.unguarded import faults

for tile, *rest in json.loads(sys.argv[1]):
    kinds = set()
    for job in attention_jobs("backward_key_value", Config(*tile), *rest):
        for fault in faults(aot.compiled_kernel(job).asm["ptx"], job.sides):
            kinds |= {kind for kind in ("overwrites", "writes registers") if kind in fault}
    print(json.dumps(sorted(kinds)))
"""
#: Tiles of backward_key_value, and what is wrong with what Triton 3.6.0 and 3.7.1 compile them to for sm_90.
TILES = [
    ((32, 64, 128, 8, 2), "bf16", 256, ["overwrites", "writes registers"]),
    ((32, 64, 128, 8, 3), "bf16", 128, ["overwrites", "writes registers"]),
    ((16, 64, 64, 8, 2), "fp32", 128, ["overwrites", "writes registers"]),
    ((128, 16, 128, 8, 2), "bf16", 256, []),
    ((32, 32, 128, 8, 2), "bf16", 256, []),
    ((32, 64, 128, 8, 1), "bf16", 256, []),
    ((128, 16, 128, 8, 3), "bf16", 128, []),
    ((32, 64, 128, 8, 1), "bf16", 128, []),
]


def compiling(*arguments: str) -> list[str]:
    """Lines that Python prints in a process of its own, as kernels of this one may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_what_triton_compiles():
    jobs = [(tile, dtype, "tf32", head_dim, 1, 90) for tile, dtype, head_dim, _ in TILES]
    found = [set(json.loads(line)) for line in compiling("-c", COMPILE, json.dumps(jobs))]
    expected = [set(kinds) for *_, kinds in TILES]
    if _release(triton.__version__) >= (3, 8):  # whose code overwrites what is being read, but waits for registers
        expected = [{"overwrites"} & kinds for kinds in expected]
        found = [{"overwrites"} & kinds for kinds in found]
    assert found == expected


def test_the_report_for_triton(tmp_path):
    """Its kernel is compiled to what it says, by the version that it shows."""
    report = (Path(__file__).parents[2] / "docs" / "triton-wgmma.md").read_text(encoding="utf-8")
    script, ptx, code = re.findall(r"```(?:python)?\n(.+?)```", report, flags=re.DOTALL)[:3]
    (tmp_path / "report.py").write_text(script, encoding="utf-8")
    version, *lines = compiling(str(tmp_path / "report.py"))
    if version != "triton 3.7.1":
        pytest.skip(f"shows what Triton 3.7.1 does, not {version}")
    assert set(code.splitlines()) <= set(lines)
    shown = [re.split(r"…|;  ", line)[0].rstrip(";") for line in ptx.splitlines()]
    assert all(any(line.startswith(start) for line in lines) for start in shown)
