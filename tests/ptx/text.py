"""PTX text to instructions: of the one kernel in it, in order, with the labels that branches lead to."""

from __future__ import annotations

import re
from functools import cached_property
from typing import NamedTuple

#: What has no register for a result; its first operand is read like the rest.
_NO_RESULT = (
    "st", "cp", "bar", "barrier", "bra", "ret", "exit", "trap", "fence", "membar", "red", "wgmma", "stmatrix", "call",
    "prefetch", "griddepcontrol", "nanosleep",
)  # fmt: skip
_NO_RESULT_OF = {
    "mbarrier": ("init", "inval", "arrive", "expect_tx"),
    "tcgen05": ("st", "mma", "commit", "wait", "alloc", "dealloc", "relinquish_alloc_permit", "fence", "cp"),
}
_REGISTER = re.compile(r"%[a-z]+\d+\b")
_LABEL = re.compile(r"^([$\w]+):")


class Instruction:
    """One instruction: ``@!guard opcode operands``."""

    def __init__(
        self, opcode: str, operands: list[str], guard: str, negated: bool, line: int, kernel_line: str
    ) -> None:
        self.opcode = opcode
        self.operands = operands
        self.guard = guard  #: a predicate register, or empty
        self.negated = negated
        self.line = line  #: in the PTX text
        self.kernel_line = kernel_line  #: file:line of the kernel's source

    @cached_property
    def parts(self) -> list[str]:
        """The opcode and its modifiers: ``wgmma``, ``mma_async``, …"""
        return [part for part in self.opcode.split(".") if part]

    @cached_property
    def writes(self) -> frozenset[str]:
        """Registers that it leaves a result in; of a wgmma, which does so later, none."""
        name = self.parts[0]
        without = name in _NO_RESULT or set(self.parts[1:2]) & set(_NO_RESULT_OF.get(name, ()))
        return frozenset() if without or not self.operands else frozenset(registers(self.operands[0]))

    @cached_property
    def reads(self) -> frozenset[str]:
        """Registers that it takes."""
        operands = self.operands[1:] if self.writes else self.operands
        return frozenset(registers(" ".join((*operands, self.guard))))

    def __str__(self) -> str:
        return f"{self.opcode} (PTX line {self.line}, {self.kernel_line})"


class Program(NamedTuple):
    """A kernel."""

    code: list[Instruction]
    labels: dict[str, int]  #: position in the code
    threads: int  #: of a program


def registers(operand: str) -> list[str]:
    """The registers of an operand, a vector's in order."""
    return _REGISTER.findall(operand)


def elements(operands: list[str]) -> list[str]:
    """Operands, a vector's elements one by one."""
    return [element for operand in operands for element in _split(operand.strip("{} "))]


def parse(text: str) -> Program:
    """Reads what Triton gives as ``asm["ptx"]``."""
    lines = text.splitlines()
    threads = int(re.search(r"^\s*\.reqntid\s+(\d+)", text, re.M)[1])
    start = next(i for i, line in enumerate(lines) if line.strip() == "{")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    kernel_line, scope, scopes, rest = "", "", 0, ""
    for number, line in enumerate(lines[start + 1 :], start + 2):
        line, _, comment = line.partition("//")
        if line.strip().startswith(".loc"):
            kernel_line = comment.split("@")[0].strip()
            continue
        rest = f"{rest} {line.strip()}".strip()
        while rest:
            if rest[0] in "{}":  # a scope of inline assembly, with labels and predicates of its own
                scopes += rest[0] == "{"
                scope, rest = (f"#{scopes}" if rest[0] == "{" else ""), rest[1:].strip()
            elif label := _LABEL.match(rest):
                labels[label[1] + (scope if label[1][0] != "$" else "")] = len(code)
                rest = rest[label.end() :].strip()
            elif ";" in rest:
                statement, _, rest = rest.partition(";")
                rest = rest.strip()
                if not statement.startswith("."):
                    code.append(_instruction(statement, number, kernel_line, scope))
            elif rest.startswith("."):  # a directive without a semicolon
                rest = ""
            else:
                break
    return Program(code, labels, threads)


def _instruction(statement: str, line: int, kernel_line: str, scope: str) -> Instruction:
    guard, negated = "", False
    if statement[0] == "@":
        guard, _, statement = statement.partition(" ")
        guard, negated = guard.lstrip("@!"), "!" in guard
    opcode, *operands = re.split(r"\s+", statement.strip(), maxsplit=1)
    operands = _split(operands[0]) if operands else []
    if opcode.startswith("bra") and operands[0][0] != "$":
        operands[0] += scope
    return Instruction(opcode, operands, guard, negated, line, kernel_line)


def _split(operands: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and not depth:
            parts.append(operands[start:i].strip())
            start = i + 1
    return [*parts, operands[start:].strip()]
