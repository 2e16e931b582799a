# SPDX-License-Identifier: Apache-2.0
"""PTX text -> the table of instructions that the emulator's core executes.

Opcodes are first reduced to canonical names: modifiers without meaning for one who executes in order (``sync``,
``aligned``, cache hints, ``approx``) are dropped. Whatever the core does not know raises NotImplementedError.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BRANCH, EXIT, BARRIER = -1, -2, -3  # in place of an opcode's number
ROW = 11  # integers per instruction, see ptx_run in core/emulator.cpp
SPECIAL = (
    "%tid.x", "%laneid", "%warpid", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
    "%nctaid.z",
)  # fmt: skip
_ONE_DIMENSIONAL = {
    "%tid.y": 0,
    "%tid.z": 0,
    "%ntid.y": 1,
    "%ntid.z": 1,
    "%cluster_ctarank": 0,
    "%cluster_ctaid.x": 0,
}

_IDLE = {"sync", "aligned", "uni", "approx", "full"}
_MEMORY_HINTS = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "relaxed", "acquire", "release", "acq_rel", "gpu", "cta",
    "sys", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L1::evict_normal", "L2::evict_first",
    "L2::evict_last", "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint", "volatile", "noinc",
}  # fmt: skip
_ONE_STATEMENT = re.compile(r"[^;{}:]+;")
_ROUNDED = ("add", "sub", "mul", "div", "fma", "rcp", "sqrt")  # to nearest unless they say otherwise
_WITHOUT_RESULT = ("st", "red", "cp", "bar", "barrier", "fence", "membar", "nop", "prefetch", "stmatrix", "nanosleep")
_RESULTLESS = (
    "mbarrier.init", "mbarrier.inval", "mbarrier.expect_tx", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
    "setmaxnreg", "tensormap.replace", "tensormap.cp_fenceproxy", "griddepcontrol",
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """``type`` is PTX's (u64, b32, f32, ...); ``size`` > 0 for a block of bytes passed by value."""

    type: str
    size: int = 0


@dataclass
class Program:
    """One kernel. Registers and constants share one index; ``initial`` holds the constants' values."""

    name: str
    lines: list[str]
    parameters: list[Parameter]
    parameter_registers: list[int]
    warps: int
    table: np.ndarray
    operands: np.ndarray
    initial: np.ndarray
    special: np.ndarray
    has_wgmma: bool


@dataclass
class _Registers:
    symbols: dict[str, int]
    index: dict[object, int] = field(default_factory=dict)
    initial: list[int] = field(default_factory=list)

    def _add(self, key: object, value: int) -> int:
        if key not in self.index:
            self.index[key] = len(self.initial)
            self.initial.append(value)
        return self.index[key]

    def named(self, name: str) -> int:
        return self._add(name, 0)

    def constant(self, value: int) -> int:
        return self._add(("constant", value & (2**64 - 1)), value & (2**64 - 1))

    def operand(self, text: str) -> int:
        if (known := self.index.get(text)) is not None:
            return known
        if text == "_":
            return -1
        if text in _ONE_DIMENSIONAL:
            return self.constant(_ONE_DIMENSIONAL[text])
        if text.startswith("%"):
            if "." in text and text not in SPECIAL:
                raise NotImplementedError(f"special register {text}")
            return self.named(text)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return self.constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.constant(int(text.rstrip("U"), 0))
        if text in ("true", "false"):
            return self.constant(int(text == "true"))
        symbol, _, offset = text.partition("+")
        if symbol in self.symbols:
            return self.constant(self.symbols[symbol] + int(offset or "0", 0))
        if re.fullmatch(r"[A-Za-z_$][\w$]*", text):  # a parameter, or a register of an inline assembly block
            return self.named(text)
        raise NotImplementedError(f"operand {text!r}")


