"""Membership attacks on a finished simulation: they infer the training records from the final model.

Only for simulations: the attack reads the clients' data, which on real data only the client may do. Half of the
clients' examples and half of the held-out ones are attacked; the rest train reference models, or are RMIA's population.
An attack is no bound: a failed one proves nothing, and if held-out data differ from the clients', a successful one may
only detect this difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch.utils.data import ConcatDataset

from ..base.refusal import Refusal
from ..client.training.sgd import train
from ..configs.settings import settings_from_overrides
from ..messages.local_training import LocalTraining
from ..privacy.audit.membership import Interval, Likelihoods, auc, lira, logit, rmia, tpr_at
from ..privacy.audit.one_run import Scores
from ..run.build import build
from ..run.files import MODEL
from ..tasks.arrays import load_arrays, own_names
from ..tasks.batch_memory import AUTO, answers
from ..tasks.data import Data, Examples, LazyExamples, data_of, held_out_of, joined, only
from ..tasks.mislabelled import losses_of
from ..tasks.protocol import Task
from ..tasks.tables import Tables

FALSE_POSITIVES = (0.001, 0.01)  # rates at which true positives are measured
MAX_RECORDS = 2000  # records attacked of each kind, and so many for a reference model
SEED = 20  # of an attack's draws and reference models
BATCH = 32  # least batch size of a reference model


@dataclass(frozen=True)
class Attacked:
    """Target of an attack: a model, its training records and others, and the data for reference models.

    Attributes:
      task: of the run.
      training: how reference models are trained.
      model: the run's final one.
      records: that are attacked: first members, on which the model was trained, then others.
      members: number of members.
      spare: clients' examples that are not attacked.
      population: held-out examples that are not attacked.
    """

    task: Task
    training: LocalTraining
    model: torch.nn.Module
    records: Data
    members: int
    spare: Data
    population: Data

    def reference(self, examples: Data, number: int) -> torch.nn.Module:
        """Return a model trained on these examples alone, without privacy; its number, from 0, gives the seed."""
        model = self.task.model()
        torch.default_generator.manual_seed(SEED + number)
        train(model, self.task, examples, self.training, number, key=SEED)
        return model

    def likelihoods(self, model: torch.nn.Module, examples: Data) -> Scores:
        """Return the likelihood of each example's target under a model, shape (n,)."""
        return np.exp(-losses_of(self.task, model, examples))


def by_loss(attacked: Attacked, shadows: int) -> Scores:
    """Score by the loss, negated (Yeom et al. 2018); no reference model."""
    return -losses_of(attacked.task, attacked.model, attacked.records)


def by_rmia(attacked: Attacked, shadows: int) -> Scores:
    """Score by RMIA with one reference model, trained on neither the attacked records nor the population."""
    reference = attacked.reference(attacked.spare, 0)

    def likelihoods(examples: Data) -> Likelihoods:
        """Return the likelihoods under the target and under the reference model."""
        target, other = (attacked.likelihoods(model, examples) for model in (attacked.model, reference))
        return Likelihoods(target, other)

    return rmia(likelihoods(attacked.records), likelihoods(attacked.population))


