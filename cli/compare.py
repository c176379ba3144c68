"""``fedveil compare``: one table of the results of runs, with means and intervals over seeds."""

import csv as tables
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..base.refusal import Refusal
from ..configs.round_line import GROUPS, TRAIN
from ..configs.strict import leaves
from ..evidence.page_text import text_of
from ..run.run_files import read_object

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JOB, RESULT, CONFIG = "job.json", "result.json", "config.yaml"
SEED = "seed"
CONFIDENCE = 0.95
WIDEST, NARROWEST = 40, 20  # columns of the table's first
PRICES = "cost."  # prefix of the keys of a report's prices, which change no run
NO_DIFFERENCE = ("resume", "optimize")  # keys that change no result
# https://owasp.org/www-community/attacks/CSV_Injection, with the wide forms that spreadsheets take for the same.
FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")


@dataclass(frozen=True)
class Row:
    """Settings and results of one run.

    Attributes:
        run: its folder, relative to that of its sweep where it has one.
        overrides: the keys in which the runs differ, without their seeds.
        seed: of a declared simulation.
        status: word of result.json.
        reason: sentence of result.json.
        metrics: of the last evaluation.
        epsilon: by unit, against recipients of the model; infinity where nothing is promised.
        bytes: down to all clients and up from them; None where that may not be told, or was not counted.
    """

    run: str
    overrides: Mapping[str, str]
    seed: int | None
    status: str
    reason: str
    metrics: Mapping[str, float]
    epsilon: Mapping[str, float]
    bytes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class MeanInterval:
    """Mean over seeds, and its 95 % interval by Student's t; a single run has none."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OverSeeds:
    """Runs that differ only in their seed."""

    overrides: Mapping[str, str]
    runs: int
    metrics: Mapping[str, MeanInterval]


def compare(
    runs: Sequence[Path], csv: Path | None = None, plot: Path | None = None, as_json: bool = False
) -> int:
    """Print one table of these runs; return the exit code.

    Arguments as of `fedveil compare`.

    Raises:
        Refusal: a folder holds no run that has ended, or a file cannot be written.
    """
    sources = [each for each in runs if not each.is_file()] or runs  # sweep/* names its summaries too
    rows = read_rows([folder for each in sources for folder in _folders(each)])
    try:
        if csv is not None:
            write_csv(rows, csv)
        if plot is not None:
            draw(rows, plot)
    except (OSError, ValueError) as error:
        raise Refusal("compare", str(plot or csv), f"cannot be written ({error})") from None
    print(
        json.dumps(_plain(rows), indent=2, allow_nan=False) if as_json else format_table(rows, len(runs) > 1)
    )
    return 0


def _folders(path: Path) -> list[Path]:
    """Return the folders of runs: the path itself, or those of the jobs of a sweep."""
    if (path / RESULT).is_file() or (path / JOB).is_file():
        return [path]
    folders = sorted({file.parent for name in (JOB, RESULT) for file in path.rglob(name)}, key=_natural)
    if not folders:
        raise Refusal("RUN", str(path), "holds no run that has ended; name the folder of a run or of a sweep")
    return folders


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in path.parts]


# --- rows ---------------------------------------------------------------------------------------------------------


def read_rows(folders: Sequence[Path], base: Path | None = None) -> list[Row]:
    """Return one row for each folder of a run.

    Args:
        folders: each with job.json or result.json.
        base: what the folders are shown relative to.
    """
    jobs = [read_object(folder / JOB) for folder in folders]
    settings = [_overrides(job) for job in jobs] if all(jobs) else [_flat(folder) for folder in folders]
    keys = [
        key
        for key in dict.fromkeys(key for each in settings for key in each)
        if key not in (SEED, *NO_DIFFERENCE)
        and not key.startswith(PRICES)
        and len({each.get(key) for each in settings}) > 1
        if all(jobs) or all(key in each for each in settings)
    ]
    names = [str(each if base is None else each.relative_to(base)) for each in folders]
    return [
        _row(run, {key: each[key] for key in keys if key in each}, _result(folder, job))
        for run, each, folder, job in zip(names, settings, folders, jobs, strict=True)
    ]


def _row(run: str, overrides: Mapping[str, str], result: Mapping[str, Any]) -> Row:
    privacy = [each for each in result.get("privacy", ()) if each["adversary"] == "model"]
    return Row(
        run,
        overrides,
        result.get("seed"),
        str(result.get("status", "failed")),
        str(result.get("reason", "")),
        {
            key: value
            for key, value in (result.get("metrics") or {}).items()
            if isinstance(value, int | float) and not key.startswith(TRAIN)
        },
        {each["unit"]: float(each["epsilon"]) for each in privacy},
        _bytes(result.get("bytes")),
    )


def _bytes(carried: Mapping[str, Any] | None) -> dict[str, int] | None:
    return None if carried is None else {way: sum(carried[way].values()) for way in ("down", "up")}


def _result(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    result = read_object(folder / RESULT) or job.get("result", {})
    seeds = [each.partition("=")[2] for each in job.get("overrides", ()) if each.startswith(f"{SEED}=")]
    return {SEED: int(seeds[0]) if seeds and seeds[0].isdigit() else None, **result}


def _overrides(job: Mapping[str, Any]) -> dict[str, str]:
    pairs = (each.lstrip("+").partition("=") for each in job["overrides"])
    return {key: _text(value) for key, _, value in pairs}


def _text(value: object) -> str:
    """Return a value as text, equal for 3 and 3.0."""
    number = _real(str(value))
    if value is None:
        return "null"
    return str(value) if number is None else f"{number:.15g}"


def _flat(folder: Path) -> dict[str, str]:
    """Return the configuration of a run by dotted keys."""
    if not (folder / CONFIG).is_file():
        return {}
    from ..run.run_files import read_config

    pairs = leaves(read_config(folder / CONFIG)[1])
    return {key.removesuffix(".name"): _text(value) for key, value in pairs}


def over_seeds(rows: Sequence[Row]) -> list[OverSeeds]:
    """Return the mean of each metric over completed runs that differ only in their seed."""
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        if row.metrics:
            groups.setdefault(tuple(row.overrides.items()), []).append(row)
    return [
        OverSeeds(
            dict(key), len(group), {name: _interval([each.metrics[name] for each in group]) for name in names}
        )
        for key, group in groups.items()
        if (names := [name for name in group[0].metrics if all(name in each.metrics for each in group)])
    ]


def _interval(values: Sequence[float]) -> MeanInterval:
    mean = fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return MeanInterval(mean, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(len(values))
    return MeanInterval(mean, mean - half, mean + half)


# --- the table ----------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Row], by_folder: bool = False) -> str:
    """Return the rows as a table for a terminal, and a second one over seeds where there are several.

    Args:
        rows: of the runs.
        by_folder: whether a row is named by the folder of its run, with its overrides in the line below.
    """
    names, has_bytes = _names(rows), any(row.bytes for row in rows)
    has_status = any(row.status != "completed" for row in rows)
    lines = [
        (
            row.run if by_folder else _label(row),
            *((row.status,) if has_status else ()),
            *(_number(row.metrics.get(n)) for n in names),
            ", ".join(f"{unit} {value:.3g}" for unit, value in row.epsilon.items()) or "-",
            *(_format_bytes(row.bytes) if has_bytes else ()),
        )
        for row in rows
    ]
    header = (
        "run" if by_folder else "job",
        *(("status",) if has_status else ()),
        *names,
        "epsilon",
        *(("down", "up") if has_bytes else ()),
    )
    table = _align([header, *lines], ["", *map(_label, rows)] if by_folder else ())
    if by_group := _by_group(over_seeds(rows)):
        table += "\n\n" + by_group
    from ..run.display import visible

    table = visible(table)  # run folders may be somebody else's
    groups = [each for each in over_seeds(rows) if each.runs > 1]
    if not groups:
        return table
    means = [
        (_describe(each.overrides) or "all", str(each.runs), *(_spread(each.metrics.get(n)) for n in names))
        for each in groups
    ]
    return table + "\n\n" + _align([("mean over seeds, 95 % interval", "runs", *names), *means])


def _by_group(runs: Sequence[OverSeeds]) -> str:
    """Return each group's figures, with the difference to the run without privacy; empty without groups."""
    names = list(dict.fromkeys(name for each in runs for name in each.metrics if name.startswith(GROUPS)))
    if not names:
        return ""
    plain = [each for each in runs if each.overrides.get("privacy") == "none"]
    base = plain[0].metrics if plain else {}
    ordered = [*plain, *(each for each in runs if each not in plain)]
    lines = [("by group", *(_describe(each.overrides) or "all" for each in ordered))]
    for name in names:
        cells: list[str] = []
        for group in ordered:
            cell = _number(group.metrics[name].mean) if name in group.metrics else "-"
            if name in base and name in group.metrics and group.metrics is not base:
                cell += f" ({group.metrics[name].mean - base[name].mean:+.4f})"
            cells.append(cell)
        lines.append((name.removeprefix(GROUPS), *cells))
    return _align(lines)


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the held-out metrics that fit into a table."""
    names = dict.fromkeys(name for row in rows for name in row.metrics if "/" not in name)
    return sorted(names, key=lambda name: name != "accuracy")[:2]


def _label(row: Row) -> str:
    seeds = {} if row.seed is None else {SEED: str(row.seed)}
    return _describe({**row.overrides, **seeds}) or row.run


def _describe(overrides: Mapping[str, str]) -> str:
    numbers = {key: _real(value) for key, value in overrides.items()}
    return " ".join(
        f"{key}={value}" if numbers[key] is None else f"{key}={numbers[key]:.4g}"
        for key, value in overrides.items()
    )


def _align(lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return the cells in columns; what is longer than its column goes on in the line below.

    Args:
        lines: of cells.
        notes: text under each line; empty for none.
    """
    import shutil
    import textwrap

    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    others = sum(2 + width for width in widths[1:])
    room = shutil.get_terminal_size((WIDEST + others, 1)).columns
    widths[0] = min(widths[0], WIDEST, max(NARROWEST, room - others))
    output: list[str] = []
    for number, line in enumerate(lines):
        first = textwrap.wrap(line[0], widths[0], break_on_hyphens=False, subsequent_indent="  ") or [""]
        cells = zip((first[0], *line[1:]), widths, strict=True)
        output += ["  ".join(cell.ljust(width) for cell, width in cells).rstrip(), *first[1:]]
        if number < len(notes):
            output += textwrap.wrap(notes[number], room - 2, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(output)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _spread(interval: MeanInterval | None) -> str:
    if interval is None or interval.high is None:
        return "-"
    return f"{interval.mean:.4g} ± {interval.high - interval.mean:.2g}"


def _format_bytes(sizes: Mapping[str, int] | None) -> tuple[str, str]:
    """Return the bytes down and up in words."""
    if sizes is None:
        return "-", "-"
    return text_of(sizes["down"], "bytes"), text_of(sizes["up"], "bytes")


def _plain(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows for JSON: null for NaN, a word for infinity."""
    return {
        "runs": _json_values([asdict(row) for row in rows]),
        "over_seeds": _json_values([asdict(g) for g in over_seeds(rows)]),
    }


def _json_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "infinity" if value > 0 else None
    return value


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, and their means over seeds, as JSON."""
    path.write_text(json.dumps(_plain(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write a row a run, each with the means over seeds of its group."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    units = list(dict.fromkeys(unit for row in rows for unit in row.epsilon))
    means = {tuple(each.overrides.items()): each for each in over_seeds(rows)}
    text = io.StringIO()
    out = tables.writer(text, lineterminator="\n")
    spread = [f"{name} {part}" for name in metrics for part in ("mean", "low", "high")]
    head = ["run", *keys, SEED, "status", *metrics, *(f"epsilon {unit}" for unit in units), *spread]
    out.writerow(map(cell, head))
    for row in rows:
        group = means.get(tuple(row.overrides.items()))
        stats = [group.metrics.get(name) if group else None for name in metrics]
        cells = [
            part for each in stats for part in ((each.mean, each.low, each.high) if each else ("", "", ""))
        ]
        settings = [row.overrides.get(key, "") for key in keys]
        values = [row.metrics.get(name, "") for name in metrics] + [
            row.epsilon.get(unit, "") for unit in units
        ]
        out.writerow(map(cell, [row.run, *settings, row.seed, row.status, *values, *cells]))
    path.write_text(text.getvalue(), encoding="utf-8")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the first metric of the runs: over the one number in which they differ, else a line for each setting."""
    from matplotlib.figure import Figure

    names, groups = _names(rows), over_seeds(rows)
    if not names or not groups:
        raise Refusal("--plot", str(path), "no run has a metric to show")
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    numeric = len(keys) == 1 and all(_real(row.overrides.get(keys[0])) is not None for row in rows)
    figure = Figure(figsize=(6.4, 4.0 if numeric else 1.2 + 0.45 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    if numeric:
        _draw_curve(axes, rows, groups, keys[0], names[0])
    else:
        _draw_lines(axes, rows, groups, names[0])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _real(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _draw_curve(axes: "Axes", rows: Sequence[Row], groups: Sequence[OverSeeds], key: str, name: str) -> None:
    at = sorted((float(each.overrides[key]), each.metrics[name]) for each in groups)
    axes.errorbar(
        [x for x, _ in at], [y.mean for _, y in at], _bars([y for _, y in at]), marker="o", capsize=3
    )
    points = [(float(row.overrides[key]), row.metrics[name]) for row in rows if name in row.metrics]
    axes.plot([x for x, _ in points], [y for _, y in points], ".", color="0.6", zorder=1)
    axes.set_xlabel(key)
    axes.set_ylabel(_axis(name, groups))


def _draw_lines(axes: "Axes", rows: Sequence[Row], groups: Sequence[OverSeeds], name: str) -> None:
    labels = [_describe(each.overrides) or "all runs" for each in groups]
    means = [each.metrics[name] for each in groups]
    heights = list(range(len(groups)))[::-1]
    for row in rows:
        if name in row.metrics:
            height = heights[labels.index(_describe(row.overrides) or "all runs")]
            axes.plot(row.metrics[name], height, ".", color="0.6", zorder=1)
    axes.errorbar([each.mean for each in means], heights, xerr=_bars(means), fmt="o", capsize=3)
    axes.set_yticks(heights, labels)
    axes.set_ylim(-0.5, len(groups) - 0.5)
    axes.set_xlabel(_axis(name, groups))


def _bars(means: Sequence[MeanInterval]) -> list[list[float]]:
    halves = [0.0 if each.high is None else each.high - each.mean for each in means]
    return [halves, halves]


def _axis(name: str, groups: Sequence[OverSeeds]) -> str:
    several = any(each.runs > 1 for each in groups)
    return f"{name}, mean over seeds and 95 % interval" if several else name


def cell(value: object) -> object:
    """Return a value, a text that begins a formula behind an apostrophe; one that reads as a number begins none."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"
