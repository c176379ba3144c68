"""Verb `fedveil ask`: a question to clients, of a file or of arguments, refused or charged, shown as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..configs.question_file import COSTS, InquiryOptions, QuestionOptions, options_in, read_question_file
from .grammar import Json, allow_local_modules, app, argument, option, options_of, read, verb

EXHAUSTED, UNANSWERED = 3, 1  # exit codes
WIDTH = 80
DEFAULT_FOLDER = Path("questions")
DEFAULT_COHORT = "cohort=all"
# Kinds of questions, for help and completion.
COMMON = ("count", "mean", "variance", "histogram", "quantiles", "pairs")
WITHOUT_COLUMN = ("count", "pairs")  # pairs are about the label of a schema


@verb(app, "ask", "Ask the clients under a privacy budget.", panel="Run")
@options_of(inquiry=InquiryOptions, question=QuestionOptions)
def ask(
    what: Annotated[str, argument("FILE|KIND", "YAML file of questions; or, with a column, ", words=COMMON)],
    inquiry: InquiryOptions,
    question: QuestionOptions,
    words: Annotated[
        list[str] | None, argument("KEY=VALUE", "Column to ask about; keys of the run, such as task=csv.")
    ] = None,
    into: Annotated[Path | None, option("FOLDER", "Folder for the answers; questions by default.")] = None,
    server: Annotated[
        Path | None, option("FOLDER", "Bundle of a server, to ask its clients.", file_okay=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Ask the clients about their data. Each figure has an interval, and each answer is one charge.

    Example:
      fedveil ask count --name rows --records 20 --epsilon 0.5 task=digits
      fedveil ask intake.yaml task=csv task.folder=clinics task.data_id=wards
      fedveil ask intake.yaml --server made/server task=csv

    Exit codes: 0 answered, 1 too few answers, 2 refused and not charged, 3 budget spent.
    """
    require_extra("simulation" if server is None else "server", "fedveil ask")
    from ..configs.settings import settings_from_overrides
    from ..privacy.ledger.ledger import BudgetExhausted
    from ..privacy.statistics.inquiry import KINDS, read_inquiry
    from ..questions.ask import PRIVACY_OF_QUESTIONS, with_unit
    from ..questions.pair_columns import schema_path, with_columns
    from ..questions.question_plan import Spend
    from ..questions.simulated import ask_here
    from ..run.build import build
    from ..run.released import model_run_of
    from ..run.table_model import with_model_of_run

    allow_local_modules()
    columns = [each for each in words or () if "=" not in each]
    overrides = [each for each in words or () if "=" in each]
    values = dict(each.split("=", 1) for each in overrides)
    options = options_in(question)
    keys = _of_kind(what, columns, options) if what in KINDS else _of_file(Path(what), columns, options)
    keys = with_unit(inquiry.over(keys), values.get("task"), values.get("privacy"))
    tables = {key: values.get(f"task.{key}") for key in ("schema", "folder")}
    keys = with_columns(keys, schema_path({**tables, "folder": server or tables["folder"]}))
    cost = {key: keys.pop(key, None) for key in COSTS}
    model_run = model_run_of(keys)
    request = read_inquiry(keys)
    defaults = (DEFAULT_COHORT, f"privacy={PRIVACY_OF_QUESTIONS[request.unit]}")
    overrides = [*(each for each in defaults if each.partition("=")[0] not in values), *overrides]
    if server is not None and into is not None:
        raise Refusal("--into", str(into), "a server keeps its answers in its own folder; leave it out")
    spend = Spend(**cost)
    try:
        if server is not None:
            from ..deployment.questions import ask_clients

            record = ask_clients(server, request, spend, overrides, model_run)
        else:
            federation = build(with_model_of_run(settings_from_overrides(overrides), model_run))
            record = ask_here(federation, request, spend, into or DEFAULT_FOLDER, model_run)
    except BudgetExhausted as spent:
        print(spent, file=sys.stderr)
        return EXHAUSTED
    print(json.dumps(record) if as_json else format_answer(record))
    return 0 if record["released"] else UNANSWERED


def _of_file(path: Path, columns: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a file of questions; refuse columns and options of a single question."""
    from ..privacy.statistics.inquiry import KINDS

    if columns:
        remedy = "a file of questions names its columns itself; write keys as key=value"
        raise Refusal("FILE", columns[0], remedy)
    if not path.is_file():
        remedy = f"is neither a file nor a kind of question; name one of {', '.join(KINDS)}"
        raise Refusal("FILE", str(path), remedy)
    keys = read_question_file(path)
    for name, value in options.items():
        raise Refusal(f"--{name}", value, "belongs to one question; write it into the file")
    return keys


def _of_kind(kind: str, columns: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a file with one question of this kind. `columns` must have one column, or none if it needs none."""
    fields = dict(options)
    if "categories" in options:
        fields["categories"] = str(options["categories"]).split(",")
    if "edges" in options:
        remedy = "give numbers separated by commas"
        fields["edges"] = [read(float, "edges", each, remedy) for each in str(options["edges"]).split(",")]
    if not (kind not in WITHOUT_COLUMN) <= len(columns) <= (kind != "count"):
        text = "name one column; write questions about several into a file"
        raise Refusal("COLUMN", " ".join(columns), text)
    column = {"of": columns[0]} if columns else {}
    return {"ask": [{"kind": kind, **column, **fields}]}


def format_answer(record: Mapping[str, Any]) -> str:
    """Return the record of an answer in lines of at most 80 characters: each figure with its interval, and the cost."""
    from ..privacy.budget import UNLIMITED_EPSILON

    cost = f"epsilon {record['epsilon']:.3g} at delta {record['delta']:g}"
    if record["from_record"]:
        cost = "from the stored answer, at no cost"
    lines = [f"{record['name']}, for {record['purpose']}: {cost}"]
    if not record["released"]:
        owner = "what clients reserved" if record["epsilon_after"] is None else "the reservation"
        return "\n".join([*lines, f"no answer: {record['reason']}; {owner} stays spent"])
    figures_of_answers = [[*answer["figures"], answer["clipped"]] for answer in record["answers"]]
    width = min(max(len(each["name"]) for figures in figures_of_answers for each in figures), 30)
    for answer, figures in zip(record["answers"], figures_of_answers, strict=True):
        lines += ["", _cut(answer["name"], WIDTH)]
        lines += [line for each in figures for line in _lines(each, width)]
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
    """Yield a line with the bytes that went over the link, if the record has them."""
    from ..evidence.page_text import text_of

    parts: list[str] = []
    if one := record.get("message_bytes"):
        parts.append(f"{text_of(one['down'], 'bytes')} to a client, {text_of(one['up'], 'bytes')} back")
    if totals := record.get("bytes"):
        down, up = (text_of(sum(totals[way].values()), "bytes") for way in ("down", "up"))
        parts.append(f"{down} down, {up} up in total")
    if parts:
        yield f"bytes: {'; '.join(parts)}"


def _lines(figure: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield a figure's name in a column of this width, its value and the ends of its interval, then its own words."""
    from ..evidence.page_text import UNSAID

    name = f"  {_cut(figure['name'], width):{width}}"
    words = figure.get("said", "")
    if figure["value"] is None:
        yield f"{name}  {f'{UNSAID}: the noise is as large as the value' if words in ('', UNSAID) else words}"
        return
    value, low, high = (_digits(figure[key]) for key in ("value", "low", "high"))
    yield f"{name}  {value:>12}   {low:>12} to {high}"
    if words:
        yield f"    {words}"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
