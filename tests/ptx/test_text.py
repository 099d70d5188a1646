"""PTX text as the guard reads it."""

from tests.ptx.text import elements, parse

TEXT = """
.version 8.5
.target sm_90a
.visible .entry kernel(
\t.param .u64 kernel_param_0
)
.reqntid 128
{
\t.reg .pred \t%p<3>;
\t.loc\t1 12 8                          // kernel.py:12:8 @[ other.py:1:1 ]
\tmov.u32 \t%r1, %tid.x; add.s32 %r2, %r1, 4;   // two on a line
$L__BB0_1:                              // %loop
\t@!%p1 bra.uni \t$L__BB0_2;
{
waitLoop:
\t.reg .pred complete;
\tmbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
\t@!complete bra.uni waitLoop;
}
{
waitLoop:
\t@!complete bra.uni waitLoop;
}
\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2+16];
\tst.shared.v2.b32 [ %r1 + 0 ],
\t\t{ %r3, %r4 };
$L__BB0_2:
\tret;
}
"""


def test_instructions_and_where_they_stand():
    program = parse(TEXT)
    assert program.threads == 128
    assert [i.parts[0] for i in program.code] == [
        "mov",
        "add",
        "bra",
        "mbarrier",
        "bra",
        "bra",
        "ldmatrix",
        "st",
        "ret",
    ]
    add, branch = program.code[1:3]
    assert (add.operands, add.line, add.kernel_line) == (["%r2", "%r1", "4"], 11, "kernel.py:12:8")
    assert (branch.guard, branch.negated) == ("%p1", True)


def test_labels_of_inline_assembly_are_its_own():
    program = parse(TEXT)
    first, second = program.code[4:6]
    assert program.labels[first.operands[0]] == 3
    assert program.labels[second.operands[0]] == 5
    assert program.labels["$L__BB0_2"] == 8


def test_registers_read_and_written():
    *_, ldmatrix, store, _ = parse(TEXT).code
    assert (ldmatrix.writes, ldmatrix.reads) == ({"%r3", "%r4", "%r5", "%r6"}, {"%r2"})
    assert (store.writes, store.reads) == (set(), {"%r1", "%r3", "%r4"})


def test_elements_of_vectors():
    assert elements(["{%r1, %r2}", "5"]) == ["%r1", "%r2", "5"]
