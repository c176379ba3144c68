"""Engines side by side: the real work and the idle client on each, in a process of its own, interleaved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .contenders import ALL, NVFLARE, Missing, measure
from .stopwatch import Stopwatch
from .tables import Row, conditions, median, ratio, result_of, spread, wide
from .workload import TRAINED, Size

IDLE = "idle-100k"
OURS = "fedveil, 1 worker"
OURS_TWO = "fedveil, 2 workers"
OURS_ON_RAY = "fedveil on Ray, 2 actors"
STOCK = "Flower on Ray, stock app"
SAME = "Flower on Ray, our apps"
LEAN = "lean loop, channels-last"

# What is divided by what.
_COMPARED = (
    (STOCK, OURS_TWO),
    (SAME, OURS_TWO),
    (STOCK, OURS_ON_RAY),
    (SAME, OURS_ON_RAY),
    (OURS_ON_RAY, OURS_TWO),
    ("pfl, 1 process", OURS),
    ("pfl, 2 processes", OURS_TWO),
    (OURS, LEAN),
    (NVFLARE, OURS),
)

_TABLES = {
    "Seconds of a round": "wall s",
    "Spread of the processes' medians, percent": "spread %",
    "Seconds of CPU of a round": "cpu s",
    "Seconds to the end of the first round": "first round s",
    "MiB": "MiB",
}

Measured = dict[str, list[Stopwatch]]


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
      size: how much there is to do.
      repeats: how often every contender's process is started.
      pfl_python: a Python that has pfl 0.6 and torch.
      workloads: which models, for the benchmark of the engines.
      before: checkout of an earlier fedveil, a folder of that name.
      contenders: which, for the benchmark of the engines.
      device: on which models train, for the benchmark of a GPU.
    """

    size: Size = field(default_factory=Size)
    repeats: int = 3
    pfl_python: str | None = None
    workloads: tuple[str, ...] = TRAINED
    before: str | None = None
    contenders: tuple[str, ...] = ALL
    device: str = "cuda"


def run_engines(options: Options) -> Row:
    """Measure the whole round of every contender on every workload."""
    before, notes, rows = conditions(), dict[str, None](), list[Row]()
    wall: list[Row] = []
    cpu: list[Row] = []
    for workload in options.workloads:
        measured = _interleaved(options.contenders, workload, options, notes)
        rows += [_row(workload, name, watches) for name, watches in measured.items()]
        wall += _ratios(workload, measured, "wall", options.contenders)
        cpu += _ratios(workload, measured, "cpu", options.contenders)
    tables = {title: wide(rows, ["contender"], "workload", [column]) for title, column in _TABLES.items()}
    tables |= {
        "Ratios of wall time": wide(wall, ["this", "over"], "workload", ["ratio"]),
        "Ratios of CPU time": wide(cpu, ["this", "over"], "workload", ["ratio"]),
    }
    return result_of("engines", before, tables, [*notes, _said(options)])


def run_overhead(options: Options) -> Row:
    """Measure clients that send back what they received: what remains is the engine, the sum and the noise."""
    before, notes = conditions(), dict[str, None]()
    measured = _interleaved((OURS, OURS_TWO, STOCK, SAME), IDLE, options, notes)
    rows = [_row(IDLE, name, watches) for name, watches in measured.items()]
    for row in rows:
        row["cpu ms/task"] = round(row["cpu s"] * 1000 / options.size.cohort, 3)
    by_name = {row["contender"]: row for row in rows}
    ratios = [
        {
            "Ray": ray,
            "ours": ours,
            **{c: ratio(by_name[ray][c], by_name[ours][c]) for c in ("cpu s", "wall s", "MiB")},
        }
        for ray in (STOCK, SAME)
        for ours in (OURS, OURS_TWO)
        if ray in by_name
    ]
    tables = {"Clients that do nothing, 100 000 parameters": rows, "Ratios": ratios}
    return result_of("overhead", before, tables, [*notes, _said(options)])


def _interleaved(names: Sequence[str], workload: str, options: Options, notes: dict[str, None]) -> Measured:
    """Run every contender once, then every contender again, so that a busy minute falls on all of them."""
    measured: Measured = defaultdict(list)
    missing: set[str] = set()
    for _ in range(options.repeats):
        for name in names:
            if name in missing:
                continue
            try:
                watch = measure(name, workload, options.size, options.pfl_python)
            except Missing as lack:
                missing.add(name)
                notes[f"{name}: skipped, {lack.reason}"] = None
            else:
                measured[name].append(watch)
    return measured


def _row(workload: str, name: str, watches: Sequence[Stopwatch]) -> Row:
    return {
        "workload": workload,
        "contender": name,
        "wall s": _middle(watches, "wall"),
        "spread %": spread([median(watch.wall) for watch in watches]),
        "cpu s": _middle(watches, "cpu"),
        "first round s": median([watch.first for watch in watches]),
        "MiB": round(median([watch.memory for watch in watches])),
    }


def _middle(watches: Sequence[Stopwatch], field: str) -> float:
    return median([value for watch in watches for value in getattr(watch, field)])


def _ratios(workload: str, measured: Measured, field: str, asked: Sequence[str]) -> list[Row]:
    middles = {name: _middle(watches, field) for name, watches in measured.items()}
    return [
        {
            "workload": workload,
            "this": one,
            "over": other,
            "ratio": ratio(middles.get(one), middles.get(other)),
        }
        for one, other in _COMPARED
        if {one, other} <= set(asked)
    ]


def _said(options: Options) -> str:
    s = options.size
    return (
        f"{s.clients} clients, {s.cohort} a round; medians over {options.repeats} processes of {s.rounds} rounds each "
        f"after a first; first round: from the start of the process"
    )