def by_lira(attacked: Attacked, shadows: int) -> Scores:
    """Score by LiRA: shadow models train in pairs, on the two halves of a random split of the attacked records."""
    generator = np.random.default_rng(SEED)
    records, count = attacked.records, len(attacked.records)
    masks: list[NDArray[np.bool_]] = []  # which records each shadow model trains on
    for _ in range(-(-shadows // 2)):
        half = generator.permutation(count) < count // 2
        masks += [half, ~half]
    logits: list[Scores] = []
    for number, mask in enumerate(masks):
        shadow = attacked.reference(only(records, np.flatnonzero(mask)), number)
        logits.append(logit(attacked.likelihoods(shadow, records)))
    target = logit(attacked.likelihoods(attacked.model, records))
    return lira(target, np.stack(logits), np.stack(masks))


def by_art(attacked: Attacked, shadows: int) -> Scores:
    """Score by a forest on classes' probabilities and the label, of the Adversarial Robustness Toolbox (Shokri et al. 2017).

    It learns from one reference model, by its members, which are the spare examples, and by the population. A score is the
    probability that a record is a member.

    Raises:
      Refusal: the extra `mia` is not installed, or the task has no classes.
    """
    try:
        inference = import_module("art.attacks.inference.membership_inference")
        estimators = import_module("art.estimators.classification")
    except ImportError:
        raise Refusal("membership", "art", "install fedveil[mia], or give loss, rmia or lira") from None
    reference = attacked.reference(attacked.spare, 0)
    members, labels = _classes(reference, attacked.spare)
    others, other_labels = _classes(reference, attacked.population)
    # Its function is never called: `infer` gets the answers.
    black_box = estimators.BlackBoxClassifier(np.zeros, (1,), members.shape[1])
    forest = inference.MembershipInferenceBlackBox(black_box, attack_model_type="rf")
    forest.attack_model.set_params(random_state=SEED)
    forest.fit(pred=members, y=labels, test_pred=others, test_y=other_labels)
    predictions, attacked_labels = _classes(attacked.model, attacked.records)
    scores = forest.infer(None, attacked_labels, pred=predictions, probabilities=True)
    return np.asarray(scores, np.float64)[:, 0]


@torch.no_grad()
def _classes(model: torch.nn.Module, examples: Data) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the probability of each class, shape (n, classes), and the labels, shape (n,)."""
    outputs, targets = map(torch.cat, zip(*answers(model.eval(), examples, AUTO), strict=True))
    if outputs.ndim != 2 or targets.ndim != 1:
        raise Refusal("membership", "art", "this task has no classes; give loss, rmia or lira")
    return outputs.softmax(dim=1).numpy(), targets.numpy()


# Each returns a score for each attacked record, larger for likelier members; lira alone uses the number of shadow models.
ATTACKS: Mapping[str, Callable[[Attacked, int], Scores]] = {
    "loss": by_loss,
    "rmia": by_rmia,
    "lira": by_lira,
    "art": by_art,
}


def membership(folder: Path, attack: str, shadows: int, epochs: int, *, as_json: bool = False) -> int:
    """Attack the final model of a run and print the results; return the exit code, which is always 0.

    Args:
      folder: of a finished run.
      attack: a key of `ATTACKS`.
      shadows: models that lira trains, at least 1.
      epochs: of a reference model, at least 1.
      as_json: print one JSON object.

    Raises:
      Refusal: an argument is out of range, or the folder holds no finished run or real data.
    """
    if attack not in ATTACKS:
        raise Refusal("membership", attack, f"choose one of {', '.join(ATTACKS)}")
    for name, value in (("shadows", shadows), ("epochs", epochs)):
        if value < 1:
            raise Refusal(name, value, "give a whole number of at least 1")
    attacked = attack_on(folder, epochs)
    scores = ATTACKS[attack](attacked, shadows)
    figures = measure_attack(scores[: attacked.members], scores[attacked.members :])
    print(_as_json(attack, attacked, figures) if as_json else _format(attack, attacked, figures))
    return 0


def measure_attack(members: Scores, others: Scores) -> dict[str, Interval]:
    """Return the area under the curve, and the true positive rate at each of FALSE_POSITIVES, with intervals at 95 %.

    Args:
      members: scores of records that trained the model.
      others: scores of records that did not.
    """
    rates = {f"true positives at {fpr:.1%} false": tpr_at(fpr, members, others) for fpr in FALSE_POSITIVES}
    return {"AUC": auc(members, others), **rates}


def attack_on(folder: Path, epochs: int) -> Attacked:
    """Load a finished run's model, and split its data into attacked records and the rest; references train for `epochs`.

    Raises:
      Refusal: the folder holds no finished run, its data are real, or its model lacks layers that stay at clients.
    """
    try:
        arrays = load_file(folder / MODEL)
    except (OSError, SafetensorError):
        remedy = f"it holds no {MODEL}; give the folder of a finished run"
        raise Refusal("audit", str(folder), remedy) from None
    settings = settings_from_overrides([f"resume='{folder}'"])
    task = build(settings).task
    if not task.simulated:
        remedy = "its data are real: only its owner may attack a record"
        raise Refusal("audit", str(folder), remedy)
    inside = concatenated([data_of(task, client) for client in range(task.num_clients)], folder)
    held_out = concatenated([held_out_of(task)], folder)
    tables = getattr(task, "task", task)  # a task with planted examples contains its own
    if isinstance(tables, Tables) and isinstance(inside, Examples):
        # A target may encode a group too, which would betray members.
        inside = replace(inside, targets=tables.labels(inside.targets), groups=None)
    generator = np.random.default_rng(SEED)
    members, spare = _halves(inside, generator)
    others, population = _halves(held_out, generator)
    model = task.model()
    if own_names(model):
        remedy = "its model lacks layers that stay at its clients, so an attack on it would show nothing; give another run"
        raise Refusal("audit", str(folder), remedy)
    load_arrays(model, arrays)
    training = _reference_training(settings.local_training, epochs)
    return Attacked(
        task, training, model, concatenated([members, others], folder), len(members), spare, population
    )


def _reference_training(training: LocalTraining, epochs: int) -> LocalTraining:
    """Return how a reference model is trained: as the clients', but with Adam for DP-AdamBC, which corrects for noise."""
    optimizer = training.optimizer
    if optimizer.name == "dp_adambc":
        optimizer = replace(optimizer, name="adam")
    batch_size = max(BATCH, training.batch_size)
    return replace(training, local_epochs=epochs, batch_size=batch_size, optimizer=optimizer)


def concatenated(parts: Sequence[Data], folder: Path) -> Data:
    """Concatenate data without persons, of clients or of samples; refuse those that are not read in one way.

    Args:
      parts: examples in memory, or read on access with the same fields, transform and collate.
      folder: of the run, for a refusal.
    """
    in_memory = [replace(part, persons=None, groups=None) for part in parts if isinstance(part, Examples)]
    on_access = [replace(part, persons=None) for part in parts if isinstance(part, LazyExamples)]
    if not on_access:
        return joined(in_memory)
    first, *others = on_access
    if in_memory or any(replace(part, dataset=first.dataset) != first for part in others):
        remedy = "its clients read their data in different ways, and only one way is attacked"
        raise Refusal("membership", str(folder), remedy)
    return replace(first, dataset=ConcatDataset([part.dataset for part in on_access]))


def _halves(examples: Data, generator: np.random.Generator) -> tuple[Data, Data]:
    """Return two disjoint random samples of the same size, of at most MAX_RECORDS examples each."""
    order = generator.permutation(len(examples))[: 2 * MAX_RECORDS]
    return only(examples, order[: len(order) // 2]), only(examples, order[len(order) // 2 :])


def _format(attack: str, attacked: Attacked, figures: Mapping[str, Interval]) -> str:
    """Return the results of an attack as lines of text."""
    others = len(attacked.records) - attacked.members
    lines = [f"membership by {attack}: {attacked.members} records that trained, {others} that did not"]
    width = max(map(len, figures))
    for name, interval in figures.items():
        lines.append(
            f"{name.ljust(width)}  {interval.value:.3f}  ({interval.low:.3f} to {interval.high:.3f})"
        )
    lines.append("by chance 0.5 and the rate of false positives; an attack that fails proves no privacy")
    return "\n".join(lines)


def _as_json(attack: str, attacked: Attacked, figures: Mapping[str, Interval]) -> str:
    """Return the results of an attack as one JSON object."""
    others = len(attacked.records) - attacked.members
    fields = {name: asdict(interval) for name, interval in figures.items()}
    return json.dumps({"attack": attack, "members": attacked.members, "others": others, "measured": fields})
