"""Inquiry: several questions that one release answers, and that share its noise and its charge. All of it is public.

It is read from YAML or from the JSON that travels, by the same rules on both sides. Where clients are hidden, each
question is a segment of the sum, and so is the share of rows that it had to clip. Where records are, a vector is the
sum of parts that each have a record's norm: each question is an array of it, and so are the rows that it clipped and
those that it did not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...base.bounded_decoding import Undecodable, read_json
from ...base.refusal import Refusal, positive, real, word
from ..budget import Unit
from ..mechanisms.sum_spec import TRAINING, Segment, SumSpec, cells_for
from .columns import Bins, Numbers, Table
from .discrimination import Discrimination
from .evaluation import EVALUATION
from .fairness import Fairness, share_of
from .figure import NORMAL_95, Figure
from .kinds import (
    ColumnCorrelation,
    ColumnMean,
    ColumnMeans,
    Count,
    Histogram,
    Quantiles,
    Statistic,
    Variance,
    require_cells,
    row_count,
)
from .pairs import Amount, Event, Levels, PairStrengths
from .prefixes import Prefixes
from .survival import CENSORED_SHARES, Survival

STATISTICS = "statistics"  # the default purpose
CLIPPED = "clipped"  # ends the name of the segment of a question's clipped share
CLIPPED_SHARE = 0.02  # of the squared norm, for these segments: each costs the counts 1 % of noise at most
MAX_QUESTIONS = 32
MAX_BYTES = 1 << 16  # of an inquiry that travels
MAX_NAME = 64
INQUIRY_KEYS = ("name", "purpose", "why", "unit", "model", "records", "ask")
ATTRIBUTION = "attribution "  # before a column: how much it adds to what a model says, or takes from it
DIGEST = re.compile("[0-9a-f]{64}")
UNITS = (Unit.CLIENT, Unit.RECORD)
COMMON = ("name", "kind", "resolution", "at_least")  # keys of a question of any kind


@dataclass(frozen=True)
class Question:
    """One question of an inquiry.

    Attributes:
      name: name of the question, unique within the inquiry.
      statistic: statistic of the question.
      resolution: largest half-width of its intervals, in its own units; None sets no limit.
      at_least: assumed number of rows of all clients, for planning an interval; None if unknown.
    """

    name: str
    statistic: Statistic
    resolution: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Inquiry:
    """Questions that share one release.

    Attributes:
      name: name of the stored answer; a new answer needs a new name.
      purpose: a word that owners allow or refuse.
      why: reason of the question, in a sentence for owners.
      records: rows of a client that count in full; the contribution of a client with more is clipped.
      questions: at least one.
      text: the inquiry in canonical JSON, as it travels.
      unit: hidden unit: a client, or a record.
      model: SHA-256 of the released model whose attributions are columns, in hexadecimal; None for the clients' own columns.
    """

    name: str
    purpose: str
    why: str
    records: float
    questions: tuple[Question, ...]
    text: str
    unit: Unit = Unit.CLIENT
    model: str | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments of each client's vector at the client level: the cells of every question, and its clipped share."""
        count = len(self.questions)
        share, clipped_share = (1 - CLIPPED_SHARE) / count, CLIPPED_SHARE / count
        segments: list[Segment] = []
        for each in self.questions:
            bound = self.records * each.statistic.row_norm
            segments += [
                Segment(each.name, bound, share, each.statistic.shape, self.purpose),
                Segment(clipped_name(each), 1.0, clipped_share, purpose=self.purpose),
            ]
        return tuple(segments)

    @property
    def purposes(self) -> dict[str, str]:
        """Purpose of each segment by its name, as ledgers list them."""
        return {name: self.purpose for each in self.questions for name in (each.name, clipped_name(each))}

    @property
    def levels(self) -> int:
        """Largest number of rounds of an answer: one, or in a search for words one for each letter of the longest word."""
        statistic = self.questions[0].statistic
        return statistic.longest if isinstance(statistic, Prefixes) else 1

    @property
    def attributed(self) -> bool:
        """Whether it counts attributions of a model's inputs."""
        return any(isinstance(each.statistic, ColumnMeans) for each in self.questions)

    def following(self, prefixes: Sequence[str]) -> Inquiry:
        """Return the inquiry of the next round of a search for words, which counts how these prefixes go on."""
        plain = json.loads(self.text)
        plain["ask"][0]["prefixes"] = list(prefixes)
        return read_inquiry(plain)

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name of a vector at the record level: cells, and numbers of clipped and unclipped rows."""
        shapes = [(each.name, each.statistic.shape) for each in self.questions]
        clipped = [(clipped_name(each), (2,)) for each in self.questions]
        return {name: shape for pair in zip(shapes, clipped, strict=True) for name, shape in pair}

    def spec_of_records(self, unit_norm: float) -> SumSpec:
        """Return the parameters of the sum if records are hidden.

        A client's first `records` records count in full. A longer vector is scaled down, which increases no distance.

        Args:
          unit_norm: largest norm of a record's part.
        """
        max_records = max(self.records, 1.0)
        cells = cells_for(sum(map(math.prod, self.layout.values())), max_records)
        return SumSpec(unit_norm * max_records, cells=cells, unit_norm=unit_norm)

    def scale(self, name: str) -> float:
        """Return the factor from counts to entries of a vector at the record level, as a share of the norm of a record's part."""
        count = len(self.questions)
        for each in self.questions:
            if name == each.name:
                return math.sqrt((1 - CLIPPED_SHARE) / count) / each.statistic.row_norm
        return math.sqrt(CLIPPED_SHARE / count)

    def sigma(self, question: Question, noise_over_clip: float) -> float:
        """Return the standard deviation of the noise on each of a question's cells, in rows.

        Args:
          question: question of this inquiry.
          noise_over_clip: standard deviation of the sum's noise over its clipping norm, of a client or of a record.
        """
        if self.unit is Unit.RECORD:
            return noise_over_clip / self.scale(question.name)
        bound = self.records * question.statistic.row_norm
        return noise_over_clip * bound / math.sqrt((1 - CLIPPED_SHARE) / len(self.questions))

    def clipped_of(self, question: Question, cells: NDArray[np.floating], noise_over_clip: float) -> Figure:
        """Return the share of rows that a question clipped, with its interval, if records are hidden.

        Args:
          question: question of this inquiry.
          cells: noisy numbers of clipped and of unclipped rows.
          noise_over_clip: standard deviation of the sum's noise over the norm of a record's part.
        """
        sigma = noise_over_clip / self.scale(clipped_name(question))
        return share_of(CLIPPED, float(cells[0]), float(cells[1]), sigma)

    def clipped(self, mean: float, noise_over_clip: float, clients: float) -> Figure:
        """Return the mean over clients of the share that one question clipped, with its interval, if clients are hidden.

        Args:
          mean: noised mean over the clients.
          noise_over_clip: standard deviation of the sum's noise over its clipping norm.
          clients: divisor of the sum.
        """
        share = CLIPPED_SHARE / len(self.questions)
        half = NORMAL_95 * noise_over_clip / (2 * math.sqrt(share) * clients)
        return Figure(CLIPPED, mean, max(mean - half, 0.0), min(mean + half, 1.0))

    def contribution(self, table: Table) -> dict[str, float | NDArray[np.floating]]:
        """Return a client's value of every segment."""
        values: dict[str, float | NDArray[np.floating]] = {}
        for each in self.questions:
            cells, outside = each.statistic.count(table)
            norm, bound = float(np.linalg.norm(cells)), self.records * each.statistic.row_norm
            factor = min(1.0, bound / norm) if norm else 1.0  # that the sum's clipping leaves of each row
            values |= {each.name: cells, clipped_name(each): 1 - (1 - outside) * factor}
        return values

    def contribution_of_records(self, table: Table, unit_norm: float) -> dict[str, NDArray[np.float64]]:
        """Return the sum of the parts of a client's records, by the names of `layout`.

        Args:
          table: the client's columns.
          unit_norm: largest norm of a record's part.
        """
        values: dict[str, NDArray[np.float64]] = {}
        for each in self.questions:
            cells, outside = each.statistic.count(table)
            clipped = round(outside * row_count(table))
            counts = np.array([clipped, row_count(table) - clipped], np.float64)
            for name, part in ((each.name, cells), (clipped_name(each), counts)):
                values[name] = part * (unit_norm * self.scale(name))
        return values


