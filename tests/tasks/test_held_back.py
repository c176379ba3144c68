"""Rows that are held out: a fair sample of any table, the same for every user of the split, by one record's own place."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import binom

from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device import linear
from fedveil.privacy.statistics.holdout import hashes_of_rows, holdout_mask
from fedveil.run.build import build
from fedveil.run.files import SAVED, SINGLY
from fedveil.simulations.simulate import simulate
from fedveil.tasks.data import Examples, LazyExamples, data_of
from fedveil.tasks.held_back import held_back, held_back_of
from fedveil.tasks.tables import load, row_hashes

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

TABLES, SHARE, FRESH = 200, 0.2, 20_000
MOST_OUTSIDE = 4  # of TABLES, of intervals that hold in 99 %: 2 %
KINDS = ("categories", "bins", "mixed")


@dataclass(frozen=True)
class Made:
    """Table drawn from a known distribution: one-hot categories and bins, and numbers."""

    rows: int
    classes: int
    widths: tuple[int, ...]  # of each column's categories; 0 for a number
    weights: np.ndarray

    def draw(self, count: int, stream: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        columns = [
            np.eye(width)[stream.integers(0, width, count)] if width else stream.normal(size=(count, 1))
            for width in self.widths
        ]
        inputs = np.concatenate(columns, 1).astype(np.float32)
        scores = inputs @ self.weights + stream.gumbel(size=(count, self.classes))
        return inputs, scores.argmax(1)


def made(number: int) -> tuple[Made, np.random.Generator]:
    stream = np.random.default_rng(number)
    kind = KINDS[number % len(KINDS)]
    sizes = {"categories": (2, 5), "bins": (3, 17)}
    widths = [
        int(stream.integers(*sizes[kind if kind in sizes else ("categories", "bins")[place % 2]]))
        for place in range(stream.integers(1, 5))
    ]
    widths += [0] * (kind == "mixed")
    classes, rows = int(stream.integers(2, 7)), int(np.exp(stream.uniform(np.log(20), np.log(5000))))
    weights = stream.normal(size=(sum(each or 1 for each in widths), classes))
    return Made(rows, classes, tuple(widths), weights), stream


def outside(found: float, total: int, rate: float) -> bool:
    """Return whether a count is outside the interval that holds in 99 %."""
    low, high = binom.ppf((0.005, 0.995), total, rate)
    return not low <= found <= high


def accuracy(inputs: np.ndarray, targets: np.ndarray, model: np.ndarray) -> float:
    return float((np.c_[inputs, np.ones(len(inputs))] @ model).argmax(1).__eq__(targets).mean())


def test_held_out_rows_of_synthetic_tables_are_a_fair_sample() -> None:
    wrong = Counter[tuple[str, str]]()
    for number in range(TABLES):
        table, stream = made(number)
        inputs, targets = table.draw(table.rows, stream)
        fresh = table.draw(FRESH, stream)
        rows = Examples(torch.from_numpy(inputs), torch.from_numpy(targets))
        of_tables = holdout_mask(row_hashes(rows), SHARE, independent=True)
        at_clients = holdout_mask(hashes_of_rows([inputs, targets]), SHARE, independent=True)
        often = np.bincount(targets).argmax()
        for name, held in (("tables", of_tables), ("clients", at_clients)):
            count = int(held.sum())
            wrong[name, "share"] += outside(count, len(held), SHARE)
            wrong[name, "label"] += outside((targets[held] == often).sum(), count, (targets == often).mean())
            if count == 0:
                continue
            with_ones = np.c_[inputs, np.ones(len(inputs))][~held]
            model = np.linalg.lstsq(with_ones, np.eye(table.classes)[targets[~held]], rcond=1e-6)[0]
            true = accuracy(*fresh, model)
            told = accuracy(inputs[held], targets[held], model)
            wrong[name, "accuracy"] += outside(round(told * count), count, true)
    assert {key: count for key, count in wrong.items() if count > MOST_OUTSIDE} == {}
    assert len(wrong) == 6


def table_text(table: Made, inputs: np.ndarray, targets: np.ndarray) -> str:
    """Return rows as a CSV file has them."""
    columns, start = list[list[str]](), 0
    for width in table.widths:
        part = inputs[:, start : start + (width or 1)]
        columns.append(
            [f"w{each}" for each in part.argmax(1)] if width else [f"{each:.6f}" for each in part[:, 0]]
        )
        start += width or 1
    names = [*(f"x{place}" for place in range(len(columns))), "y"]
    rows = zip(*columns, [f"c{each}" for each in targets], strict=True)
    return "\n".join([",".join(names), *map(",".join, rows)]) + "\n"


def printed_is_outside(number: int, folder: Path) -> bool:
    """Return whether a run prints an accuracy outside the interval of its model's on fresh rows, which holds in 99 %."""
    table, stream = made(number)
    folder.mkdir(parents=True)
    lines = ["label: y", "columns:"]
    for place, width in enumerate(table.widths):
        words = "categories: [" + ", ".join(f"w{each}" for each in range(width)) + "]"
        lines.append(f"  x{place}: {{{words if width else 'low: -3, high: 3'}}}")
    lines.append("  y: {categories: [" + ", ".join(f"c{each}" for each in range(table.classes)) + "]}")
    schema = folder.with_suffix(".yaml")
    schema.write_text("\n".join(lines) + "\n")
    (folder / "one.csv").write_text(table_text(table, *table.draw(table.rows, stream)))
    (fresh := folder.with_suffix(".csv")).write_text(table_text(table, *table.draw(FRESH, stream)))
    told = [
        f"task.folder={folder}",
        f"task.schema={schema}",
        "task.simulated=true",
        "privacy=none",
        "audit=off",
    ]
    model = ("linear", "gam")[number % 2]
    settings = settings_from_overrides(["task=csv", f"task.model={model}", "num_rounds=3", *told])
    run = folder.with_suffix(".run")
    printed = simulate(settings, run, quiet=True).result["metrics"]["accuracy"]
    task = load(str(folder), schema=str(schema), model=model, simulated=True, held_out_file=str(fresh))
    net = task.model()
    net.load_state_dict(load_file(run / "model.safetensors"))
    true = (net(task.test.inputs).argmax(1) == task.test.targets).double().mean().item()
    whole = load(str(folder), schema=str(schema), model=model, simulated=True)
    return outside(round(printed * len(whole.test)), len(whole.test), true)


