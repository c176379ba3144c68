"""``fedveil compare``: one table of the results of runs, with means and intervals over seeds."""

import csv as tables
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..base.refusal import Refusal
from ..configs.round_line import AT_CLIENTS, GROUPS, OF_CLIENTS, TRAIN
from ..configs.strict import leaves
from ..evidence.page_text import text_of
from ..privacy.statistics.evaluation import GAIN_NAMES
from ..run.run_files import read_object

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JOB, RESULT, CONFIG = "job.json", "result.json", "config.yaml"
SEED = "seed"
CONFIDENCE = 0.95
WIDEST, NARROWEST = 40, 20  # characters of the table's first column
PRICES = "cost."  # prefix of the keys of a report's prices, which change no run
NO_DIFFERENCE = ("resume", "optimize")  # keys that change no result
# First characters of a formula in a spreadsheet (https://owasp.org/www-community/attacks/CSV_Injection), and wide ones.
EXPOSURE = "exposure_x"  # before the number of copies, in the name of a test of secrets
UNPLANTED, LIMIT = "unplanted", "limit"  # its figures beside the exposure
FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")


@dataclass(frozen=True)
class Row:
    """Settings and results of one run.

    Attributes:
        run: folder, relative to that of its sweep.
        overrides: the keys in which the compared runs differ, without their seeds.
        seed: seed of a declared simulation.
        status: `status` in result.json.
        reason: `reason` in result.json.
        metrics: metrics of the last evaluation.
        epsilon: epsilon by unit, against recipients of the model; infinity without a promise.
        bytes: bytes `down` to all clients and `up` from them; None if they are secret or were not counted.
        exposure: mean exposure of secrets in bits by their copies, as text; of those without a copy as UNPLANTED, and the
            largest possible as LIMIT; empty without secrets.
    """

    run: str
    overrides: Mapping[str, str]
    seed: int | None
    status: str
    reason: str
    metrics: Mapping[str, float]
    epsilon: Mapping[str, float]
    bytes: Mapping[str, int] | None = None
    exposure: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class MeanInterval:
    """Mean over seeds, and its 95 % interval by Student's t; a single run has no interval."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OverSeeds:
    """Runs that differ only in their seed."""

    overrides: Mapping[str, str]  # as of `Row`
    runs: int  # how many
    metrics: Mapping[str, MeanInterval]


def compare(
    runs: Sequence[Path], csv: Path | None = None, plot: Path | None = None, as_json: bool = False
) -> int:
    """Print one table of these runs; return the exit code.

    `runs` are folders of runs or of sweeps; `csv` and `plot` are files to write, which None leaves out.

    Raises:
        Refusal: a folder holds no run that has ended, or a file cannot be written.
    """
    # A shell expands sweep/* to its summaries too.
    sources = [each for each in runs if not each.is_file()] or runs
    rows = read_rows([folder for each in sources for folder in _folders(each)])
    try:
        if csv:
            write_csv(rows, csv)
        if plot:
            draw(rows, plot)
    except (OSError, ValueError) as error:
        raise Refusal("compare", str(plot or csv), f"cannot be written ({error})") from None
    by_folder = len(runs) > 1
    print(json.dumps(_plain(rows), indent=2, allow_nan=False) if as_json else format_table(rows, by_folder))
    return 0


def _folders(path: Path) -> list[Path]:
    """Return the run at a path, or the runs of the sweep at it, in order of their numbers."""
    if (path / RESULT).is_file() or (path / JOB).is_file():
        return [path]
    folders = sorted({file.parent for name in (JOB, RESULT) for file in path.rglob(name)}, key=natural_key)
    if not folders:
        raise Refusal("RUN", str(path), "holds no run that has ended; name the folder of a run or of a sweep")
    return folders


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Return a sort key by which 9 comes before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in path.parts]


# --- rows ---------------------------------------------------------------------------------------------------------


def read_rows(folders: Sequence[Path], base: Path | None = None) -> list[Row]:
    """Return one row for each folder of a run.

    Args:
        folders: folders with job.json or result.json.
        base: folder to which the names of the rows are relative; None keeps them as they are.
    """
    jobs = [read_object(folder / JOB) for folder in folders]
    of_sweep = all(jobs)
    # The jobs of a sweep have the same configuration but for their overrides; other runs may differ in any key.
    settings = [_overrides(job) for job in jobs] if of_sweep else [_configuration(each) for each in folders]
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if _differs(key, settings, of_sweep)]
    names = [str(each if base is None else each.relative_to(base)) for each in folders]
    return [
        _row(name, {key: each[key] for key in differing if key in each}, _result(folder, job))
        for name, each, folder, job in zip(names, settings, folders, jobs, strict=True)
    ]


def _differs(key: str, settings: Sequence[Mapping[str, str]], of_sweep: bool) -> bool:
    """Return whether runs may differ in their results by this key; outside a sweep each of them must have it."""
    if key in (SEED, *NO_DIFFERENCE) or key.startswith(PRICES):
        return False
    if not of_sweep and not all(key in each for each in settings):
        return False
    return len({each.get(key) for each in settings}) > 1


def _row(run: str, overrides: Mapping[str, str], result: Mapping[str, Any]) -> Row:
    """Return the row of a run from its result.json, or from {} if there is none: then it failed. `overrides` as in `Row`."""
    privacy = [each for each in result.get("privacy", ()) if each["adversary"] == "model"]
    metrics: Mapping[str, Any] = result.get("metrics") or {}
    held_out = {key: value for key, value in metrics.items() if not key.startswith(TRAIN)}
    carried = result.get("bytes")
    return Row(
        run,
        overrides,
        seed=result.get("seed"),
        status=str(result.get("status", "failed")),
        reason=str(result.get("reason", "")),
        metrics={key: value for key, value in held_out.items() if isinstance(value, int | float)},
        epsilon={each["unit"]: float(each["epsilon"]) for each in privacy},  # reads "infinity" too
        bytes=carried and {way: sum(carried[way].values()) for way in ("down", "up")},
        exposure=_exposure(result.get("audit") or {}),
    )


def _exposure(audit: Mapping[str, Any]) -> dict[str, float]:
    """Return the exposures of an audit's secrets, as of `Row`, in ascending order of their copies."""
    tests = [each for each in audit.get("memorisation") or () if each["name"].startswith(EXPOSURE)]
    bits = {int(each["name"].removeprefix(EXPOSURE)): each["shown"] for each in tests}
    levels = [
        {name: float(each[name]) for name in (UNPLANTED, LIMIT) if name in each} for each in bits.values()
    ]
    return {str(copies): float(bits[copies]["bits"]) for copies in sorted(bits)} | dict(*levels[:1])


