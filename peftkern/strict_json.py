# SPDX-License-Identifier: Apache-2.0
"""Reads JSON files that may come from anywhere."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

__all__ = ["json_object", "read_bytes", "shown"]

#: Bytes of a file of JSON. One that describes thousands of layers takes less than one million.
_MAX_BYTES = 1 << 24

#: Digits of an integer: those of 64 bits and a sign.
_MAX_DIGITS = 20

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 3


def json_object(data: bytes | str) -> dict[str, Any]:
    """The fields of a JSON object, whose numbers are finite and have at most 64 bits.

    Raises:
        ValueError: saying what was found, for anything else.
    """
    try:
        value = json.loads(data, parse_int=_integer, parse_float=_number, parse_constant=_number)
    except RecursionError as error:
        raise ValueError("brackets that are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are not text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"text that is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}")
    return value


def read_bytes(path: Path) -> bytes:
    """The contents of a file for :func:`json_object`.

    Raises:
        OSError: for a file that does not exist or cannot be read.
        ValueError: saying what was found, for something that is not a file, such as a pipe, or a huge file.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("something that is not a file")
    if size > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return path.read_bytes()


def shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    return _REPR.repr(value)


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"the number {text}, which takes more than 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40}")
    return value
