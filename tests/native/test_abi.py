# SPDX-License-Identifier: Apache-2.0
"""``peftkern.native.abi`` against ``csrc/peftkern.h``: structs, enums, functions and versions of both libraries."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
from pathlib import Path

import pytest

from peftkern import native
from peftkern.native import abi

from .. import skips

HEADER = Path(__file__).parents[2] / "csrc" / "peftkern.h"
STRUCTS = {x.name: x for x in vars(abi).values() if isinstance(x, abi.Struct) and x.name}


def _code() -> str:
    """The header without comments and preprocessor lines."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    return re.sub(r"^\s*#[^\n]*", "", text, flags=re.M)


def _declared_fields() -> dict[str, list[tuple[str, str, int]]]:
    """(name, kind, count) of the fields of each struct of the header, in order."""
    structs = {}
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", _code(), re.S):
        fields = []
        for declaration in filter(str.strip, body.split(";")):
            type_name, declarators = re.fullmatch(r"\s*(?:const )?(\w+)(\W.*)", declaration, re.S).groups()
            pointers = "*" in declarators.split(",")[0]
            for declarator in declarators.split(","):
                assert ("*" in declarator) == pointers, f"{name}: {declaration.strip()} mixes pointers and values"
                field, _, count = declarator.strip(" *]\n").partition("[")
                kind = "pointer" if pointers else type_name.removesuffix("_t")
                fields.append((field, kind, int(count or 1)))
        structs[name] = fields
    return structs


def _fields(declared: abi.Struct) -> list[tuple[str, str, int]]:
    """(name, kind, count) of the fields that :mod:`peftkern.native.abi` declares."""
    return [
        (field.name, field.kind.name if isinstance(field.kind, abi.Struct) else field.kind, field.count)
        for field in declared.members()
    ]


def _enum(name: str) -> dict[str, int]:
    """The enumerators of the header's ``enum name``."""
    body = re.search(rf"enum {name} \{{(.*?)\}}", _code(), re.S)[1]
    return {name: int(value) for name, value in re.findall(r"(\w+)\s*=\s*(\d+)", body)}


def test_every_struct_has_the_fields_of_the_header():
    """Their names, order, kinds and array lengths."""
    header = _declared_fields()
    assert header.keys() == STRUCTS.keys()
    for name, declared in STRUCTS.items():
        assert _fields(declared) == header[name], name


@skips.needs("cc")
def test_every_field_lies_where_the_compiler_puts_it(tmp_path):
    """sizeof of each struct, and offsetof and sizeof of each of its fields."""
    expected, lines = [], []
    for name, declared in STRUCTS.items():
        expected.append(declared.size)
        lines.append(f"  show(sizeof({name}));")
        offset = 0
        for field in declared.members():
            size = struct.calcsize(f"={field.format}")
            expected += [offset, size]
            lines.append(f"  show(offsetof({name}, {field.name})); show(sizeof((({name}*)0)->{field.name}));")
            offset += size
        assert offset == declared.size
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        'static void show(size_t x) { printf("%zu\\n", x); }\n'
        "int main(void) {\n" + "\n".join(lines) + "\n}\n"
    )
    subprocess.run([skips.command("cc"), "-o", str(tmp_path / "layout"), str(source)], check=True)
    shown = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True).stdout
    assert list(map(int, shown.split())) == expected


@pytest.mark.parametrize("name", STRUCTS)
def test_pack_writes_each_field_at_its_place(name):
    """Every field gets numbers of its own; the bytes contain them in the header's order."""
    numbers = itertools.count(1)
    expected: list[float] = []

    def packed(declared: abi.Struct) -> bytes:
        values = {}
        for field in declared.fields:
            if isinstance(field.kind, abi.Struct):
                values[field.name] = packed(field.kind)
                continue
            values[field.name] = tuple(itertools.islice(numbers, field.count))
            expected.extend(values[field.name])
            if field.count == 1:
                (values[field.name],) = values[field.name]
        return declared.pack(**values)

    def formats(declared: abi.Struct) -> str:
        return "".join(formats(f.kind) if isinstance(f.kind, abi.Struct) else f.format for f in declared.fields)

    data = packed(STRUCTS[name])
    assert len(data) == STRUCTS[name].size
    assert list(struct.unpack(f"={formats(STRUCTS[name])}", data)) == expected


def test_pack_wants_every_field_by_name():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'device'"):
        abi.CUDA_EMBEDDING.pack(backward=bytes(abi.EMBEDDING_BACKWARD.size), stream=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'devise'"):
        abi.CUDA_EMBEDDING.pack(backward=b"", devise=0, stream=0)
    with pytest.raises(struct.error):
        abi.EMBEDDING_BACKWARD.pack(forward=b"", dout=0, dweight=0, dprompt=0, dout_stride=(1, 2, 3))


def test_enums_are_those_of_the_header():
    assert {f"PEFTKERN_{x.name}": x.value for x in abi.Status} == _enum("peftkern_status")
    dtypes = {f"PEFTKERN_{str(x).removeprefix('torch.').upper()}": code for x, code in abi.DTYPES.items()}
    assert dtypes == _enum("peftkern_dtype")
    assert {f"PEFTKERN_ISA_{name.upper()}": code for name, code in abi.ISAS.items()} == _enum("peftkern_isa")


def test_versions_are_those_of_the_header():
    versions = dict(re.findall(r"#define (PEFTKERN_\w*ABI_VERSION) (\d+)", HEADER.read_text()))
    assert versions == {
        "PEFTKERN_ABI_VERSION": str(abi.CPU_VERSION), "PEFTKERN_CUDA_ABI_VERSION": str(abi.CUDA_VERSION)
    }  # fmt: skip
    assert (native.cpu.ABI_VERSION, native.cuda.ABI_VERSION) == (abi.CPU_VERSION, abi.CUDA_VERSION)


def test_functions_take_the_structs_of_the_header():
    prototypes = re.findall(r"PEFTKERN_API (\w+) (\w+)\(const (\w+)\* args\);", _code())
    declared = {f"peftkern_{name}": x.name for name, x in abi.CPU_FUNCTIONS.items()}
    declared |= {f"peftkern_cuda_{name}": x.name for name, x in abi.CUDA_FUNCTIONS.items()}
    assert {name: arguments for _, name, arguments in prototypes} == declared
    for result, name, _ in prototypes:
        assert result == ("int64_t" if name.endswith("_size") else "int")
