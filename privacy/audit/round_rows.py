"""Rows of a run's audit, one per round, from which the audit can be recomputed.

The file is a sequence of NumPy arrays, each as `numpy.save` writes it without pickle. Reading skips a row that a crash
truncated, and the rounds that the run will repeat.
"""

from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.durable_files import open_for_owner
from ...base.refusal import Refusal
from ...base.tensor_file import read_npy

# Number of blocks of rounds whose sums are stored: updates change slowly, so a few blocks show as much as all rounds.
BLOCKS = 16
CHUNK = 1024  # rows that are read at a time
LAYERS = 64  # number of the smallest layers, whose energies are stored: a larger one shows missing noise in a single round
# Results of canary records, see `record_claim`; NaN in rounds without a look.
RECORDS = ("epsilon", "low", "high", "ceiling", "gaussian", "steinke", "t_p", "accuracy_p")
Rows = NDArray[Any]  # structured, shape (rounds,), of `row_type`


def row_type(canaries: int) -> np.dtype[Any]:
    """Return the fields of a row.

    round: number, from 1
    clients, population: real clients that were drawn, and of how many
    norm, noise: L2 norm of the released sum, and the std claimed for its noise, in clipping norms
    energy, dimensions: of the part orthogonal to earlier rounds (`free_checks.outside`), over the noise's variance
    layer_energies, layer_dimensions: the same by layer, smallest first, 0 where there is none
    layer_means: the part of a layer's energy that lies in its mean
    rate, charged: sampling rate, and noise over clip that the ledger was charged (noise 0: nothing)
    norm_p, reuse_p, cosine, draw_p: the free checks
    probe_p, losses_p: p-values of a probe, for memorisation and against a claim of records; NaN if not computed
    books_p: 0 if the ledger counts less than the sums cost, else 1; NaN if not computed
    gram: inner products of the sum of the round's block so far with the sums of all blocks (`interference`)
    records: as `RECORDS` names them
    along: the released sum along each canary's direction
    taken: which canaries were in the cohort
    """
    sums = ("norm", "noise", "energy", "rate", "charged")
    checks = ("norm_p", "reuse_p", "cosine", "draw_p", "probe_p", "losses_p", "books_p")
    fields: list[Any] = [(name, "<i8") for name in ("round", "clients", "population", "dimensions")]
    fields += [(name, "<f8") for name in (*sums, *checks)]
    fields += [(name, "<f8", (LAYERS,)) for name in ("layer_energies", "layer_means")]
    fields += [("layer_dimensions", "<i8", (LAYERS,))]
    fields += [("gram", "<f8", (BLOCKS,)), ("records", "<f8", (len(RECORDS),))]
    return np.dtype([*fields, ("along", "<f4", (canaries,)), ("taken", "?", (canaries,))])


def append(path: Path, row: Rows) -> None:
    """Add a row, shape (), to a file."""
    with open_for_owner(path) as file:
        file.write(_header(row.dtype) + row.tobytes())


@cache
def _header(dtype: np.dtype[Any]) -> bytes:
    """Return the header that np.save writes before a row of this type; cached, because it takes longer than free checks."""
    file = BytesIO()
    np.save(file, np.zeros((), dtype), allow_pickle=False)
    return file.getvalue()[: -dtype.itemsize]


def read(path: Path, canaries: int, layers: bool = True) -> Rows:
    """Return the rows of a file, in the order of their rounds; none where there is no file.

    Args:
      path: of the file, which may be missing.
      canaries: how many the audit has.
      layers: whether rows have what they say by layer, which is four fifths of one without canaries.

    Raises:
      Refusal: as `chunks`.
    """
    descriptions = row_type(canaries).descr
    fields = [each for each in descriptions if layers or not each[0].startswith("layer_")]
    names = [name for name, *_ in fields]
    rows = [chunk[names].astype(fields) for chunk in chunks(path, canaries)]
    return np.concatenate(rows) if rows else np.empty(0, fields)


def chunks(path: Path, canaries: int) -> Iterator[Rows]:
    """Yield the rows of a file in their order, up to `CHUNK` at a time, without one at the end that a crash truncated.

    Args:
      path: of the file, which may be missing.
      canaries: how many the audit has.

    Raises:
      Refusal: the file holds no audit of this many canaries, or cannot be read.
    """
    dtype = row_type(canaries)
    header = np.frombuffer(_header(dtype), "u1")
    # A header takes longer to parse than its row to judge, so those that `append` writes are compared.
    alike = np.dtype([("header", "u1", len(header)), ("row", dtype)])
    try:
        with open(path, "rb") as file:
            end = 0
            while len(records := np.fromfile(file, alike, CHUNK)) and np.all(records["header"] == header):
                yield records["row"]
                end += records.nbytes
                file.seek(end)
            file.seek(end)
            while (row := _next(file)) is not None:
                if row.dtype != dtype or row.shape != ():
                    raise Refusal("audit", str(path), f"holds no audit of {canaries} canaries; restore it")
                yield row[None]
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise Refusal("audit", str(path), f"cannot be read ({problem.strerror})") from problem


def _next(file: Any) -> Rows | None:
    """Return the next row of an open file; None at the end, or at a truncated row."""
    try:
        return read_npy(file)
    except ValueError:
        return None


def cut(path: Path, canaries: int, last: int) -> None:
    """Drop from a file the row of the whole run and those of later rounds; remove it if none is left.

    Args:
      path: of the file.
      canaries: how many the audit has.
      last: last round to keep.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open_for_owner(temporary) as file:
        for chunk in chunks(path, canaries):
            rows = chunk[(chunk["round"] > 0) & (chunk["round"] <= last)]
            file.writelines(_header(rows.dtype) + row.tobytes() for row in rows)
    temporary.replace(path)
    if not path.stat().st_size:
        path.unlink()