def _result(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's result.json, else the result in job.json; if it has no seed, with that of the job's override."""
    result = read_object(folder / RESULT) or job.get("result", {})
    seeds = [each.partition("=")[2] for each in job.get("overrides", ()) if each.startswith(f"{SEED}=")]
    return {SEED: int(seeds[0]) if seeds and seeds[0].isdigit() else None, **result}


def _overrides(job: Mapping[str, Any]) -> dict[str, str]:
    """Return the overrides in job.json by key."""
    pairs = (each.lstrip("+").partition("=") for each in job["overrides"])
    return {key: _text(value) for key, _, value in pairs}


def _text(value: object) -> str:
    """Return a value as text, equal for 3 and 3.0."""
    if value is None:
        return "null"
    number = _real(str(value))
    return str(value) if number is None else f"{number:.15g}"


def _configuration(folder: Path) -> dict[str, str]:
    """Return the configuration of a run by dotted keys; none if it was not saved."""
    if not (folder / CONFIG).is_file():
        return {}
    from ..run.run_files import read_config

    pairs = leaves(read_config(folder / CONFIG)[1])
    return {key.removesuffix(".name"): _text(value) for key, value in pairs}


def over_seeds(rows: Sequence[Row]) -> list[OverSeeds]:
    """Return the mean of each metric over runs that differ only in their seed; runs without metrics are left out."""
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
    """Return the mean of values, with its interval if they are finite and at least two."""
    mean = fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return MeanInterval(mean, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(len(values))
    return MeanInterval(mean, mean - half, mean + half)


# --- the table ----------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Row], by_folder: bool = False) -> str:
    """Return the rows as a table for a terminal; then one by groups of people and one over seeds, if there are any.

    Args:
        rows: rows of the runs.
        by_folder: whether a row is named by the folder of its run, with its overrides in the line below.
    """
    from ..run.display import visible

    names = _names(rows)
    columns = {"run" if by_folder else "job": [row.run if by_folder else _label(row) for row in rows]}
    if any(row.status != "completed" for row in rows):
        columns["status"] = [row.status for row in rows]
    columns |= {name: [_number(row.metrics.get(name)) for row in rows] for name in names}
    columns["epsilon"] = [
        ", ".join(f"{unit} {value:.3g}" for unit, value in row.epsilon.items()) or "-" for row in rows
    ]
    if any(row.bytes for row in rows):
        columns |= {way: [_format_bytes(row.bytes, way) for row in rows] for way in ("down", "up")}
    lines = [[*columns], *map(list, zip(*columns.values(), strict=True))]
    groups = over_seeds(rows)
    tables = [
        _align(lines, ["", *map(_label, rows)] if by_folder else ()),
        _by_group(groups),
        _by_copies(rows, by_folder),
    ]
    tables = [visible(each) for each in tables if each]  # run folders may be somebody else's
    means = [
        (_describe(each.overrides) or "all", str(each.runs), *(_spread(each.metrics.get(n)) for n in names))
        for each in groups
        if each.runs > 1
    ]
    if means:
        tables.append(_align([("mean over seeds, 95 % interval", "runs", *names), *means]))
    return "\n\n".join(tables)


def _by_group(runs: Sequence[OverSeeds]) -> str:
    """Return a table of the metrics by group of people, with differences from privacy=none; empty without such metrics."""
    names = list(dict.fromkeys(name for each in runs for name in each.metrics if name.startswith(GROUPS)))
    if not names:
        return ""
    plain = [each for each in runs if each.overrides.get("privacy") == "none"]
    ordered = [*plain, *(each for each in runs if each not in plain)]
    lines = [("by group", *(_describe(each.overrides) or "all" for each in ordered))]
    for name in names:
        means = [each.metrics[name].mean if name in each.metrics else None for each in ordered]
        cells = [_number(mean) for mean in means]
        if plain and (base := means[0]) is not None:  # the run without privacy is the first
            cells[1:] = [
                cell if mean is None else f"{cell} ({mean - base:+.4f})"
                for cell, mean in zip(cells[1:], means[1:], strict=True)
            ]
        lines.append((name.removeprefix(GROUPS), *cells))
    return _align(lines)


def _by_copies(rows: Sequence[Row], by_folder: bool) -> str:
    """Return a table of the exposure of secrets by their copies; empty without secrets; arguments as of `format_table`."""
    exposed = [row for row in rows if row.exposure]
    if not exposed:
        return ""
    names = dict.fromkeys(name for row in exposed for name in row.exposure)
    titles = [row.run if by_folder else _label(row) for row in exposed]
    lines = [("exposure in bits, by copies", *titles)]
    lines += [(name, *(_number(row.exposure.get(name)) for row in exposed)) for name in names]
    return _align(lines)


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the names of the metrics that a table shows: at most two held-out ones, accuracy first, and personal ones.

    Where clients have personal models, the first metric on their own rows has three columns, of which none is left out.
    """
    names = dict.fromkeys(name for row in rows for name in row.metrics if "/" not in name)
    own = dict.fromkeys(name for row in rows for name in row.metrics if name.startswith(OF_CLIENTS))
    metrics = dict.fromkeys(name.partition("/")[2] for name in own)
    first = [prefix + name for name in [*metrics][:1] for prefix in OF_CLIENTS if prefix + name in own]
    # Of real clients the differences are known, with noise.
    gains = [AT_CLIENTS + each for each in GAIN_NAMES.values()]
    first += [name for name in gains if any(name in row.metrics for row in rows)]
    return sorted(names, key=lambda name: name != "accuracy")[:2] + first


def _label(row: Row) -> str:
    """Return the overrides and the seed of a run, else its folder."""
    seeds = {} if row.seed is None else {SEED: str(row.seed)}
    return _describe({**row.overrides, **seeds}) or row.run


def _describe(overrides: Mapping[str, str]) -> str:
    """Return overrides in one line, numbers with four digits."""
    numbers = {key: _real(value) for key, value in overrides.items()}
    return " ".join(
        f"{key}={value}" if numbers[key] is None else f"{key}={numbers[key]:.4g}"
        for key, value in overrides.items()
    )


def _align(lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return lines of cells in columns that fit the terminal; a long first cell is continued in the line below.

    Args:
        lines: cells by line and column; the first line is the header.
        notes: text under each line; () for none.
    """
    import shutil
    import textwrap

    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    others = sum(2 + width for width in widths[1:])
    available = shutil.get_terminal_size((WIDEST + others, 1)).columns
    widths[0] = min(widths[0], WIDEST, max(NARROWEST, available - others))
    output: list[str] = []
    for number, line in enumerate(lines):
        first = textwrap.wrap(line[0], widths[0], break_on_hyphens=False, subsequent_indent="  ") or [""]
        cells = zip((first[0], *line[1:]), widths, strict=True)
        output += ["  ".join(cell.ljust(width) for cell, width in cells).rstrip(), *first[1:]]
        if number < len(notes):
            output += textwrap.wrap(notes[number], available - 2, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(output)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _spread(interval: MeanInterval | None) -> str:
    """Return a mean and half the width of its interval."""
    if interval is None or interval.high is None:
        return "-"
    return f"{interval.mean:.4g} ± {interval.high - interval.mean:.2g}"


def _format_bytes(sizes: Mapping[str, int] | None, way: str) -> str:
    return text_of(sizes[way], "bytes") if sizes else "-"


def _plain(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows, and their means over seeds, as values of JSON."""
    groups = [asdict(each) for each in over_seeds(rows)]
    return _json_values({"runs": [asdict(row) for row in rows], "over_seeds": groups})


def _json_values(value: Any) -> Any:
    """Return a value with null for NaN, and a word for infinity, neither of which JSON has."""
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
    """Write a line for each run, with the means over seeds of the runs that differ from it only in their seed."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    metrics = dict.fromkeys(name for row in rows for name in row.metrics)
    units = dict.fromkeys(unit for row in rows for unit in row.epsilon)
    groups = {tuple(each.overrides.items()): each.metrics for each in over_seeds(rows)}
    text = io.StringIO()
    lines = tables.writer(text, lineterminator="\n")
    interval_names = [f"{name} {part}" for name in metrics for part in ("mean", "low", "high")]
    header = ["run", *keys, SEED, "status", *metrics, *(f"epsilon {unit}" for unit in units), *interval_names]
    lines.writerow(map(cell, header))
    for row in rows:
        means = groups.get(tuple(row.overrides.items()), {})
        cells = [row.run, *(row.overrides.get(key, "") for key in keys), row.seed, row.status]
        cells += [row.metrics.get(name, "") for name in metrics]
        cells += [row.epsilon.get(unit, "") for unit in units]
        for name in metrics:
            cells += astuple(means[name]) if name in means else ("", "", "")
        lines.writerow(map(cell, cells))
    path.write_text(text.getvalue(), encoding="utf-8")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the first metric of the runs: over the only key in which they differ if it is a number, else by settings."""
    from matplotlib.figure import Figure

    names, groups = _names(rows), over_seeds(rows)
    if not names or not groups:
        raise Refusal("--plot", str(path), "no run has a metric to show")
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    numeric = len(keys) == 1 and all(_real(row.overrides.get(keys[0])) is not None for row in rows)
    exposed = [row for row in rows if row.exposure]
    lines = sum(_wrapped(_describe(each.overrides)).count("\n") for each in groups)
    height = 4.0 if numeric else 1.2 + 0.45 * len(groups) + 0.15 * lines
    heights = [height, 4.0][: 1 + bool(exposed)]
    figure = Figure(figsize=(6.4, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].add_subplot()
    if numeric:
        _draw_curve(axes, rows, groups, keys[0], names[0])
    else:
        _draw_settings(axes, rows, groups, names[0])
    if exposed:
        _draw_exposure(parts[-1].add_subplot(), exposed)
        parts[-1].legend(loc="outside upper left", frameon=False)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _real(text: str | None) -> float | None:
    """Return the number that a text is; None if it is no number."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _draw_curve(axes: "Axes", rows: Sequence[Row], groups: Sequence[OverSeeds], key: str, name: str) -> None:
    """Draw the means of a metric over the numbers of a key, with their intervals, and a point for each run."""
    ordered = sorted(groups, key=lambda each: float(each.overrides[key]))
    means = [each.metrics[name] for each in ordered]
    numbers = [float(each.overrides[key]) for each in ordered]
    axes.errorbar(numbers, [each.mean for each in means], _bars(means), marker="o", capsize=3)
    scored = [row for row in rows if name in row.metrics]
    numbers, values = [float(row.overrides[key]) for row in scored], [row.metrics[name] for row in scored]
    axes.plot(numbers, values, ".", color="0.6", zorder=1)
    axes.set_xlabel(key)
    axes.set_ylabel(_axis(name, groups))


def _draw_settings(axes: "Axes", rows: Sequence[Row], groups: Sequence[OverSeeds], name: str) -> None:
    """Draw the mean of a metric for each setting in a line of its own, with its interval, and a point for each run."""
    labels = [_describe(each.overrides) or "all runs" for each in groups]
    means = [each.metrics[name] for each in groups]
    heights = list(range(len(groups)))[::-1]
    for row in rows:
        if name in row.metrics:
            height = heights[labels.index(_describe(row.overrides) or "all runs")]
            axes.plot(row.metrics[name], height, ".", color="0.6", zorder=1)
    axes.errorbar([each.mean for each in means], heights, xerr=_bars(means), fmt="o", capsize=3)
    axes.set_yticks(heights, list(map(_wrapped, labels)))
    axes.set_ylim(-0.5, len(groups) - 0.5)
    axes.set_xlabel(_axis(name, groups))


def _wrapped(label: str) -> str:
    """Return a label in lines that leave room for the picture beside it."""
    import textwrap

    return textwrap.fill(label, WIDEST, break_on_hyphens=False)


def _draw_exposure(axes: "Axes", rows: Sequence[Row]) -> None:
    """Draw the exposure of secrets by their copies, a line for each run; dashed: that of secrets without a copy, and the limit."""
    for row in rows:
        points = [(int(name), bits) for name, bits in row.exposure.items() if name.isdecimal()]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=_wrapped(_label(row)))
        axes.axhline(row.exposure[UNPLANTED], color=line.get_color(), linestyle="--", linewidth=1)
    limits = [row.exposure[LIMIT] for row in rows if LIMIT in row.exposure]  # earlier releases had none
    axes.axhline(max(limits, default=0.0), color="0.6", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    copies = sorted({int(name) for row in rows for name in row.exposure if name.isdecimal()})
    axes.set_xticks(copies, map(str, copies))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients that hold a secret")
    axes.set_ylabel("exposure in bits")


def _bars(means: Sequence[MeanInterval]) -> list[list[float]]:
    """Return the lengths of Matplotlib's error bars, below and above; 0 without an interval."""
    halves = [0.0 if each.high is None else each.high - each.mean for each in means]
    return [halves, halves]


def _axis(name: str, groups: Sequence[OverSeeds]) -> str:
    several = any(each.runs > 1 for each in groups)
    return f"{name}, mean over seeds and 95 % interval" if several else name


def cell(value: object) -> object:
    """Return a cell of a CSV file that no spreadsheet evaluates: a formula has an apostrophe before it, unlike a number."""
    if not isinstance(value, str) or not FORMULA.match(value) or _real(value) is not None:
        return value
    return f"'{value}"