@dataclass(frozen=True)
class Answer:
    """Answer to one question: its figures, and the mean share of a client's rows that was clipped, noised too."""

    name: str
    figures: tuple[Figure, ...]
    clipped: Figure


def clipped_name(question: Question) -> str:
    """Return the name of the segment of a question's clipped share."""
    return f"{question.name}: {CLIPPED}"


# --- from YAML or JSON --------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)  # a simulation's clients all read the same one
def from_json(text: str) -> Inquiry:
    """Return the inquiry that travelled.

    Raises:
      Refusal: it is none: too long, no JSON, or a value is missing, unknown or out of range.
    """
    if len(text) > MAX_BYTES:
        raise Refusal("question", f"{len(text)} bytes", f"a question has at most {MAX_BYTES}")
    try:
        return read_inquiry(read_json(text))
    except Undecodable as error:
        raise Refusal("question", text[:40], "is not JSON") from error


def read_inquiry(plain: object) -> Inquiry:
    """Return the inquiry that a mapping from YAML or JSON describes; refuse a wrong value by its key."""
    group = _group("question", _sorted(plain), INQUIRY_KEYS)
    entries = group.get("ask")
    if not isinstance(entries, list) or not 1 <= len(cast(list[Any], entries)) <= MAX_QUESTIONS:
        raise Refusal("ask", entries, f"give 1 to {MAX_QUESTIONS} questions as a list")
    questions = tuple(_question(each) for each in cast(list[Any], entries))
    names = [each.name for each in questions]
    if len(set(names)) < len(names):
        raise Refusal("ask", names, "two questions have one name; give each its own")
    if len(questions) > 1 and any(isinstance(each.statistic, Prefixes) for each in questions):
        raise Refusal("ask", names, "a search for the top words goes by its own answers; ask it alone")
    if group.get("records") is None:
        raise Refusal("records", None, "say how many rows of a client count in full, such as 30")
    records = positive("records", group["records"])
    purpose = _name("purpose", group.get("purpose", STATISTICS))
    if purpose in (TRAINING, EVALUATION):
        raise Refusal("purpose", purpose, "is what owners allow for models; give a question another")
    why = str(group.get("why", ""))
    if len(why) > 500 or not (why.isprintable() or not why):
        raise Refusal("why", why[:40], "give a printable sentence of at most 500 characters")
    unit = word(Unit, "unit", group.get("unit", Unit.CLIENT))
    if unit not in UNITS:
        raise Refusal("unit", str(unit), f"choose one of {', '.join(UNITS)}")
    model = group.get("model")
    if model is None and any(isinstance(each.statistic, ColumnMeans) for each in questions):
        raise Refusal("model", None, "attributions are of a model: name the folder of its run")
    if model is not None and not DIGEST.fullmatch(str(model)):
        raise Refusal("model", model, "give the SHA-256 of a model's file")
    text = json.dumps(group, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    name = _name("name", group.get("name"))
    return Inquiry(name, purpose, why, records, questions, text, unit, model)


def _question(plain: object) -> Question:
    """Return the question that an entry of `ask` describes."""
    kind = cast(Mapping[str, Any], plain).get("kind") if isinstance(plain, Mapping) else None
    if kind not in KINDS:
        raise Refusal("kind", kind, NO_SUMS.get(str(kind), f"choose one of {', '.join(KINDS)}"))
    keys, make = KINDS[kind]
    group = _group(str(kind), plain, (*COMMON, *keys))
    columns = group.get("of")
    words = columns if isinstance(columns, str) else ", ".join(map(str, cast(list[Any], columns or [])))
    name = _name("name", group.get("name", f"{kind} {words}".strip()))
    statistic = make(group)
    require_cells(statistic, name)
    resolution, at_least = (
        None if group.get(key) is None else positive(key, group[key]) for key in ("resolution", "at_least")
    )
    return Question(name, statistic, resolution, at_least)


def _numbers(group: Mapping[str, Any]) -> Numbers:
    """Return the column `of` between the bounds `low` and `high`."""
    missing = [key for key in ("low", "high") if group.get(key) is None]
    if missing:
        remedy = "declare the bounds of what is plausible, low and high, and not the data's own"
        raise Refusal(missing[0], None, remedy)
    return Numbers(_name("of", group.get("of")), group["low"], group["high"])


def _bins(group: Mapping[str, Any], key: str = "of") -> Bins:
    """Return the column under a key in the bins of `edges` or `categories`, whose keys begin with `key_` but for `of`."""
    prefix = "" if key == "of" else f"{key}_"
    edges, words = (
        _listed(f"{prefix}{each}", group.get(f"{prefix}{each}")) for each in ("edges", "categories")
    )
    if any(isinstance(each, list | dict) for each in (*edges, *words)):
        raise Refusal(f"{prefix}edges", edges, "give a list of plain values")
    return Bins(_name(key, group.get(key)), tuple(edges), tuple(map(str, words)))


def _columns(group: Mapping[str, Any]) -> tuple[Numbers, ...]:
    """Return the columns of `of`, a group of bounds by name."""
    columns = group.get("of")
    if not isinstance(columns, dict):
        raise Refusal("of", columns, "give a group: each column with its bounds, as in {age: [0, 120]}")
    read: list[Numbers] = []
    for name, bounds in cast(dict[str, Any], columns).items():
        if not isinstance(bounds, list) or len(cast(list[Any], bounds)) != 2:
            raise Refusal(f"of.{name}", bounds, "give its bounds, [low, high]")
        read.append(Numbers(_name("of", name), *cast(list[Any], bounds)))
    return tuple(read)


FAIRNESS_KEYS = (
    "criterion",
    "of",
    "categories",
    "label",
    "label_categories",
    "said",
    "said_categories",
    "said_edges",
)


def _fairness(group: Mapping[str, Any]) -> Fairness:
    groups, label, prediction = (_bins(group, key) for key in ("of", "label", "said"))
    return Fairness(str(group.get("criterion")), groups, label, prediction)


def _quantiles(group: Mapping[str, Any]) -> Quantiles:
    """Return the quantiles of a column: the quartiles by default."""
    levels = _listed("quantiles", group.get("quantiles", [0.25, 0.5, 0.75]))
    branches = group.get("branches", 16)
    if type(branches) is not int:
        raise Refusal("branches", branches, "give a whole number")
    return Quantiles(_numbers(group), tuple(real("quantiles", each) for each in levels), branches)


def _attributions(group: Mapping[str, Any]) -> ColumnMeans:
    """Return the means of columns of attributions, whose largest values `of` has by the column's name."""
    columns = group.get("of")
    if not isinstance(columns, dict) or not columns:
        remedy = "give a group: each column with the largest attribution, as in {age: 2.0}"
        raise Refusal("of", columns, remedy)
    highs = {str(name): positive(f"of.{name}", high) for name, high in cast(dict[Any, Any], columns).items()}
    return ColumnMeans(
        tuple(Numbers(f"{ATTRIBUTION}{_name('of', each)}", 0.0, high) for each, high in highs.items())
    )


def _top(group: Mapping[str, Any]) -> Prefixes:
    """Return a level of a search for the commonest words: the first one by default."""
    alphabet = group.get("alphabet")
    if not isinstance(alphabet, str | list):
        raise Refusal("alphabet", alphabet, "declare the letters that words may have, as in 'abc'")
    longest, most = group.get("longest"), group.get("most", 10)
    for name, value in (("longest", longest), ("most", most)):
        if type(value) is not int:
            raise Refusal(name, value, "give a whole number")
    assert isinstance(longest, int) and isinstance(most, int)
    prefixes = _listed("prefixes", group.get("prefixes", [""]))
    letters, beta = tuple(map(str, cast(list[Any], alphabet))), real("beta", group.get("beta", 0.05))
    return Prefixes(_name("of", group.get("of")), letters, longest, most, beta, tuple(map(str, prefixes)))


SURVIVAL_KEYS = ("of", "edges", "event", "event_categories", "by", "by_edges", "by_categories", "censoring")


def _survival(group: Mapping[str, Any]) -> Survival:
    """Return the survival by a column of times and one of events, for all rows or by the groups of `by`."""
    groups = (_bins(group, "by"),) if group.get("by") is not None else ()
    censoring = group.get("censoring", "middle")
    if censoring not in CENSORED_SHARES:
        raise Refusal("censoring", censoring, f"choose one of {', '.join(CENSORED_SHARES)}")
    return Survival(_bins(group), _bins(group, "event"), groups, CENSORED_SHARES[censoring])


DISCRIMINATION_KEYS = ("of", "categories", "score", "score_edges", "threshold")


def _discrimination(group: Mapping[str, Any]) -> Discrimination:
    """Return how a score, by default that of the released model in tenths, tells the two words of a label apart."""
    keys = {"score": "score", "score_edges": [number / 10 for number in range(11)], **group}
    return Discrimination(_bins(keys), _bins(keys, "score"), real("threshold", keys.get("threshold", 0.5)))


PAIR_KEYS = ("of", "categories", "low", "high", "columns", "pairs")


def _pairs(group: Mapping[str, Any]) -> PairStrengths:
    """Return how strongly pairs of columns, by default all, act together on a label: two categories, or a number."""
    name = _name("of", group.get("of"))
    words = group.get("categories")
    label = Amount(_numbers(group)) if words is None else Event(_words(name, words))
    definitions = group.get("columns")
    if not isinstance(definitions, dict):
        remedy = (
            "give each column its edges or categories, as in {age: [20, 40, 60, 80], sex: [male, female]}"
        )
        raise Refusal("columns", definitions, f"{remedy}, or name a schema by task.schema")
    columns = tuple(
        _levels(_name("columns", each), levels) for each, levels in cast(dict[Any, Any], definitions).items()
    )
    by_name = {each.name: number for number, each in enumerate(columns)}
    names = _listed("pairs", group.get("pairs")) or [list(each) for each in combinations(by_name, 2)]
    pairs: list[tuple[int, int]] = []
    for each in names:
        numbers = sorted(by_name.get(str(name), -1) for name in _listed("pairs", each))
        if len(set(numbers)) != 2 or numbers[0] < 0 or (numbers[0], numbers[1]) in pairs:
            raise Refusal("pairs", each, "give pairs of two of the columns, each once, as in [[age, sex]]")
        pairs.append((numbers[0], numbers[1]))
    if not pairs:
        raise Refusal("columns", list(by_name), "give at least two")
    if single := [each for each in columns if each.count < 2]:
        remedy = "is one level, and acts with nothing; give three edges or more, or words that are numbers as [[0], [1]]"
        raise Refusal(f"columns.{single[0].name}", list(single[0].bins.labels), remedy)
    return PairStrengths(label, columns, tuple(pairs))


def _levels(name: str, plain: object) -> Levels:
    """Return a column in levels: between edges if they are numbers, else words."""
    values = _listed(name, plain)
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in values):
        return Levels(Bins(name, edges=tuple(values)))
    return _words(name, values)


