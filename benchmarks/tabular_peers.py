"""Peers of the tabular benchmark, run by a Python that has them: ``python tabular_peers.py FOLDER SEED NAME/EPSILON ...``.

It stands outside the package, since that Python need not have it, and prints a line of JSON for each figure.
``tabular_peers.txt`` has the peers' versions. Each has its defaults; none reads more than its epsilon allows.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

DELTA = 1e-5
SURVIVAL = "survival"
ADASSP_FAILURE = 0.05  # probability that its penalty is too small, as in the paper
COX_PENALTY = 1e-3  # of lifelines, so that words in one-hot columns do not make its Hessian singular


class Split:
    """Rows of one split: `inputs` scaled by the schema, `frame` in the table's own units, and targets.

    Attributes:
      kind: classes, number or survival.
      columns: name, low and high, or words, of each column of `frame`.
      train, test: inputs, frame and targets of both parts; times and events of survival are the two columns of a target.
    """

    def __init__(self, folder):
        meta = json.loads((folder / "columns.json").read_text())
        self.kind, self.columns, self.seed = meta["kind"], meta["columns"], 0
        arrays = np.load(folder / "inputs.npz", allow_pickle=False)
        self.train, self.test = (
            (arrays[f"{part}_inputs"], self._frame(folder / f"{part}.csv"), arrays[f"{part}_targets"])
            for part in ("train", "test")
        )

    def _frame(self, file):
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
        for column in self.columns:
            name = column["name"]
            if not column["words"]:
                numbers = np.asarray(pd.to_numeric(frame[name], errors="coerce"), float)
                frame[name] = np.clip(numbers, column["low"], column["high"])
        return frame

    def score(self, outputs):
        """Return AUC (macro, one against the rest), R2 or concordance of outputs, of which a higher one is a shorter life."""
        targets = self.test[2]
        if self.kind == "number":
            from sklearn.metrics import r2_score

            return r2_score(targets, outputs)
        if self.kind == SURVIVAL:
            from lifelines.utils import concordance_index

            return concordance_index(targets[:, 0], -outputs, targets[:, 1])
        from sklearn.metrics import roc_auc_score

        if outputs.shape[1] == 2:
            return roc_auc_score(targets, outputs[:, 1])
        return roc_auc_score(targets, outputs / outputs.sum(1, keepdims=True), multi_class="ovr")


def outputs_of(fit, inputs):
    """Return probabilities of classes, or numbers."""
    return fit.predict_proba(inputs) if hasattr(fit, "predict_proba") else fit.predict(inputs)


def coded(split):
    """Return both parts' frames with words as pandas categories, as the boosted trees read them."""
    frames = [split.train[1].copy(), split.test[1].copy()]
    for frame in frames:
        for column in split.columns:
            if column["words"]:
                frame[column["name"]] = pd.Categorical(frame[column["name"]], categories=column["words"])
    return frames


def trees(split, classifier, regressor, **options):
    train, test = coded(split)
    make = regressor if split.kind == "number" else classifier
    return outputs_of(make(random_state=split.seed, **options).fit(train, split.train[2]), test)


def lightgbm(split, epsilon):
    from lightgbm import LGBMClassifier, LGBMRegressor

    # LightGBM allows no special character of JSON in a name.
    names = {column["name"]: f"column {k}" for k, column in enumerate(split.columns)}
    split.train[1].rename(columns=names, inplace=True)
    split.test[1].rename(columns=names, inplace=True)
    columns = split.columns
    split.columns = [{**column, "name": names[column["name"]]} for column in columns]
    try:
        return trees(split, LGBMClassifier, LGBMRegressor, verbose=-1, n_jobs=1)
    finally:
        for part in (split.train, split.test):
            part[1].rename(columns={new: old for old, new in names.items()}, inplace=True)
        split.columns = columns


def xgboost(split, epsilon):
    from xgboost import XGBClassifier, XGBRegressor

    return trees(split, XGBClassifier, XGBRegressor, enable_categorical=True, n_jobs=1)


def _interpretable(split):
    """Return both parts' frames for EBM, with its types of columns."""
    types = ["nominal" if column["words"] else "continuous" for column in split.columns]
    return split.train[1], split.test[1], {"feature_types": types, "n_jobs": 1, "random_state": split.seed}


def ebm(split, epsilon):
    from interpret.glassbox import ExplainableBoostingClassifier, ExplainableBoostingRegressor

    train, test, options = _interpretable(split)
    make = ExplainableBoostingRegressor if split.kind == "number" else ExplainableBoostingClassifier
    return outputs_of(make(**options).fit(train, split.train[2]), test)