@functools.cache
def canonical(opcode: str) -> str:
    """The opcode without what changes nothing here.

    >>> canonical("ld.global.L1::evict_last.v4.b32"), canonical("add.rn.f32"), canonical("shfl.sync.bfly.b32")
    ('ld.global.b32', 'add.f32', 'shfl.bfly.b32')
    """
    base, *rest = opcode.split(".")
    rest = [part.replace("shared::cta", "shared") for part in rest if part not in _IDLE]
    if base in ("ld", "st") and rest[0] != "param":
        rest = [part for part in rest if part not in _MEMORY_HINTS and part not in ("v2", "v4", "v8")]
        kind, width = re.fullmatch(r"([a-z]+)(\d+)", rest[-1]).groups()
        # only loads of signed bytes and halves extend the sign
        rest[-1] = f"s{width}" if base == "ld" and kind == "s" and int(width) < 64 else f"b{width}"
    elif base in ("atom", "red"):
        rest = [part for part in rest if part not in _MEMORY_HINTS]
    elif base == "cp" and rest[:2] in (["async", "ca"], ["async", "cg"]):
        rest = [part for part in rest if part in ("async", "ca", "cg", "shared", "global")]
    elif base in _ROUNDED and "rn" in rest:
        rest.remove("rn")
    elif base == "barrier" and rest[0] == "cta":
        rest = rest[1:]
    return ".".join([base, *rest])


def _results(name: str) -> int:
    """How many of the operands are written."""
    return int(not (name.split(".")[0] in _WITHOUT_RESULT or name.startswith(_RESULTLESS)))


def _split(text: str) -> list[str]:
    """Operands: at the commas that are not within brackets or braces."""
    if not any(bracket in text for bracket in "{[("):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    operands, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            operands.append(text[start:i].strip())
            start = i + 1
    return [*operands, text[start:].strip()] if text.strip() else []


def _statements(body: str, first_line: int) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(line, statement or ``label:``, scope) of a kernel's body; a scope is a path of nested blocks in braces."""
    scopes, blocks = [0], 0
    pending, started, depth = "", 0, 0
    for number, line in enumerate(body.split("\n"), first_line):
        line = line.partition("//")[0].strip()
        if not line or (line[0] == "." and re.match(r"\.(loc|file)\b", line)):
            continue
        if not pending and _ONE_STATEMENT.fullmatch(line):  # as most are
            yield number, line[:-1].rstrip(), tuple(scopes)
            continue
        for token in re.findall(r"[^;{}]+|[;{}]", line):
            if not pending.strip():
                started = number
                if token == "{":
                    blocks += 1
                    scopes.append(blocks)
                    continue
                if token == "}":
                    if len(scopes) > 1:
                        scopes.pop()
                    continue
                while label := re.match(r"\s*([\w$]+):(?!:)\s*", token):
                    yield number, label[1] + ":", tuple(scopes)
                    token = token[label.end() :]
            if token == ";" and not depth:
                if pending.strip():
                    yield started, pending.strip(), tuple(scopes)
                pending = ""
                continue
            depth += (token == "{") - (token == "}")
            pending += token if pending or token.strip() else ""
        pending += " " if pending else ""


class _Instruction(NamedTuple):
    """What a statement says, whatever the kernel. Operands are texts, the results first; offsets are of addresses."""

    guard: str
    negated: bool
    opcode: str
    name: str
    operands: list[str]
    results: int
    offsets: list[int]


@functools.lru_cache(maxsize=2**15)  # kernels that differ in one statement share all others
def _instruction(statement: str) -> _Instruction:
    guard, negated = "", False
    if match := re.match(r"@(!?)\s*([%\w$]+)\s+", statement):
        guard, negated = match[2], bool(match[1])
        statement = statement[match.end() :]
    opcode, rest = re.match(r"([\w.:]+)(.*)", statement, re.S).groups()
    name = canonical(opcode)
    if name == "bra":
        return _Instruction(guard, negated, opcode, name, [rest.strip()], 0, [])
    texts = _split(rest)
    if name.startswith("mov.b") and len(texts) == 2:  # of several registers into one, or of one into several
        if texts[1].startswith("{"):
            name = name.replace("mov", "pack")
        elif texts[0].startswith("{"):
            name = name.replace("mov", "unpack")
    offsets: list[int] = []

    def expand(text: str) -> list[str]:
        if text.startswith("{"):
            return [x for part in _split(text[1:-1]) for x in expand(part)]
        if text.startswith("["):
            inner = _split(text[1:-1])
            base, offset = re.fullmatch(r"([^+-]+)\+?(-?\w+)?", inner[0].replace(" ", "")).groups()
            offsets.append(int(offset or "0", 0))
            return [base, *(x for part in inner[1:] for x in expand(part))]
        if "|" in text:
            return [part.strip() for part in text.split("|")]
        return [text]

    count = _results(name)
    destinations = [x for text in texts[:count] for x in expand(text)]
    sources = [x for text in texts[count:] for x in expand(text)]
    return _Instruction(guard, negated, opcode, name, destinations + sources, len(destinations), offsets[:2])