def test_the_printed_accuracy_is_the_models_on_fresh_rows(tmp_path: Path) -> None:
    assert [number for number in range(6) if printed_is_outside(number, tmp_path / str(number))] == []


@pytest.mark.campaign
def test_the_printed_accuracies_of_200_tables_are_those_on_fresh_rows(tmp_path: Path) -> None:
    wrong = [number for number in range(TABLES) if printed_is_outside(number, tmp_path / str(number))]
    assert len(wrong) <= MOST_OUTSIDE, wrong


def test_small_clients_of_similar_rows_hold_out_different_ones(tmp_path: Path) -> None:
    wrong = Counter[str]()
    for number in range(20):
        stream = np.random.default_rng(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        for client in range(50):
            rows = zip(stream.integers(0, 3, 20), stream.integers(0, 2, 20), strict=True)
            (folder / f"{client}.csv").write_text("x,y\n" + "".join(f"w{x},{'ab'[y]}\n" for x, y in rows))
        task = load(str(folder), "y", simulated=True)
        whole = [*(each.targets for each in task.clients), task.test.targets]
        wrong["share"] += outside(len(task.test), 1000, SHARE)
        rate = torch.cat(whole).double().mean().item()
        wrong["label"] += outside(int(task.test.targets.sum()), len(task.test), rate)
    assert wrong.total() <= 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.floats(0.01, 0.99), st.data())
def test_a_missing_row_leaves_one_of_the_two_parts_and_no_other_moves(
    rows: list[int], share: float, data: Any
) -> None:
    def parts(of: list[int]) -> tuple[Counter[int], Counter[int]]:
        hashes = hashes_of_rows([np.array(of, np.int64)])
        held = holdout_mask(hashes, share, independent=True)
        kept, out = (Counter(row for row, at in zip(of, held, strict=True) if at == part) for part in (0, 1))
        return kept, out

    gone = data.draw(st.integers(0, len(rows) - 1))
    before, after = parts(rows), parts(rows[:gone] + rows[gone + 1 :])
    lost = [first - second for first, second in zip(before, after, strict=True)]
    won = [second - first for first, second in zip(before, after, strict=True)]
    assert lost[0] + lost[1] == Counter([rows[gone]]) and not won[0] and not won[1]


