"""Files of arrays: safetensors written part by part, since its library copies all arrays twice, and NumPy's, read as untrusted."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .refusal import Refusal

# Types of the format that NumPy has too.
_TYPES = frozenset(("BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "F16", "F32", "F64", "C64"))


def safetensors_parts(
    tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file part by part; with at most one entry of metadata the bytes are those of the library.

    The format: length of the header in 8 bytes, header as JSON, arrays in little-endian order.

    Args:
      tensors: arrays by name.
      metadata: entries of text in the header.

    Raises:
      Refusal: the format has no type for an array; nothing was yielded.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    little = {k: value.astype(value.dtype.newbyteorder("<"), copy=False) for k, value in tensors.items()}
    # Wide items come first, so that each array begins at a multiple of its item size.
    ordered = sorted(little.items(), key=lambda each: (-each[1].itemsize, each[0]))
    end = 0
    for name, value in ordered:
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _type_of(name, value), "shape": value.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the arrays
    yield len(text).to_bytes(8, "little") + text
    for _, value in ordered:
        yield value.reshape(-1).view(np.uint8).data


def _type_of(name: str, array: NDArray[np.generic]) -> str:
    """Return the name of an array's type in a safetensors file; raise Refusal with the array's name if there is none."""
    kind = {"f": "F", "i": "I", "u": "U", "c": "C", "b": "BOOL"}.get(array.dtype.kind, "")
    type_name = kind if kind == "BOOL" else f"{kind}{8 * array.itemsize}"
    if type_name not in _TYPES:
        raise Refusal(name, str(array.dtype), "no safetensors file holds such an array; keep it as float64")
    return type_name


def read_npy(file: BinaryIO) -> NDArray[Any]:
    """Return the next array of a file in NumPy's format; `numpy.load` would also take a zip archive or a pickle there.

    Raises:
      ValueError: no array follows, or its bytes are damaged.
      OSError: the file cannot be read.
    """
    with _damaged():
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(file: BinaryIO) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file, by name.

    Raises:
      ValueError: the file has another format, or is damaged.
      OSError: the file cannot be read.
    """
    with _damaged(), np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


@contextmanager
def _damaged() -> Generator[None]:
    """Raise ValueError for any error of NumPy, which parses headers as Python and archives as zip; OSError stays."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"no array, or a damaged one ({type(error).__name__})") from error
