"""Memorisation on a run's page: exposure by round, with the curve of a run without privacy beside it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from shared.reports import texts_of, validated

from fedveil.base.refusal import Refusal
from fedveil.cli.report import report
from fedveil.evidence.content import report_of
from fedveil.evidence.memorisation import comparable, memorisation_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import active_parts, differences
from fedveil.run.run_files import read_run

LIMIT = 9.97


def with_secrets(folder: Path, bits: list[float | None], perplexity: float = 40.0) -> Path:
    """Write exposures of secrets with 4 and 16 copies into the first rounds of a run; those of 4 are 1 bit."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["perplexity"] = perplexity - row["round"]
    for row, value in zip(rows, bits, strict=False):
        for copies, each in ((4, 1.0), (16, value)):
            row |= {f"audit/exposure_x{copies}/bits": each, f"audit/exposure_x{copies}/limit": LIMIT}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def other(kept: Path, tmp_path: Path) -> Path:
    """Return another run of the task, without privacy, whose exposure grows."""
    folder = Path(shutil.copytree(kept, tmp_path / "plain"))
    result = json.loads((folder / "result.json").read_text())
    result["privacy"] = [{**row, "epsilon": "infinity"} for row in result["privacy"]]
    (folder / "result.json").write_text(json.dumps(result))
    return with_secrets(folder, [2.0, None, 8.5], 30.0)


def test_page_begins_with_both_curves(kept: Path, other: Path) -> None:
    run = read_run(with_secrets(kept, [1.25, 1.5]))
    made = validated(report_of(run, other=comparable(run, other)))
    first, second = made["memorisation"]["curves"]
    assert first["bits"] == [[1, 1.25], [2, 1.5]] and second["bits"] == [[1, 2.0], [3, 8.5]]
    assert first["quality"][0] == [1, 39.0] and second["quality"][0] == [1, 29.0]
    assert (first["epsilon"], second["epsilon"]) == (made["stamps"]["claimed"]["epsilon"], "infinity")
    page = page_of(json.loads(json.dumps(made)))
    assert differences(page, made) == active_parts(page) == []
    shown = texts_of(page)
    assert shown["/memorisation/curves/0/bits/1/1"] == "1.50"
    assert shown["/memorisation/curves/1/bits/1/1"] == "8.50"
    assert (shown["/memorisation/chance"], shown["/memorisation/limit"]) == ("1.44", "9.97")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert "epsilon infinite: exposure 8.50 bits, perplexity " in text and "--compare" not in text
    lines = re.findall(
        r'class="line (\w+)"', page[page.index("chart-memorisation") : page.index("chart-quality")]
    )
    assert lines == ["plan", "ceiling", "accuracy", "epsilon"]
    assert page.index("chart-memorisation") < page.index('class="stamps"')


def test_one_curve_has_the_way_to_the_other(kept: Path) -> None:
    assert "memorisation" not in report_of(read_run(kept))
    page = page_of(validated(report_of(read_run(with_secrets(kept, [None, 3.0])))))
    assert "fedveil report RUN --compare OTHER" in page and "<code>privacy=none</code> into" in page
    assert "/memorisation/curves/0/bits/0/1" in texts_of(page)


def test_unlike_runs_are_not_compared(kept: Path, other: Path, tmp_path: Path) -> None:
    run = read_run(kept)
    assert comparable(run, None) is None and memorisation_of(run) is None
    with pytest.raises(Refusal, match="holds no run; name the folder of one of the same task"):
        comparable(run, tmp_path / "no")
    with pytest.raises(Refusal, match=r"kept has measured no secrets by round; run both with task\.secrets"):
        comparable(run, other)
    run = read_run(with_secrets(kept, [1.0]))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("num_clients: 100", "num_clients: 101"))
    assert config != (other / "config.yaml").read_text()
    with pytest.raises(Refusal, match=r"--compare='.*plain': differs in task\.num_clients; compare runs of"):
        comparable(run, other)


def test_the_verb_writes_the_page_of_both(kept: Path, other: Path, tmp_path: Path) -> None:
    with_secrets(kept, [1.0])
    assert report(kept, out=tmp_path / "out", other=other) == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(written["memorisation"]["curves"]) == 2
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "a.json").write_text("{}")
    with pytest.raises(Refusal, match=r"--compare='.*plain': belongs to the report of a run"):
        report(answers, other=other)
