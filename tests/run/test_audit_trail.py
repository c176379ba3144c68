"""The audit trail of a ledger: who began a run, on which data and model, and what each release has cost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from shared.ledgers import opened, release, reserved, tamper
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.messages.model_difference import hash_of
from fedveil.privacy.budget import Adversary
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.run.audit_trail import TrailRow, audit_trail, by_run, sentence

OLD = Path(__file__).parents[1] / "fixtures" / "before_the_rooms" / "run" / "ledger"
ORIGIN = {"who": "alice", "task": "heart", "data": "wards", "clients": 4.0, "model": "a" * 64}


def trail(path: Path) -> list[TrailRow]:
    return audit_trail(read_entries(path))


def noted_run(path: Path) -> Path:
    """Make a ledger of two rounds that alice began and bob resumed; return it."""
    for who, number in (("alice", 1), ("bob", 2)):
        with opened(path) as ledger:
            ledger.purpose, ledger.origin = "triage", {**ORIGIN, "who": who}
            key = reserved(ledger, release(number))
            ledger.commit(key, durable=False)
            ledger.describe(key, {"model": str(number) * 64})
            ledger.settle()
    return path


def test_a_heading_names_the_person_and_the_data(tmp_path: Path) -> None:
    ((first, _), (heading, rows)) = by_run(trail(noted_run(tmp_path / "ledger")))
    assert first == "" and len(rows) == 2
    assert heading == (
        "run run, purpose triage, started by alice, task heart on wards, 4 clients planned a round, "
        "from model aaaaaaaaaaaa, resumed by bob"
    )


def test_a_round_has_its_epsilon_and_both_models(tmp_path: Path) -> None:
    path = noted_run(tmp_path / "ledger")
    _, first, second = trail(path)
    assert (first.model_before, first.model_after) == ("a" * 64, "1" * 64)
    assert second.model_after == "2" * 64
    epsilon = verify(path).epsilon
    assert epsilon is not None and second.epsilon == pytest.approx(epsilon, rel=0.01)
    shown = float(sentence(second).split("epsilon ")[1].split(" of 1;")[0])
    assert epsilon <= shown <= epsilon + 0.001
    assert sentence(second).startswith("Round 2, training (update), epsilon ")
    assert sentence(second).endswith("released, model 222222222222.")


def test_a_sentence_of_all_adversaries_says_everyone(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        reserved(ledger, release(sees=Adversary))
    assert " against everyone; rng" in sentence(trail(path)[-1])


def test_an_origin_is_written_once_in_a_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for first in (1, 3):
        with opened(path) as ledger:
            ledger.origin = ORIGIN
            for number in (first, first + 1):
                reserved(ledger, release(number))
    origins = [json.loads(entry.payload).get("origin") for entry in read_entries(path)]
    assert origins == [None, ORIGIN, None, None, None]


@pytest.mark.parametrize(
    "origin",
    [{}, {"who": 3}, {"who": "x", "roster": {}}, {"who": "x", "clients": "4"}, {"who": "x", "model": []}, 7],
    ids=["nobody", "number", "roster", "clients", "model", "no object"],
)
def test_an_origin_of_another_form_is_refused(tmp_path: Path, origin: Any) -> None:
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.origin = ORIGIN
        with pytest.raises(Refusal, match="makes no sense"):
            ledger.origin = origin or {"task": "no one"}
            reserved(ledger, release())


def test_a_describe_after_the_commit_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release()))
        head = ledger.head
        ledger.describe(release().key, {"model": "b" * 64})
        ledger.settle()
        assert ledger.head == head


def test_old_ledgers_are_read_without_origins(tmp_path: Path) -> None:
    path = Path(shutil.copy(OLD, tmp_path / "ledger"))
    rows = trail(path)
    assert verify(path).ok and {row.model_after for row in rows} == {None}
    assert all(row.origin == {} for row in rows)
    assert [row.cells()["who"] for row in rows] == [None] * len(rows)


def test_a_changed_origin_breaks_the_chain(tmp_path: Path) -> None:
    path = noted_run(tmp_path / "ledger")
    tamper(path, "UPDATE entries SET payload = replace(payload, 'alice', 'carol')")
    assert not verify(path).ok


def test_a_run_writes_its_origin_and_its_models(tmp_path: Path) -> None:
    run_quietly(["task=digits", "num_rounds=2", "purpose=rates", "audit=off"], tmp_path / "run")
    _, first, second, close = trail(tmp_path / "run" / "ledger")
    origin = first.payload["origin"]
    assert (origin["who"], origin["task"], origin["clients"]) == (acting_user(), "digits", 25)
    assert first.model_before == origin["model"]
    assert second.model_before == first.model_after != first.model_before
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    assert second.model_after in (hash_of(arrays), hash_of(dict(reversed(arrays.items()))))
    assert close.act == "close" and close.cells()["who"] == acting_user()


def test_a_note_of_clients_tells_only_how_many(tmp_path: Path) -> None:
    """The page of a run shows the trail: who came first is on the ledger alone."""
    with opened(tmp_path / "ledger") as ledger:
        ledger.note(("run", 1, "arrivals"), {"cohort": [7001, 7002, 7003]})
    assert sentence(trail(tmp_path / "ledger")[-1]) == "Noted in round 1, arrivals: cohort of 3."