def _words(name: str, plain: object) -> Levels:
    """Return a column in levels of words, of which a list is one level; numbers are words too."""
    values = _listed(name, plain)
    groups = [cast(list[Any], each) if isinstance(each, list) else [each] for each in values]
    words = tuple(str(word) for each in groups for word in each)
    return Levels(Bins(name, words=words), tuple(number for number, each in enumerate(groups) for _ in each))


# Kinds that no sum of the clients' rows answers, each with what to ask instead.
NO_SUMS = {
    "cox": "Cox's likelihood compares each event with the rows at risk of all clients, which is no sum over clients: ask "
    "kind=survival for curves by group and their log-rank test",
}
# For each kind of question: its keys besides `COMMON`, and the function that reads its statistic from the question's group.
Make = Callable[[Mapping[str, Any]], Statistic]
KINDS: dict[str, tuple[tuple[str, ...], Make]] = {
    "count": ((), lambda group: Count()),
    "mean": (("of", "low", "high"), lambda group: ColumnMean(_numbers(group))),
    "variance": (("of", "low", "high"), lambda group: Variance(_numbers(group))),
    "histogram": (("of", "edges", "categories"), lambda group: Histogram((_bins(group),))),
    "quantiles": (("of", "low", "high", "quantiles", "branches"), _quantiles),
    "crosstable": (
        ("of", "edges", "categories", "by", "by_edges", "by_categories"),
        lambda group: Histogram((_bins(group), _bins(group, "by"))),
    ),
    "correlation": (("of",), lambda group: ColumnCorrelation(_columns(group))),
    "attributions": (("of",), _attributions),
    "top": (("of", "alphabet", "longest", "most", "beta", "prefixes"), _top),
    "fairness": (FAIRNESS_KEYS, _fairness),
    "survival": (SURVIVAL_KEYS, _survival),
    "discrimination": (DISCRIMINATION_KEYS, _discrimination),
    "pairs": (PAIR_KEYS, _pairs),
}


