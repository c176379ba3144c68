"""Clients of encrypted sums that train in stacks: each answers what it would alone, and no other message."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from shared.runs import json_lines, run_quietly

from fedveil.client import app
from fedveil.client.private_update import METRICS, SUM_PART
from fedveil.messages.wire import add_reply, memory_arrays, only_arrays, views
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.simulations import encrypted_stacks
from fedveil.simulations.encrypted_stacks import EncryptedStacks, StackedReply
from fedveil.simulations.in_process import FIRST_NODE, InProcessGrid

MADE = runpy.run_path(str(Path(__file__).parents[1] / "client" / "training" / "test_cohort_training.py"))
SIZES = (4, 7, 0, 12, 5, 3)
SPEC = MADE["PRIVATE"]
ENCRYPTED = ("task=digits", "task.num_clients=12", "cohort=all", "num_rounds=2", "seed=1")
MASKED = (*ENCRYPTED, "privacy=client_distributed", "privacy.allow_large_delta=true")


def grids(task: Any) -> tuple[InProcessGrid, EncryptedStacks]:
    """Return a grid whose clients train alone, and one whose clients train in stacks."""
    bench, ahead = MADE["bench_of"](task), MADE["bench_of"](task)
    alone, engine = (
        InProcessGrid(
            app.make_client_app(lambda _: "", (reply.take,), each, training=reply.train_round), len(SIZES), {}
        )
        for each, reply in ((bench, StackedReply()), (ahead, StackedReply()))
    )
    return alone, EncryptedStacks(engine, MADE["bench_of"](task))


def orders(content: RecordDict) -> list[Message]:
    return [Message(RecordDict(dict(content)), FIRST_NODE + n, "train") for n in range(len(SIZES))]


def vectors(grid: Any, messages: list[Message]) -> list[Any]:
    """Return the clients' vectors; of a client without one, why it is dropped."""
    vectors: list[Any] = []
    for reply in grid.send_and_receive(messages):
        alone = CohortSum(np.zeros(MADE["size_for"](SPEC)))
        add_reply(alone, reply, SPEC)
        vectors.append(alone.total if alone.replies else alone.dropped)
    return vectors


def test_stacked_clients_answer_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = MADE["Made"](sizes=SIZES, broken=(4,))
    alone, stacks = grids(task)
    content = MADE["instruction"](SPEC)
    expected = vectors(alone, orders(content))
    monkeypatch.setattr(encrypted_stacks, "MAX_STACK", 4)
    monkeypatch.setattr(app, "train", None)  # which alone would be called
    actual = vectors(stacks, orders(content))
    assert expected.pop(4) == actual.pop(4) == {"failed": 1}  # its data cannot be read
    np.testing.assert_allclose(actual, expected, atol=2)  # in steps of the lattice


def test_stack_that_fails_trains_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    alone, stacks = grids(MADE["Made"](sizes=SIZES))
    monkeypatch.setattr("fedveil.client.training.cohort_training._train_group", fails)
    content = MADE["instruction"](SPEC)
    np.testing.assert_array_equal(vectors(stacks, orders(content)), vectors(alone, orders(content)))


def test_reply_ahead_serves_one_instruction() -> None:
    alone, _ = grids(MADE["Made"](sizes=SIZES))
    content = MADE["instruction"](SPEC)
    zeros = {name: np.zeros_like(value) for name, value in views(only_arrays(content)).items()}
    reply = {SUM_PART: memory_arrays(zeros), METRICS: MetricRecord({})}
    first, second = orders(content)[0], orders(content)[0]
    (given,) = vectors(alone, [Message(RecordDict({**content, **reply}), FIRST_NODE, "train")])
    (trained,), (again,) = vectors(alone, [first]), vectors(alone, [second])
    update = slice(-len(SPEC.segments))
    assert not given[update].any() and trained[update].any()
    np.testing.assert_array_equal(trained, again)


def test_app_reads_no_reply_from_an_instruction() -> None:
    bench = MADE["bench_of"](MADE["Made"](sizes=SIZES))
    device = InProcessGrid(app.make_client_app(lambda _: "", (), bench), len(SIZES), {})
    content = MADE["instruction"](SPEC)
    reply = {SUM_PART: memory_arrays(views(only_arrays(content))), METRICS: MetricRecord({})}
    (message,) = orders(content)[:1]
    message.content.update(reply)
    with pytest.raises(ValueError, match="one ArrayRecord"):
        device.client_app(message, device._context(FIRST_NODE))


def test_sums_of_replies_are_those_of_the_grid() -> None:
    alone, stacks = grids(MADE["Made"](sizes=SIZES))
    content, nodes = MADE["instruction"](SPEC), [FIRST_NODE, FIRST_NODE + 1]
    sums: list[CohortSum] = [
        grid.sum_replies(Message(content, 0, "train"), nodes, SPEC, MADE["size_for"](SPEC))
        for grid in (alone, stacks)
    ]
    np.testing.assert_array_equal(sums[0].total, sums[1].total)


@pytest.mark.parametrize(
    ("job", "stacked"),
    [
        (MASKED, True),
        ((*ENCRYPTED, "privacy=none", "secagg=masked"), True),
        ((*MASKED, "faults.failure=0.1"), False),
    ],
    ids=["with noise", "without", "with faults"],
)
def test_encrypted_runs_train_small_models_in_stacks(
    job: tuple[str, ...], stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = app.train, list[int]()

    def spy(*arguments: Any) -> Any:
        calls.append(1)
        return train(*arguments)

    monkeypatch.setattr(app, "train", spy)
    run_quietly([*job, "engine.workers=1"], tmp_path)
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert len(rows) == 2 and bool(calls) is not stacked
