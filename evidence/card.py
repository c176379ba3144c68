"""Model card of a run for Hugging Face: front matter in YAML, and the guarantee in Markdown."""

import re
from pathlib import Path
from typing import Any

from ..run.files import ASSESSMENT, CARD
from ..run.run_files import Fields
from .model import INTENDED
from .page_text import text_of

TAGS = ("federated-learning", "differential-privacy", "fedveil")
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&$])")  # characters that may be markup
BREAKS = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]+")  # control characters and ends of lines


def card_of(report: Fields) -> str:
    """Return the text of `CARD.md`; the same report gives the same bytes."""
    import yaml

    front = yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=False)
    return f"---\n{front}---\n\n" + "\n".join(_body(report)) + "\n"


def _front_matter(report: Fields) -> dict[str, Any]:
    """Return the metadata of a model card that Hugging Face reads: carbon and metrics only where they are known."""
    run, metrics = report["run"], report["metrics"]
    fields: dict[str, Any] = {"library_name": "fedveil", "tags": [*TAGS, str(run["mode"])]}
    carbon = next(each for each in report["cost"]["work"] if each["unit"] == "g")
    if carbon["value"] is not None:
        fields["co2_eq_emissions"] = {"emissions": carbon["value"], "source": carbon["source"]}
    if not metrics:
        return fields
    task = str(report["model"]["title"])
    result = {
        "task": {"type": "other", "name": task},
        "dataset": {"type": str(run["task"]), "name": f"held-out data of {report['model']['data']}"},
        "metrics": [{"type": each["name"], "name": each["name"], "value": each["value"]} for each in metrics],
    }
    return {
        **fields,
        "metrics": [each["name"] for each in metrics],
        "model-index": [{"name": f"{task} by fedveil", "results": [result]}],
    }


def _body(report: Fields) -> list[str]:
    """Return the lines of Markdown below the front matter."""
    run, stamps = report["run"], report["stamps"]
    lines = [
        f"# {plain(report['model']['title'])}",
        "",
        f"Trained by federated learning, {run['rounds_completed']} rounds, status {plain(run['status'])}.",
        "`report.html` beside this card has the whole story, and `report.json` its numbers.",
        "",
        *_model(report),
        "",
        "## What is promised to whom",
        "",
        *_guarantee(report),
        "",
        "## Measured",
        "",
        _measured(stamps),
        "",
        "## What is not covered",
        "",
        *(
            f"- **{plain(each['limit'])}**: {plain(each['said'])}"
            for each in report["not_covered"]
            if each["state"] != "covered"
        ),
    ]
    if report["metrics"]:
        metrics = (
            f"{plain(text_of(each['name'], 'word'))} {text_of(each['value'], 'metric')}"
            for each in report["metrics"]
        )
        lines += ["", "## Held-out metrics", "", f"{', '.join(metrics)}."]
    if rows := report["model"]["confusion"]:
        names = " | ".join(plain(row["class"]) for row in rows)
        lines += ["", "Held-out examples of each class, by the class that the model gives them:", ""]
        lines += [f"| class | {names} |", "|---" * (len(rows) + 1) + "|"]
        lines += [f"| {plain(row['class'])} | {' | '.join(map(str, row['counts']))} |" for row in rows]
    return lines + _attributions(report)


def _attributions(report: Fields) -> list[str]:
    """Return the lines on what the columns change a prediction; none where nothing is attributed."""
    rows = report.get("held_out", {}).get("attributions", [])
    if not rows:
        return []
    first = "What each column changes the score of a prediction, on average over public held-out rows:"
    return [
        "",
        first,
        "",
        *(f"- {plain(each['column'])}: {text_of(each['mean'], 'figure')}" for each in rows),
    ]


def _model(report: Fields) -> list[str]:
    """Return the lines on the model: architecture, inputs, classes and intended use."""
    model, parameters = report["model"], report["run"]["parameters"]
    arrays = ", ".join(f"{each['name']} {each['shape']}" for each in model["layers"])
    kind = model["architecture"] or (f"arrays {arrays}" if arrays else None)
    lines = ["## The model", "", f"- Data: {plain(model['data'])}"]
    if model["about"]:
        lines.append(f"- About the data: {plain(model['about'])}")
    lines += [f"- Architecture: {plain(kind)}", f"- Parameters: {plain(parameters)}"]
    if model["predicts"]:
        lines.append(f"- Predicts: {plain(model['label'] or model['predicts'])}")
    if model["classes"]:
        lines.append(f"- Classes: {plain(', '.join(model['classes']))}")
    lines += [f"- Input {plain(each['column'])}: {plain(each['values'])}" for each in model["inputs"]]
    unsaid = f"not stated; answer {INTENDED} of {ASSESSMENT}"
    return [*lines, f"- Intended use: {plain(model['intended'] or unsaid)}"]


def contradicts(folder: Path, report: Fields) -> bool:
    """Return whether the card in a folder, if there is one, states another guarantee than its report."""
    card = folder / CARD
    return card.exists() and "\n".join(_guarantee(report)) not in card.read_text(encoding="utf-8")


def _guarantee(report: Fields) -> list[str]:
    """Return the lines on the guarantees: their sentences, and a table."""
    lost = report.get("record_by_sums")  # not in a report of an earlier release
    rows = map(_row, [*report["privacy"], *([lost] if lost else [])])
    words = " ".join(map(plain, report["promise"]))
    return [words, "", "| against | hidden | epsilon | delta | relies on |", "|---|---|---|---|---|", *rows]


def _row(row: Fields) -> str:
    """Return the line of one guarantee in the table."""
    cells = (row["whom"], "nothing", "infinite", "none", "nothing is promised")
    if row["epsilon"] != "infinity":
        epsilon, delta = text_of(row["epsilon"], "epsilon"), text_of(row["delta"])
        cells = (row["whom"], row["hides"], epsilon, delta, row["relies_on"])
    return "| " + " | ".join(map(plain, cells)) + " |"


def _measured(stamps: Fields) -> str:
    """Return the sentences on the measured leakage, or why none was measured."""
    if stamps["measured"] is None:
        return f"Not measured: {plain(stamps['said'])}."
    size, low, high = (text_of(stamps["measured"][name], "decimal") for name in ("epsilon", "low", "high"))
    ceiling = text_of(stamps["ceiling"], "decimal")
    return (
        f"Canaries measured epsilon {size}, between {low} and {high} with 95 % confidence. They could have shown "
        f"{ceiling} at most. Verdict: {plain(stamps['verdict'])}."
    )


def plain(text: object) -> str:
    """Return a text escaped for Markdown, in one line."""
    return MARKDOWN.sub(r"\\\1", BREAKS.sub(" ", text_of(text)))
