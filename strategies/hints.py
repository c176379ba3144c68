"""Table of common words that are not keys, options or strategies of fedveil, with hints on the intended ones."""

from __future__ import annotations

from ..base.refusal import Refusal
from ..configs.strict import Mistakes

# Words of other tools: the key that is meant, or a sentence.
HINTS = {
    "aggregator": "strategy",
    "algorithm": "strategy",
    "alpha": "partition.alpha",
    "batch": "batch_size",
    "amp": "engine.dtype",
    "bs": "batch_size",
    "clip": "privacy.clipping_norm",
    "clip_norm": "privacy.clipping_norm",
    "clients": "task.num_clients",
    "cuda": "engine.device",
    "data": "task",
    "dataset": "task",
    "delta": "privacy.target_delta",
    "device": "engine.device",
    "dir": "hydra.run.dir",
    "dropout": "faults.dropout",
    "dtype": "engine.dtype",
    "epochs": "local_epochs",
    "epsilon": "privacy.target_epsilon",
    "eps": "privacy.target_epsilon",
    "fraction_fit": "cohort.rate",
    "fraction_train": "cohort.rate",
    "gpu": "engine.device",
    "lr": "learning_rate",
    "mu": "strategy=fedprox strategy.proximal_mu",
    "name": "run",
    "noise": "privacy.noise_multiplier",
    "num_clients": "task.num_clients",
    "num_epochs": "local_epochs",
    "num_gpus": "engine.device",
    "num_server_rounds": "num_rounds",
    "num_workers": "engine.workers",
    "momentum": "optimizer=sgd optimizer.momentum",
    "out": "hydra.run.dir",
    "output": "hydra.run.dir",
    "output_dir": "hydra.run.dir",
    "rounds": "num_rounds",
    "scaling": "task.scaling",
    "scheduler": "schedule",
    "sample_rate": "cohort.rate",
    "sigma": "privacy.noise_multiplier",
    "split": "partition",
    "weight_decay": "optimizer=adamw optimizer.weight_decay",
    "workers": "engine.workers",
}


def hinted(refusal: Refusal) -> Refusal:
    """Return the refusal; if the table has the refused name, its hint replaces the remedy with the most similar key."""
    return Mistakes([*map(_hinted, refusal.each)]) if isinstance(refusal, Mistakes) else _hinted(refusal)


def option_hint(option: str) -> str:
    """Return a hint on the key that an option of other tools means, such as --epochs; empty if the table lacks it."""
    hint = HINTS.get(option.lstrip("-").replace("-", "_"), "")
    return f"did you mean {hint}=...?" if hint and _is_key(hint) else hint


def _hinted(refusal: Refusal) -> Refusal:
    field = refusal.field.lstrip("+~")
    if field == "strategy" and refusal.remedy.startswith("there is no such option"):
        from .registry import reason_against

        return Refusal(refusal.field, refusal.value, reason_against(str(refusal.value)) or refusal.remedy)
    hint = HINTS.get(field.rpartition(".")[2]) if refusal.remedy.startswith("there is no such key") else None
    if hint is None or hint == field:
        return refusal
    remedy = f"did you mean '{hint}'?" if _is_key(hint) else hint
    return Refusal(refusal.field, refusal.value, f"there is no such key; {remedy}")


def _is_key(key: str) -> bool:
    """Return whether a hint is a key, or several with their values, and not a sentence."""
    return " " not in key or "=" in key.split(" ")[0]