def dp_ebm(split, epsilon):
    from interpret.privacy import DPExplainableBoostingClassifier, DPExplainableBoostingRegressor

    train, test, options = _interpretable(split)
    train, test = train.copy(), test.copy()
    bounds = {}
    for k, column in enumerate(split.columns):
        if not column["words"]:
            # A missing number is the middle of its range: DP-EBM makes its bins from numbers.
            middle = (column["low"] + column["high"]) / 2
            train[column["name"]] = train[column["name"]].fillna(middle)
            test[column["name"]] = test[column["name"]].fillna(middle)
            bounds[k] = (column["low"], column["high"])
    # With a fixed seed its noise repeats from round to round and cancels: wine at epsilon 0.05 has an area of 0.99, and 0.5 without.
    options |= {"privacy_bounds": bounds, "random_state": None}
    targets = split.train[2]
    if split.kind == "number":
        options |= {"epsilon": epsilon, "delta": DELTA, "privacy_target_min": -1, "privacy_target_max": 1}
        return DPExplainableBoostingRegressor(**options).fit(train, targets).predict(test)
    # It takes two classes: more are each fitted against the rest, and share the budget.
    classes = np.unique(targets)
    ones = classes if len(classes) > 2 else classes[1:]
    options |= {"epsilon": epsilon / len(ones), "delta": DELTA / len(ones)}
    fits = (DPExplainableBoostingClassifier(**options).fit(train, targets == one) for one in ones)
    chances = np.stack([fit.predict_proba(test)[:, 1] for fit in fits], 1)
    return chances if len(ones) > 1 else np.hstack([1 - chances, chances])


def dp_linear(split, epsilon):
    """Return outputs of diffprivlib, which keeps pure epsilon: objective perturbation of classes, functional of a number."""
    from diffprivlib.models import LinearRegression, LogisticRegression

    inputs, _, targets = split.train
    if split.kind == "number":
        fit = LinearRegression(epsilon=epsilon, bounds_X=(-1, 1), bounds_y=(-1, 1), random_state=split.seed)
    else:
        # A column of numbers and a column of words each add at most 1 to the squared norm.
        norm = math.sqrt(len(split.columns))
        fit = LogisticRegression(epsilon=epsilon, data_norm=norm, max_iter=2000, random_state=split.seed)
    return outputs_of(fit.fit(inputs.astype(float), targets), split.test[0].astype(float))


def adassp(split, epsilon):
    """Return outputs of adaptive sufficient statistics perturbation (Wang 2018, arXiv:1803.02596, algorithm 2)."""
    random, inputs = (
        np.random.default_rng(split.seed),
        np.hstack([split.train[0], np.ones((len(split.train[0]), 1))]),
    )
    width, squared, share = (
        inputs.shape[1],
        1.0 + len(split.columns),
        epsilon / 3,
    )  # bound on a row's squared norm
    logarithm = math.log(6 / DELTA)
    noise = math.sqrt(logarithm) / share
    products = inputs.T @ inputs
    least = np.linalg.eigvalsh(products)[0] + noise * squared * random.normal() - logarithm / share * squared
    spread = math.sqrt(width * logarithm * math.log(2 * width**2 / ADASSP_FAILURE)) * squared / share
    upper = np.triu(random.normal(size=(width, width)))
    products = products + noise * squared * (upper + np.triu(upper, 1).T)
    sums = inputs.T @ split.train[2] + noise * math.sqrt(squared) * random.normal(size=width)
    weights = np.linalg.solve(products + max(0.0, spread - max(least, 0.0)) * np.eye(width), sums)
    return split.test[0] @ weights[:-1] + weights[-1]


def linear(split, epsilon):
    from sklearn.linear_model import LogisticRegression, Ridge

    fit = Ridge() if split.kind == "number" else LogisticRegression(max_iter=5000)
    return outputs_of(fit.fit(split.train[0], split.train[2]), split.test[0])


def cox(split, epsilon):
    from lifelines import CoxPHFitter

    train, test = (pd.DataFrame(part[0]).add_prefix("x") for part in (split.train, split.test))
    train["time"], train["event"] = split.train[2][:, 0], split.train[2][:, 1]
    fit = CoxPHFitter(penalizer=COX_PENALTY).fit(train, "time", "event")
    return fit.predict_partial_hazard(test).to_numpy()


# A contender by name, and the kinds of label that it takes.
BOTH = ("classes", "number")
PEERS = {
    "DP-EBM": (dp_ebm, BOTH),
    "DP linear": (dp_linear, BOTH),
    "AdaSSP": (adassp, ("number",)),
    "LightGBM": (lightgbm, BOTH),
    "XGBoost": (xgboost, BOTH),
    "EBM": (ebm, BOTH),
    "linear": (linear, BOTH),
    "Cox": (cox, (SURVIVAL,)),
}


def figure(split, name, epsilon):
    """Return a contender's figure as a dictionary, or why there is none; a package that is missing has its name there."""
    function, kinds = PEERS[name]
    if split.kind not in kinds:
        return {"reason": f"takes no label of kind {split.kind}"}
    began = time.process_time()
    try:
        value = float(split.score(function(split, epsilon)))
    except ModuleNotFoundError as error:
        return {"missing": error.name}
    except (ValueError, ArithmeticError, NotImplementedError) as error:
        return {"reason": str(error).splitlines()[0][:200]}
    return {"value": value, "seconds": round(time.process_time() - began, 2)}


def main(folder, seed, *cells):
    split = Split(Path(folder))
    split.seed = int(seed)
    warnings.simplefilter("ignore")
    for cell in cells:
        name, _, epsilon = cell.partition("/")
        known = {"contender": name, "epsilon": epsilon}
        answer = figure(split, name, math.inf if epsilon == "none" else float(epsilon))
        print(json.dumps(known | answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