def _sorted(plain: object) -> object:
    """Return a value with the keys of its groups in alphabetical order, so that both sides read columns in one order."""
    if isinstance(plain, Mapping):
        by_name = {str(key): value for key, value in cast(Mapping[Any, Any], plain).items()}
        return {key: _sorted(by_name[key]) for key in sorted(by_name)}
    if isinstance(plain, list):
        return [_sorted(each) for each in cast(list[Any], plain)]
    return plain


def _group(where: str, plain: object, keys: Sequence[str]) -> dict[str, Any]:
    """Return a mapping with text keys; refuse another value, or a key that is not among `keys`. `where` is for a refusal."""
    if not isinstance(plain, Mapping):
        raise Refusal(where, plain, f"is no group of {', '.join(keys)}")
    group = {str(key): value for key, value in cast(Mapping[Any, Any], plain).items()}
    for key in group:
        if key not in keys:
            raise Refusal(where, key, f"there is no such key; it has {', '.join(keys)}")
    return group


def _listed(where: str, plain: object) -> list[Any]:
    """Return a list, empty for None; refuse another value. `where` is for a refusal."""
    if plain is None:
        return []
    if not isinstance(plain, list):
        raise Refusal(where, plain, "give a list")
    return cast(list[Any], plain)


def _name(where: str, plain: object) -> str:
    """Return a name; refuse another value. `where` is for a refusal."""
    if not isinstance(plain, str) or not plain.isprintable() or not 0 < len(plain) <= MAX_NAME:
        raise Refusal(where, plain, f"give a name of 1 to {MAX_NAME} printable characters")
    return plain