class Cells:
    """Task whose clients hold few different rows, in each form of data."""

    simulated, num_clients = True, 3

    def __init__(self, persons: bool = False) -> None:
        draw = np.random.default_rng(3)
        self.inputs = draw.integers(0, 2, (300, 2)).astype(np.float32)
        self.targets = draw.integers(0, 2, 300)
        self.persons = [f"p{row % 40}" for row in range(300)] if persons else None

    def client_data(self, client: int) -> Any:
        inputs, targets = torch.from_numpy(self.inputs), torch.from_numpy(self.targets)
        if client == 0:
            return Examples(inputs, targets, self.persons)
        return LazyExamples([(inputs[row], int(targets[row])) for row in range(300)], persons=self.persons)


@pytest.mark.parametrize("group_equal_rows", [False, True])
def test_device_without_torch_holds_out_the_same_rows(group_equal_rows: bool) -> None:
    task = held_back(Cells(), SHARE, group_equal_rows=group_equal_rows)
    table = linear.Table(task.inputs, task.targets)
    parts = linear.parts_of(table, SHARE, group_equal_rows)
    for found, part in zip((data_of(task, 0), held_back_of(task, 0)), parts, strict=True):
        np.testing.assert_array_equal(found.inputs.numpy(), part.inputs)
        np.testing.assert_array_equal(found.targets.numpy(), part.targets)


def test_equal_rows_that_are_read_lazily_are_held_out_one_by_one() -> None:
    held = held_back_of(held_back(Cells(), SHARE), 1)
    assert isinstance(held, LazyExamples) and not outside(len(held), 300, SHARE)
    inputs, _ = held.batch(torch.arange(len(held)))
    assert len({tuple(row) for row in inputs.tolist()}) == 4


@pytest.mark.parametrize("client", [0, 1])
def test_no_person_is_both_trained_on_and_held_out_at_a_client(client: int) -> None:
    task = held_back(Cells(persons=True), SHARE, alone=True)
    kept, held = ({*each.persons} for each in (data_of(task, client), held_back_of(task, client)))
    assert len(kept | held) == 40 and not kept & held and 2 < len(held) < 16


# --- a run that an earlier release began --------------------------------------------------------------------------


def words(folder: Path) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in ("north", "south"):
        cells = zip(draw.integers(0, 3, 200), draw.integers(0, 2, 200), strict=True)
        rows = [f"{'abc'[x]},{['no', 'yes'][y]}" for x, y in cells]
        (folder / f"{name}.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    return folder


def kinds(data: Examples) -> set[tuple[float, ...]]:
    return {(*row, target) for row, target in zip(data.inputs.tolist(), data.targets.tolist(), strict=True)}


def test_run_folder_of_an_earlier_release_goes_on_under_its_rule(tmp_path: Path) -> None:
    folder, run = words(tmp_path / "words"), tmp_path / "run"
    told = [f"task.folder={folder}", "task=csv", "task.label=y", "task.simulated=true", "privacy=none"]
    settings = settings_from_overrides([*told, "num_rounds=2", "audit=off"])
    simulate(settings, run, quiet=True)

    def split() -> tuple[set[tuple[float, ...]], set[tuple[float, ...]]]:
        task = build(settings_from_overrides([f"resume={run}"])).task
        return kinds(task.held_out()), kinds(task.client_data(0)) | kinds(task.client_data(1))

    saved = json.loads((run / SAVED).read_text())
    assert saved.pop(SINGLY) is True
    held, kept = split()
    assert len(held) == len(kept) == 6
    (run / SAVED).write_text(json.dumps(saved))
    held, kept = split()
    assert held and kept and not held & kept
    settings = settings_from_overrides([f"resume={run}"])
    simulate(settings, run, quiet=True)
    assert json.loads((run / SAVED).read_text()).get(SINGLY) is not True


def test_clients_of_a_resumed_run_hold_out_by_its_rule(tmp_path: Path) -> None:
    told = ["task=digits", "privacy=client_central", "evaluate.clients=final"]
    for content, group_equal_rows in (({}, True), ({SINGLY: True}, False)):
        (tmp_path / SAVED).write_text(json.dumps(content))
        settings = settings_from_overrides(told).model_copy(update={"resume": str(tmp_path)})
        assert build(settings).settings.group_equal_rows is group_equal_rows