def _body(ptx: str, start: int) -> tuple[int, int]:
    """Where the block that opens after ``start`` begins and ends."""
    opening = depth = None
    for brace in re.compile(r"//[^\n]*|[{}]").finditer(ptx, start):
        if brace[0] == "{":
            opening, depth = (brace.end(), 1) if opening is None else (opening, depth + 1)
        elif brace[0] == "}":
            depth -= 1
            if not depth:
                return opening, brace.start()
    raise ValueError("the kernel's body does not end")


def parse(ptx: str, opcode_number: Callable[[str], int]) -> Program:
    """The only kernel of a module. ``opcode_number`` tells the core's number of a canonical name, -1 if unknown."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)", ptx)
    if head is None:
        raise ValueError("no .entry in this PTX")
    begin, end = _body(ptx, head.end(3))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    shared = dict.fromkeys(re.findall(r"\.extern\s+\.shared\s.*?([\w$]+)\[\]", ptx), 0)
    registers = _Registers(shared)
    parameters, indices = [], []
    for declaration in filter(str.strip, head[2].split(",")):
        *_, name = declaration.split()
        array = re.fullmatch(r"([\w$]+)\[(\d+)\]", name)
        kind = re.search(r"\.([bufs]\d+)\b", declaration)[1]
        parameters.append(Parameter(kind, int(array[2]) if array else 0))
        indices.append(registers.named(array[1] if array else name))

    rows: list[list[int]] = []
    operands: list[int] = []
    labels: dict[tuple[int, str], int] = {}
    branches: list[tuple[int, str, tuple[int, ...]]] = []
    unknown: dict[str, int] = {}
    has_wgmma = False
    for line, statement, scope in _statements(ptx[begin:end], ptx.count("\n", 0, begin) + 1):
        if statement.endswith(":"):
            labels[scope[-1], statement[:-1]] = len(rows)
            continue
        if statement.startswith("."):
            if not statement.startswith((".reg", ".pragma")):
                raise NotImplementedError(f"PTX line {line}: {statement}")
            continue
        said = _instruction(statement)
        guard = registers.named(said.guard) if said.guard else -1
        row = [0, guard, int(said.negated), len(operands), 0, len(operands), 0, 0, line, 0, 0]
        rows.append(row)
        if said.name == "bra":
            row[0] = BRANCH
            branches.append((len(rows) - 1, said.operands[0], scope))
            continue
        if said.name in ("ret", "exit"):
            row[0] = EXIT
            continue
        try:
            operands += map(registers.operand, said.operands)
        except NotImplementedError as error:
            raise NotImplementedError(f"PTX line {line}: {statement}: {error}") from None
        row[0] = BARRIER if said.name in ("bar", "barrier") else opcode_number(said.name)
        if row[0] == -1:
            unknown.setdefault(said.opcode, line)
        has_wgmma |= said.name.startswith("wgmma")
        row[4], row[5], row[6] = said.results, row[3] + said.results, len(said.operands) - said.results
        row[9 : 9 + len(said.offsets)] = said.offsets
    if unknown:
        raise NotImplementedError("; ".join(f"opcode {name} (PTX line {line})" for name, line in unknown.items()))
    for row, label, scope in branches:
        rows[row][7] = next(labels[block, label] for block in reversed(scope) if (block, label) in labels)
    return Program(
        head[1], ptx.split("\n"), parameters, indices, int(threads[1]) // 32 if threads else 1,
        np.array(rows, np.int64).reshape(-1, ROW), np.array([*operands, 0], np.int32),
        np.array(registers.initial, np.uint64), np.array([registers.index.get(s, -1) for s in SPECIAL], np.int32),
        has_wgmma,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def parsed(ptx: str, opcode_number: Callable[[str], int]) -> Program:
    """:func:`parse`, once for each text."""
    return parse(ptx, opcode_number)
