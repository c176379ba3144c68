"""Question to clients on the command line: read from a file or from arguments, refused or charged, told as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal
from ..configs.question_file import COSTS, InquiryOptions, QuestionOptions, read_question_file, said_in
from ..evidence.shown import shown
from ..privacy.budget import UNLIMITED_EPSILON
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.statistics.inquiry import KINDS, Inquiry, read_inquiry

EXHAUSTED, UNANSWERED = 3, 1
WIDTH = 80
DEFAULT_FOLDER = Path("questions")
# Of a run that says nothing else: everybody is asked.
DEFAULT_COHORT = "cohort=all"


def ask(
    what: str,
    given: Sequence[str],
    said: tuple[InquiryOptions, QuestionOptions],
    places: tuple[Path | None, Path | None],
    *,
    as_json: bool = False,
) -> int:
    """Ask, and print the answer; return the exit code.

    Args:
      what: a file of questions, or a kind of question.
      given: columns, and Hydra's overrides.
      said: options that stand beside or in the place of the file's keys, and those of one question.
      places: folder of the records, and folder of a server's bundle; None where one was not given.
      as_json: print the record as JSON.

    Raises:
      Refusal: nothing was charged.
    """
    overrides = [each for each in given if "=" in each]
    columns = [each for each in given if "=" not in each]
    asked = said_in(said[1])
    plain = _of_kind(what, columns, asked) if what in KINDS else _of_file(Path(what), columns, asked)
    plain = said[0].over(plain)
    from ..questions.ask import PRIVACY_OF_QUESTIONS, with_unit
    from ..run.released import named_model

    groups = dict(each.split("=", 1) for each in overrides)
    plain = with_unit(plain, groups.get("task"), groups.get("privacy"))
    cost = {key: plain.pop(key, None) for key in COSTS}
    run = named_model(plain)
    inquiry = read_inquiry(plain)
    defaults = (DEFAULT_COHORT, f"privacy={PRIVACY_OF_QUESTIONS[inquiry.unit]}")
    overrides = [*(each for each in defaults if each.partition("=")[0] not in groups), *overrides]
    try:
        record = _asked((inquiry, run), cost, overrides, *places)
    except BudgetExhausted as spent:
        print(spent, file=sys.stderr)
        return EXHAUSTED
    print(json.dumps(record) if as_json else table_of(record))
    return 0 if record["released"] else UNANSWERED


def _asked(
    asked: tuple[Inquiry, Path | None],
    cost: dict[str, Any],
    overrides: list[str],
    into: Path | None,
    server: Path | None,
) -> dict[str, Any]:
    from ..questions.question_plan import Spend

    inquiry, run = asked
    spend = Spend(**cost)
    if server is not None:
        if into is not None:
            raise Refusal("--into", str(into), "a server keeps its answers in its own folder; leave it out")
        from ..deployment.ask import ask_clients

        return ask_clients(server, inquiry, spend, overrides, run)
    from ..configs.settings import settings_from_overrides
    from ..questions.simulated import ask_here
    from ..run.build import build

    return ask_here(build(settings_from_overrides(overrides)), inquiry, spend, into or DEFAULT_FOLDER, run)


def _of_file(path: Path, columns: Sequence[str], keys: Mapping[str, Any]) -> dict[str, Any]:
    if columns:
        remedy = "a file of questions names its columns itself; write keys as key=value"
        raise Refusal("FILE", columns[0], remedy)
    if not path.is_file():
        raise Refusal(
            "FILE", str(path), f"is neither a file nor a kind of question; name one of {', '.join(KINDS)}"
        )
    found = read_question_file(path)
    for key, value in keys.items():
        raise Refusal(f"--{key}", value, "belongs to one question; write it into the file")
    return found


def _of_kind(kind: str, columns: Sequence[str], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return one question of the arguments as a file would hold it."""
    told = dict(keys)
    for key in ("edges", "categories"):
        if key in told:
            words = str(told[key]).split(",")
            told[key] = words if key == "categories" else [_number(key, each) for each in words]
    if len(columns) != (kind != "count"):
        raise Refusal(
            "COLUMN", " ".join(columns), "name one column; write questions about several into a file"
        )
    of = {"of": columns[0]} if columns else {}
    return {"ask": [{"kind": kind, **of, **told}]}


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refusal(key, text, "give numbers separated by commas") from None


def table_of(record: Mapping[str, Any]) -> str:
    """Return an answer in lines of at most 80 characters: each figure with its interval, and what it cost."""
    cost = f"epsilon {record['epsilon']:.3g} at delta {record['delta']:g}"
    if record["from_record"]:
        cost = "from the stored answer, at no cost"
    lines = [f"{record['name']}, for {record['purpose']}: {cost}"]
    if not record["released"]:
        whose = "what clients reserved" if record["epsilon_after"] is None else "the reservation"
        return "\n".join([*lines, f"no answer: {record['reason']}; {whose} stays spent"])
    told = [[*answer["figures"], answer["clipped"]] for answer in record["answers"]]
    wide = min(max(len(each["name"]) for figures in told for each in figures), 30)
    for answer, figures in zip(record["answers"], told, strict=True):
        lines += ["", _cut(answer["name"], WIDTH), *(_line(each, wide) for each in figures)]
    against = ", ".join(record["adversaries"])
    lines += ["", *_bytes(record)]
    lines.append(f"95 % intervals; hides a {record['unit']} ({record['adjacency']}) from: {against}")
    after, target = record["epsilon_after"], record["target_epsilon"]
    if after is None:
        return "\n".join([*lines, "charged on each client's own ledger of records"])
    of = f" of {target:.3g}" if target < UNLIMITED_EPSILON else ""
    lines.append(f"spent on this ledger so far: epsilon {after:.3g}{of}")
    return "\n".join(lines)


def _bytes(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line of what went over the link; nothing of a record that does not say it."""
    one, told = record.get("message_bytes"), record.get("bytes")
    parts = [f"{shown(one['down'], 'bytes')} to a client, {shown(one['up'], 'bytes')} back"] if one else []
    if told:
        down, up = (shown(sum(told[way].values()), "bytes") for way in ("down", "up"))
        parts.append(f"{down} down, {up} up in total")
    if parts:
        yield f"bytes: {'; '.join(parts)}"


def _line(figure: Mapping[str, Any], wide: int) -> str:
    name = f"  {_cut(figure['name'], wide):{wide}}"
    if figure["value"] is None:
        return f"{name}  cannot be said: the noise is as large as the value"
    value, low, high = (_digits(figure[key]) for key in ("value", "low", "high"))
    return f"{name}  {value:>12}   {low:>12} to {high}"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"


def _cut(text: str, wide: int) -> str:
    return text if len(text) <= wide else f"{text[: wide - 3]}..."
