"""The client's filter: one clipped vector leaves, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import FilterChainType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from shared.nvflare_jobs import START, Client, Engine, context_of, result_of, stepped, task_of, vector_of

from fedveil.adapters.nvflare.exchange import SPEC, VECTOR
from fedveil.privacy.mechanisms.sum_spec import MIN_CELLS


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_one_clipped_vector_leaves_and_nothing_else(kind: str) -> None:
    long = {name: np.full(value.shape, 50.0, np.float32) for name, value in START.items()}
    reply = Client().answer(task_of(START), result_of(long, kind))
    assert from_shareable(reply).meta == {SPEC: [1.0 / MIN_CELLS, MIN_CELLS]}
    assert list(from_shareable(reply).data) == [VECTOR]
    assert reply.keys() == {ReservedHeaderKey.HEADERS, "DXO"}
    assert reply[ReservedHeaderKey.HEADERS].keys() <= {ReservedHeaderKey.CONTENT_TYPE, "__rc__"}
    vector = vector_of(reply)
    assert vector.dtype == np.int32 and vector.shape == (8,)
    assert 0.99 * MIN_CELLS < np.linalg.norm(vector.astype(float)) <= MIN_CELLS


def test_differences_are_the_update_itself() -> None:
    step = {name: np.full(value.shape, 0.125, value.dtype) for name, value in START.items()}
    whole = {name: START[name] + step[name] for name in ("w", "b")}
    replies = [
        Client(2.0).answer(task_of(START), result_of(step, DataKind.WEIGHT_DIFF)),
        Client(2.0).answer(task_of(START), result_of(whole)),
    ]
    assert (vector_of(replies[0]) == 0.125 * MIN_CELLS / 2.0).all()
    assert np.abs(vector_of(replies[0]) - vector_of(replies[1])).max() <= 1


def test_a_script_that_changes_its_input_has_the_same_update() -> None:
    model = {name: value.copy() for name, value in START.items()}
    client, context = Client(), context_of(Engine())
    client.chains[FilterChainType.TASK_DATA_CHAIN][0].process(task_of(model), context)
    model["w"] += np.float32(0.25)
    reply = client.chains[FilterChainType.TASK_RESULT_CHAIN][0].process(result_of(model), context)
    assert (vector_of(reply)[:6] == 0.25 * MIN_CELLS).all()


def test_an_update_that_is_not_finite_is_zeros() -> None:
    bad = stepped(0, START) | {"b": np.array([np.inf, 0], np.float32)}
    assert not vector_of(Client().answer(task_of(START), result_of(bad))).any()


@pytest.mark.parametrize(
    "result",
    [
        DXO(DataKind.METRICS, data={"accuracy": 0.25}).to_shareable(),
        result_of({"w": START["w"]}),
        result_of(START | {"w": START["w"].ravel()}),
        Shareable({"records": [1, 2, 3]}),
    ],
    ids=["metrics", "an array less", "another shape", "no DXO"],
)
def test_a_result_without_an_update_is_an_error_alone(result: Shareable) -> None:
    reply = Client().answer(task_of(START), result)
    assert reply == make_reply(ReturnCode.EXECUTION_RESULT_ERROR)


def test_an_error_leaves_as_its_code_alone() -> None:
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION, {"text": "patient 17"})
    failed["records"] = START["w"]
    reply = Client().answer(task_of(START), failed)
    assert reply == make_reply(ReturnCode.EXECUTION_EXCEPTION)


@pytest.mark.parametrize("name", ["validate", "submit_model"])
def test_results_of_other_tasks_do_not_leave(name: str) -> None:
    reply = Client().answer(task_of(START), result_of(stepped(0, START)), name)
    assert reply == make_reply(ReturnCode.TASK_UNSUPPORTED)


def test_the_filter_of_a_site_and_of_a_job_clip_once() -> None:
    one, both = Client(), Client(site=True)
    result = stepped(1, START)
    first, second = (each.answer(task_of(START), result_of(result)) for each in (one, both))
    assert (vector_of(first) == vector_of(second)).all()
    forged = DXO(DataKind.WEIGHTS, data={VECTOR: np.full(8, 9, np.int32)}, meta={SPEC: [1.0, 2.0]})
    refused = both.answer(task_of(START), forged.to_shareable())
    assert refused == make_reply(ReturnCode.EXECUTION_RESULT_ERROR)
