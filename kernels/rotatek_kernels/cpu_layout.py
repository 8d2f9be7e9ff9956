"""Declare the structures that `cpu/attend.cpp` reads, once: those of C++ are generated from these.

Every field is a word of 64 bits, so that a structure is its fields one after the other. `header` writes the fields as
macros, which the structures of `cpu/storage.h` begin with and assert to be all that they hold.
"""

from array import array
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch

# `Type` of C++; its numbers are the places in this list.
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float64,
)
TYPES = {dtype: place for place, dtype in enumerate(DTYPES)}


# Words, and what they are in C++.
Address = Annotated[int, "const char*"]  # where numbers or bytes lie; 0 for none
Output = Annotated[int, "char*"]  # where numbers are written
Type = Annotated[int, "Type"]  # a place in `DTYPES`
Double = Annotated[int, "double"]  # the bits of a double


class Block(NamedTuple):
    """Codes of some bits within a token."""

    bits: int
    bytes: int
    offset: int  # first byte
    channel: int  # first channel


class Form(NamedTuple):
    """Layout of a token in a head."""

    width: int  # numbers or bytes
    before: int  # numbers or bytes of the heads before it, for each token
    channels: int
    block_count: int  # 0: numbers
    blocks: Address  # a `Block` each


class Vector(NamedTuple):
    """Integers, one for each row of the batch."""

    data: Address
    type: Type
    stride: int


class Matrix(NamedTuple):
    """A tensor of a basis: heads, rows of the basis, and what is inside."""

    data: Address
    type: Type
    rows: int  # -1 where there is none
    head: int  # strides
    row: int
    line: int


class Stored(NamedTuple):
    """Keys or Values of a segment."""

    data: Address
    type: Type
    head_stride: int
    token_stride: int
    tokens: int
    form_count: int  # one for all heads, or one for each
    forms: Address  # a `Form` each
    decoder: Matrix
    delta: Matrix
    scale: Matrix


class Segment(NamedTuple):
    """A segment."""

    keys: Stored
    values: Stored
    starts: Vector
    lengths: Vector
    basis_rows: Vector
    slots: Vector  # of a row's tokens, whose numbers are `stride` apart from row to row
    columns: int  # that starts and lengths are within: of slots, or tokens
    max_length: int
    mask: Address
    mask_type: Type
    mask_row: int  # strides
    mask_query: int
    mask_token: int
    hidden: Double  # numbers of the mask up to this one hide a token


class Problem(NamedTuple):
    """A call."""

    query: Address
    type: Type
    batch: int
    heads: int
    group: int
    queries: int
    width: int
    value_width: int
    query_row: int  # strides
    query_head: int
    query_position: int
    out: Output
    lse: Output
    threads: int
    scale: Double
    segment_count: int
    segments: Address  # a `Segment` each


STRUCTURES = (Block, Form, Vector, Matrix, Stored, Segment, Problem)
FLAT = {Block, Form, Vector, Matrix, Problem}  # hold words alone


def header() -> str:
    """Write the declarations in C++: the types of numbers, and the fields and size of each structure."""
    names = ", ".join(str(dtype).removeprefix("torch.").upper() for dtype in DTYPES)
    lines = ["#pragma once", "#include <cstdint>", f"enum Type : int64_t {{ {names} }};"]
    for structure in STRUCTURES:
        fields = get_type_hints(structure, include_extras=True).items()
        declared = " ".join(f"{_c_type(kind)} {name};" for name, kind in fields)
        lines.append(f"#define {structure.__name__.upper()}_FIELDS {declared}")
        lines.append(f"constexpr int64_t {structure.__name__.upper()}_SIZE = {8 * words_in(structure)};")
    return "\n".join(lines) + "\n"


def _c_type(kind: Any) -> str:
    if kind in STRUCTURES:
        return str(kind.__name__)
    return "int64_t" if kind is int else str(get_args(kind)[1])


def words_in(structure: Any) -> int:
    """Count the words of a structure."""
    return sum(words_in(kind) if kind in STRUCTURES else 1 for kind in get_type_hints(structure).values())


def packed(structures: Iterable[tuple]) -> array:
    """Lay structures out one after the other."""
    words: list[int] = []
    for structure in structures:
        _add_words(words, structure)
    return array("q", words)


def _add_words(words: list[int], structure: tuple) -> None:
    if type(structure) in FLAT:
        words += structure
        return
    for entry in structure:
        if type(entry) is int:
            words.append(entry)
        else:
            _add_words(words, entry)
