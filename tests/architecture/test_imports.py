# SPDX-License-Identifier: Apache-2.0
"""Imports inside the package run downward, without a circle; those under TYPE_CHECKING and in functions count too."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "peftkern"

#: The layers, and the other layers that each may import. A module's layer is the longest of these prefixes of its
#: name.
ALLOWED = {
    "arguments": set(),
    "reference": set(),
    "overrides": set(),
    "argument_types": set(),
    "eager_attention": {"overrides"},
    "model_info": {"eager_attention", "overrides"},
    "processor": set(),
    "callers": set(),
    "validation": {"arguments"},
    "native": {"arguments"},
    "backends.cost": {"arguments", "strict_json", "user_cache"},
    "backends.reference": {"arguments", "backends", "backends.cost", "reference"},
    "backends": {
        "arguments", "callers", "native", "backends.cost", "processor", "files", "strict_json", "user_cache",
    },
    "backends.registry": {
        "argument_types", "arguments", "callers", "backends", "backends.cost", "backends.reference",
    },
    "dispatcher": set(),
    "op_checks": {"arguments", "validation", "backends", "backends.registry"},
    "ops": {"arguments", "backends", "backends.registry", "dispatcher", "op_checks"},
    "functional": {"arguments", "validation", "backends", "backends.registry", "ops"},
    "output_layer": set(),
    "distillation": {"argument_types", "arguments", "validation", "output_layer"},
    "layer_shapes": {"model_info"},
    "prefix_layout": {"layer_shapes", "model_info"},
    "prefix_parts": {"eager_attention", "layer_shapes", "model_info"},
    "prefix_fields": {"layer_shapes", "model_info"},
    "prefix_length": {
        "argument_types", "prefix_fields", "prefix_layout", "prefix_parts", "layer_shapes", "model_info",
    },
    "recurrent_state": {"model_info"},
    "prefix_bank": {"argument_types", "prefix_fields"},
    "prefix_options": {"prefix_layout", "prefix_parts"},
    "prefix_starts": {
        "argument_types", "prefix_length", "prefix_parts", "recurrent_state", "layer_shapes", "model_info",
    },
    "prefix_kv": {
        "argument_types", "prefix_bank", "prefix_starts", "prefix_length", "prefix_layout", "prefix_options",
        "prefix_parts", "recurrent_state", "layer_shapes", "model_info",
    },
    "soft_prompt": {"argument_types", "functional", "model_info"},
    "modules": {"prefix_kv", "soft_prompt"},
    "files": set(),
    "integrations.kv_file": {"files"},
    "integrations.torch_file": set(),
    "integrations.cartridge_file": {"integrations.kv_file", "integrations.torch_file"},
    "strict_json": set(),
    "user_cache": set(),
    "checkpoint_config": {
        "layer_shapes", "model_info", "prefix_layout", "prefix_options", "prefix_parts", "recurrent_state",
        "strict_json", "integrations.kv_file",
    },
    "checkpoint_files": {"checkpoint_config", "model_info", "strict_json"},
    "checkpoint": {
        "argument_types", "callers", "modules", "recurrent_state", "model_info", "files", "integrations.kv_file",
        "integrations.cartridge_file", "checkpoint_config", "checkpoint_files", "strict_json",
    },
    "integrations.prefix_folder": {"integrations.kv_file"},
    "integrations.vllm": {"integrations.prefix_folder"},
    "integrations": {
        "argument_types", "files", "integrations.kv_file", "integrations.cartridge_file", "modules", "checkpoint",
        "model_info",
    },
    "huggingface": {
        "argument_types", "arguments", "callers", "checkpoint", "checkpoint_files", "distillation", "functional",
        "modules", "eager_attention", "layer_shapes", "model_info", "overrides", "prefix_parts", "recurrent_state",
        "backends.registry",
    },
    "self_study": {"files", "modules", "model_info", "distillation", "huggingface"},
    "explanation": {"arguments", "validation", "backends.registry", "functional", "huggingface"},
    "testing": {"arguments", "reference", "backends", "functional"},
    "tools": {
        "arguments", "native", "backends", "backends.cost", "backends.registry", "functional", "modules",
        "checkpoint", "checkpoint_files", "files", "huggingface", "integrations", "model_info", "processor",
        "explanation", "self_study", "testing", "user_cache", "",
    },
}  # fmt: skip
#: Entry points, which import the layers below them: the package itself, and `python -m peftkern`.
ENTRY_POINTS = {
    "": set(ALLOWED),
    "__main__": {"tools"},
    "backends.__init__": {"arguments", "backends", "backends.registry"},
}


class Import(NamedTuple):
    """``module`` imports ``target`` in this line; names are relative to the package."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module} -> {self.target} (line {self.line})"


def _modules() -> dict[str, Path]:
    """Module names relative to the package ("backends.cost.model"; packages without "__init__") and their files."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(module: str) -> list[Import]:
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" and module else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join(["peftkern", *above, *([node.module] if node.module else [])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in targets:
            if base.split(".")[0] != "peftkern":
                continue
            inner = base.removeprefix("peftkern").removeprefix(".")
            as_module = ".".join(filter(None, (inner, name)))
            target = as_module if name and as_module in MODULES else inner
            if target in MODULES and target != module:
                found.append(Import(module, target, node.lineno))
    return found


IMPORTS = [found for module in MODULES for found in _imports(module)]


def _layer(module: str) -> str:
    return max((layer for layer in ALLOWED if f"{module}.".startswith(f"{layer}.")), key=len, default=module)


def test_the_imports_are_found():
    """The check below would pass on an empty list."""
    edges = {(found.module, found.target) for found in IMPORTS}
    assert ("functional", "ops") in edges
    assert ("backends.merge", "backends.composite") in edges
    assert len(edges) > 150


def test_every_module_has_a_layer():
    unassigned = [module for module in MODULES if _layer(module) not in ALLOWED and module not in ENTRY_POINTS]
    assert not unassigned, f"modules without a layer in {Path(__file__).name}: {unassigned}"


def test_no_import_runs_upward():
    def is_allowed(found: Import) -> bool:
        source, target = _layer(found.module), _layer(found.target)
        entry_point = ENTRY_POINTS.get(found.module, ENTRY_POINTS.get(f"{found.module}.__init__"))
        allowed = ALLOWED.get(source, set()) if entry_point is None else entry_point
        return target == source or target in allowed

    upward = [str(found) for found in IMPORTS if not is_allowed(found)]
    assert not upward, "imports that the architecture does not allow:\n" + "\n".join(upward)


def test_there_is_no_circle():
    circles = _circles({module: {f.target for f in IMPORTS if f.module == module} for module in MODULES})
    assert not circles, "modules that import each other:\n" + "\n".join(" <-> ".join(circle) for circle in circles)


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


@pytest.mark.parametrize(
    ("graph", "circles"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c"]]),
        ({"a": {"c"}, "b": {"a"}, "c": {"b"}, "d": {"a"}}, [["a", "b", "c"]]),
    ],
)
def test_circles_are_found(graph, circles):
    assert _circles(graph) == circles
