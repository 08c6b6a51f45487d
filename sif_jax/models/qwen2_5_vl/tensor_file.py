"""Safetensors files, read and written one tensor at a time (io).

Reads are positioned, never mapped: a mapped page counts as resident memory for as long as the file is open.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from sif_jax.errors import InputError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def weight_files(directory: Path) -> list[Path]:
    """The files that the index names; without an index, every safetensors file."""
    index = directory / INDEX
    if not index.exists():
        if paths := sorted(directory.glob("*.safetensors")):
            return paths
        raise InputError(
            "no weights here", file=directory, expected="*.safetensors files", fix="pickles are never read"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError("malformed index", file=index, expected="a JSON object with a weight_map") from None
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise InputError(
            f"{len(missing)} of {len(names)} shards are missing",
            file=index,
            value=missing[0],
            fix="download it into this directory",
        )
    return [directory / name for name in names]


class TensorSpec(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class TensorFile:
    """One safetensors file whose header has been checked.

    Raises:
      InputError: the file is truncated, malformed, or holds a type that no weight has.
    """

    def __init__(self, path: Path):
        self.path = path
        self._specs, self._starts = _read_header(path)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the file."""
        return tuple(sorted(self._starts, key=self._starts.__getitem__))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Shaped[np.ndarray, "..."]:
        """A tensor, or a part of it, seen as a vector, or as a matrix whose columns are all axes but the first."""
        dtype, shape = self._specs[name]
        rows, columns = (*(index or ()), slice(None), slice(None))[:2]
        width = math.prod(shape[1:])
        first, last, _ = rows.indices(shape[0])
        left, right, _ = columns.indices(width)
        part = _page_aligned((last - first, right - left), dtype)
        start = self._starts[name] + first * width * dtype.itemsize
        with self.path.open("rb") as file:
            if right - left == width:
                self._fill(file.fileno(), part, start)
            else:
                for row in range(last - first):
                    self._fill(file.fileno(), part[row], start + (row * width + left) * dtype.itemsize)
        return part if len(shape) > 1 else part.reshape(-1)

    def _fill(self, descriptor: int, part: np.ndarray, offset: int) -> None:
        view = part.reshape(-1).view(np.uint8).data
        while view:  # one call of Linux reads 2 GiB at most
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise _broken(self.path, "it has become shorter")
            view, offset = view[count:], offset + count


def _page_aligned(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Memory that the CPU backend takes over without a copy, and that goes back to the system when it is dropped."""
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(size, 1) * dtype.itemsize), dtype, size).reshape(shape)


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"cannot be read: {reason}", file=path, fix="copy or download the file again")


def _read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    try:
        with path.open("rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"a file of {size} bytes cannot have a header of {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise _broken(path, str(error.strerror)) from None
    except ValueError as error:
        raise error if isinstance(error, InputError) else _broken(path, "the header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    specs, starts = {}, {}
    for name, entry in header.items():
        if name != "__metadata__":
            specs[name], begin = _read_entry(path, name, entry, room=size - 8 - length)
            starts[name] = 8 + length + begin
    return specs, starts


def _read_entry(path: Path, name: str, entry: Any, *, room: int) -> tuple[TensorSpec, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(axis, int) and axis >= 0 for axis in sizes
        ):
            pass
        case _:
            raise _broken(path, f"the header's entry of {name} is malformed")
    if dtype not in DTYPES:
        raise InputError(
            f"tensor {name} has an unsupported type",
            file=path,
            value=dtype,
            expected=" or ".join(DTYPES),
            fix="use the published weights, neither quantised nor re-cast",
        )
    spec = TensorSpec(DTYPES[dtype], tuple(sizes))
    if end > room:
        raise _broken(path, f"it is truncated: tensor {name} ends {end - room} bytes after it")
    if begin < 0 or end - begin != spec.nbytes:
        raise _broken(path, f"the header's entry of {name} is malformed")
    return spec, begin


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[np.ndarray]) -> None:
    """Write the tensors of `specs`, in its order, as they come: one at a time is in memory."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        header[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec, value in zip(specs.values(), tensors, strict=True):
            assert (value.dtype, value.shape) == (spec.dtype, spec.shape)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
