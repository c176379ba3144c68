"""Models sent as differences: every device starts from the server's bits, whoever took part when."""

import json
import runpy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedveil.client.private_update import NotTrained, private_update
from fedveil.deployment.device.last_model import LastModel
from fedveil.deployment.serve import serve
from fedveil.links.device_answers import Journal, handle_once
from fedveil.messages.difference_grid import MAX_MODELS, ClientModels, DifferenceGrid
from fedveil.messages.flower_adapter import claim_identity, name_sender, records_of
from fedveil.messages.grids import AskingGrid
from fedveil.messages.message_codec import pack, pack_body, question_id, unpack
from fedveil.messages.model_difference import hash_of
from fedveil.messages.secure_wire import model_hash
from fedveil.messages.traffic import Tally, carried_bytes
from fedveil.messages.wire import (
    ARRAYS_KEY,
    DIFFERENCE_KEY,
    FAILED,
    MODEL_KEY,
    MODEL_KEYS,
    NO_BASE,
    SPEC_RECORD,
    WEIGHT,
    instruct,
    memory_arrays,
    only_arrays,
    read_round,
    read_statement,
    split_report,
    view,
    with_report,
)
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.simulations.engines import counting_grid
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All
from fedveil.strategies.registry import make_strategy
from fedveil.strategies.shared_model import shared, steps_after

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")
Arrays = dict[str, NDArray[Any]]
MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
CLIENTS, Clients, LAYOUT, masking, update_of = (
    MADE[name] for name in ("CLIENTS", "Clients", "LAYOUT", "masking", "update_of")
)
SPEC = SumSpec(1.0)


SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))


Devices, make_federation, reaching = (SERVED[name] for name in ("Devices", "make_federation", "reaching"))


COMMON = (
    "task=digits",
    "num_rounds=4",
    "batch_size=40",
    "cohort=all",
    "compress.down=4",
    "audit=off",
    "link.wait=0.3",
    "accept_vacuous=true",
    "privacy.allow_large_delta=true",
    "privacy.target_epsilon=8",
)


CENTRAL, MASKED = ("privacy=client_central",), ("privacy=client_distributed",)


@pytest.fixture(autouse=True)
def identity() -> None:
    claim_identity(1)


def instruction(model: Arrays, node: int = 7, number: int = 1) -> Message:
    record = RecordDict({"arrays": memory_arrays(model), "config": ConfigRecord({"lr": 0.1})})
    return Message(instruct(record, SPEC, "run", number), node, "train")


def model_of(content: RecordDict) -> Arrays:
    return {name: view(array) for name, array in only_arrays(content).items()}


def walk(seed: int, rounds: int, bits: int | None) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield the global model of each round, and what clients start from."""
    draw = np.random.default_rng(seed)
    model: Arrays = {
        "w": draw.normal(size=(37, 3)).astype(np.float32),
        "frozen": draw.normal(size=5),
        "half": draw.normal(size=4).astype(np.float16),
        "batches": np.array(3),
        "heat": np.array(1.5, np.float32),
        "none": np.zeros((0, 2), np.float32),
    }
    steps: dict[str, int] = {}
    for _ in range(rounds):
        yield model, shared(model, steps)
        moved = {
            k: np.asarray(v + v.dtype.type(1) * np.asarray(0.01 * draw.normal(size=v.shape)).astype(v.dtype))
            for k, v in model.items()
        }
        after: Arrays = {**moved, "frozen": model["frozen"], "batches": np.asarray(model["batches"] + 1)}
        steps = {} if bits is None else steps_after(model, after, bits, steps)
        model = after


class Holders(AskingGrid):
    """Devices that hold models in files, and answer with what they started from."""

    def __init__(self, folder: Path, count: int) -> None:
        self._run = claim_identity(1)
        self.held = {node: LastModel(folder / f"{node}.model") for node in range(count)}
        self.sent: list[Message] = []
        self.started: dict[int, RecordDict] = {}
        self.lost: set[int] = set()

    def get_node_ids(self) -> list[int]:
        return list(self.held)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for asked in messages:
            node = asked.metadata.dst_node_id
            message = unpack(bytearray(pack(asked)))
            self.sent.append(message)
            try:
                whole, told = self.held[node].with_whole_model(message)
            except NotTrained as said:
                yield name_sender(Message(Error(said.code, ""), reply_to=message), node)
                continue
            self.started[node] = whole.content
            reply = Message(RecordDict({"v": ConfigRecord({"x": 1})}), reply_to=whole)
            if told is not None:
                reply = self.held[node].keep(whole, told, reply)
            if node not in self.lost:
                yield name_sender(reply, node)


patterns = st.lists(st.sets(st.integers(0, 4)), min_size=2, max_size=8)


@given(pattern=patterns, bits=st.sampled_from([None, 2, 4, 8]), seed=st.integers(0, 100), data=st.data())
@settings(max_examples=25)
def test_every_device_starts_from_the_servers_very_bits(
    pattern: list[set[int]],
    bits: int | None,
    seed: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    devices = Holders(tmp_path_factory.mktemp("devices"), 5)
    grid = DifferenceGrid(devices)
    for number, ((_, sent), cohort) in enumerate(zip(walk(seed, len(pattern), bits), pattern, strict=True)):
        devices.lost = data.draw(st.sets(st.integers(0, 4)), "whose reply is lost")
        forgets = data.draw(st.integers(0, 5), "who has lost its model")
        if forgets in devices.held:
            devices.held[forgets].path.unlink(missing_ok=True)
        devices.started.clear()
        asked = [instruction(sent, node, number) for node in sorted(cohort)]
        plain = {message.metadata.dst_node_id: message.content for message in asked}
        replies = list(grid.send_and_receive(asked))
        assert {reply.metadata.src_node_id for reply in replies} == cohort - devices.lost
        assert not any(reply.has_error() or len(reply.content) != 1 for reply in replies)
        assert devices.started.keys() == cohort
        for node, content in devices.started.items():
            assert hash_of(model_of(content)) == hash_of(sent)
            assert model_hash(content) == model_hash(plain[node])
            assert not any(key in records_of(content, ConfigRecord)[SPEC_RECORD] for key in MODEL_KEYS)


def test_present_device_gets_the_difference_and_an_absent_one_all(tmp_path: Path) -> None:
    devices = Holders(tmp_path, 2)
    grid, models = DifferenceGrid(devices), [sent for _, sent in walk(1, 5, 4)]
    for number, cohort in enumerate([[0], [0], [0, 1], [1], [0]]):
        list(grid.send_and_receive([instruction(models[number], node, number) for node in cohort]))
    told = [read_statement(message.content) for message in devices.sent]
    assert [bool(each and each.difference) for each in told] == [False, True, True, False, True, True]
    assert all(
        DIFFERENCE_KEY in records_of(m.content, ConfigRecord)[SPEC_RECORD]
        or records_of(m.content, ArrayRecord)
        for m in devices.sent
    )


def test_silent_device_gets_all_and_a_declining_one_a_difference(
    tmp_path: Path,
) -> None:
    """A device whose answer was late holds a newer model: told a difference from the older, it would miss this round, too."""
    devices = Holders(tmp_path, 2)
    grid, models = DifferenceGrid(devices), [sent for _, sent in walk(1, 4, 4)]
    for number in range(4):
        devices.lost = {1} if number == 1 else set()
        if number == 2:
            devices.held[0].path.rename(tmp_path / "away")
        replies = grid.send_and_receive([instruction(models[number], node, number) for node in (0, 1)])
        assert not any(reply.has_error() for reply in replies)
    told = [(each.metadata.dst_node_id, read_statement(each.content)) for each in devices.sent]
    assert [bool(each and each.difference) for node, each in told if node == 1] == [False, True, False, True]
    assert [bool(each and each.difference) for node, each in told if node == 0] == [
        False,
        True,
        True,
        False,
        True,
    ]
    (message,) = (models_of := ClientModels()).encode([instruction(models[0])])
    models_of.take(7, (read_statement(message.content) or pytest.fail("no model")).model)
    for _ in range(2):  # it declines
        (message,) = models_of.encode([instruction(models[1])])
        assert (read_statement(message.content) or pytest.fail("no model")).difference
        models_of.take_back(7)


def test_a_device_takes_no_difference_from_another_model_than_its_own(tmp_path: Path) -> None:
    models = [sent for _, sent in walk(1, 4, 4)]
    server, held = ClientModels(), LastModel(tmp_path / "model")

    def sent(number: int) -> Message:
        (message,) = server.encode([instruction(models[number], number=number)])
        return message

    whole, told = held.with_whole_model(sent(1))
    assert told is not None
    reply = held.keep(whole, told, Message(RecordDict(), reply_to=whole))
    server.take(7, split_report(reply.content)[1])
    changed = sent(2)
    said = read_statement(changed.content)
    assert said is not None and said.difference
    assert hash_of(model_of(held.with_whole_model(changed)[0].content)) == hash_of(models[2])
    # The same bytes on another model of the same shapes.
    held.path.write_bytes(pack(Message(RecordDict({"model": memory_arrays(models[3])}), 0, "train")))
    with pytest.raises(NotTrained) as raised:
        held.with_whole_model(changed)
    assert raised.value.code == NO_BASE
    held.path.write_bytes(b"\0" * 40)
    with pytest.raises(NotTrained) as raised:
        held.with_whole_model(changed)
    assert raised.value.code == NO_BASE


def test_a_model_that_is_not_the_one_it_names_is_not_trained_on(tmp_path: Path) -> None:
    (message,) = ClientModels().encode([instruction({"w": np.ones(3, np.float32)})])
    message.content["arrays"] = memory_arrays({"w": np.zeros(3, np.float32)})
    with pytest.raises(NotTrained) as raised:
        LastModel(tmp_path / "model").with_whole_model(message)
    assert raised.value.code == FAILED


@pytest.mark.parametrize("beside", ["arrays", "others"])
def test_further_arrays_of_a_difference_are_not_trained_on(tmp_path: Path, beside: str) -> None:
    """The hash is of what the difference makes: arrays beside it took that model's place, or left the client none."""
    server, held = ClientModels(), LastModel(tmp_path / "model")
    (first,) = server.encode([instruction({"w": np.zeros(300, np.float32)})])
    whole, told = held.with_whole_model(first)
    assert told is not None
    held.keep(whole, told, Message(RecordDict(), reply_to=whole))
    server.take(7, told.model)
    (message,) = server.encode([instruction({"w": np.arange(300, dtype=np.float32) % 3}, number=2)])
    message.content[beside] = memory_arrays({"w": np.ones(300, np.float32)})
    with pytest.raises(NotTrained) as raised:
        held.with_whole_model(message)
    assert raised.value.code == FAILED


@pytest.mark.parametrize("named", ["others", SPEC_RECORD, "config"])
def test_a_model_is_named_by_its_record(tmp_path: Path, named: str) -> None:
    (message,) = ClientModels().encode([instruction({"w": np.ones(3, np.float32)})])
    records_of(message.content, ConfigRecord)[SPEC_RECORD][ARRAYS_KEY] = named
    with pytest.raises(NotTrained) as raised:
        LastModel(tmp_path / "model").with_whole_model(message)
    assert raised.value.code == FAILED


def test_a_server_keeps_the_last_models_alone(tmp_path: Path) -> None:
    server = ClientModels()
    (first,) = server.encode([instruction({"w": np.zeros(3, np.float32)})])
    told = read_statement(first.content)
    assert told is not None
    server.take(7, told.model)
    message = first
    for number in range(MAX_MODELS):
        (message,) = server.encode([instruction({"w": np.full(3, number + 1, np.float32)}, number=number)])
    again = read_statement(message.content)
    assert again is not None and not again.difference
    server.take(7, "0" * 64)  # what it never told


def test_question_has_one_id_for_any_form_of_its_model() -> None:
    models = [sent for _, sent in walk(1, 3, 4)]
    server, restarted = ClientModels(), ClientModels()
    (first,) = server.encode([instruction(models[1])])
    told = read_statement(first.content)
    assert told is not None
    server.take(7, told.model)
    (changed,), (whole,) = (each.encode([instruction(models[2], number=2)]) for each in (server, restarted))
    (again,) = restarted.encode([instruction(models[2], number=2)], again=True)
    (other,) = restarted.encode([instruction(models[1], number=2)])
    ids = [question_id(each, pack_body(each), 7) for each in (changed, whole, again, other)]
    assert ids[0] == ids[1] and len({*ids}) == 3


def test_unusable_difference_is_not_started(tmp_path: Path) -> None:
    begun = Journal(tmp_path / "journal")
    message = instruction({"w": np.ones(3, np.float32)})
    answers = iter([Message(Error(NO_BASE, ""), reply_to=message), Message(RecordDict(), reply_to=message)])
    assert handle_once("a", message, lambda _: next(answers), begun).has_error()
    assert not handle_once("a", message, lambda _: next(answers), begun).has_error()
    begun.close()


def test_older_servers_hear_nothing_and_older_devices_get_the_whole(tmp_path: Path) -> None:
    plain = instruction({"w": np.ones(3, np.float32)})
    message, told = LastModel(tmp_path / "model").with_whole_model(plain)
    assert message is plain and told is None and not (tmp_path / "model").exists()
    server = ClientModels()
    for number in range(3):  # an older device's replies say nothing
        (sent,) = server.encode([instruction({"w": np.full(3, number, np.float32)}, number=number)])
        assert (
            MODEL_KEY in records_of(sent.content, ConfigRecord)[SPEC_RECORD]
            and len(model_of(sent.content)) == 1
        )
    assert split_report(RecordDict({"v": ConfigRecord({})}))[1] == ""
    assert split_report(with_report(RecordDict(), "a"))[1] == "a"


def test_questions_and_evaluations_bring_no_stored_model() -> None:
    message = instruction({"w": np.ones(3, np.float32)})
    records_of(message.content, ConfigRecord)["config"]["fedveil-evaluation"] = "{}"
    assert ClientModels().encode([message]) == [message]


START: Arrays = {name: np.full(shape, 0.3, np.float32) for name, shape in LAYOUT.items()}


def clients(started: list[Arrays]) -> InProcessGrid:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        started.append({name: array.numpy() for name, array in only_arrays(message.content).items()})
        arrays = {k: v.numpy() + update_of(client)[k] for k, v in only_arrays(message.content).items()}
        return Message(
            RecordDict({"a": memory_arrays(arrays), "m": MetricRecord({WEIGHT: 1})}), reply_to=message
        )

    return InProcessGrid(app, CLIENTS, {})


def moved(grid: PrivateGrid, steps: dict[str, int]) -> Arrays:
    strategy = make_strategy("fedavg", {})
    grid.steps = steps
    messages = strategy.configure_train(1, memory_arrays(START), ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is not None
    return {name: view(arrays[name]) for name in LAYOUT}


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_clients_start_from_the_rounded_model_and_move_the_exact_one(masked: bool) -> None:
    """What rounding leaves out stays with the server: no move is too small to add up."""
    mean = {name: np.mean([update_of(c)[name] for c in range(CLIENTS)], axis=0) for name in LAYOUT}
    started: list[Arrays] = []
    inner, links = (Clients(), {"masking": masking()}) if masked else (clients(started), {})
    grid = PrivateGrid(Participants(inner, All(), CLIENTS), randomness=Randomness(4), run="run", **links)
    after = moved(grid, dict.fromkeys(LAYOUT, 3))
    for name in LAYOUT:
        if not masked:
            np.testing.assert_allclose(after[name], START[name] + mean[name], atol=2e-3)
        assert np.abs(after[name] - START[name]).max() < 4  # of a step of 8
        assert (after[name] != 0).any()
    assert all(not value.any() for model in started for value in model.values())
    assert masked or len(started) == CLIENTS


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "messages"])
def test_simulation_counts_the_traffic_of_a_link(sums: bool) -> None:
    models = [sent for _, sent in walk(2, 3, 4)]
    tally, nodes = Tally(), [2, 3]
    grid = counting_grid(clients([]) if sums else Answering(), tally, differences=True)
    server, expected = ClientModels(), 0
    for number, model in enumerate(models):
        asked = [instruction(model, node, number) for node in nodes]
        for message in asked:
            message.content = asked[0].content
        told = server.encode(asked)
        expected += sum(carried_bytes(each) for each in told)
        if sums:
            grid.sum_replies(asked[0], nodes, SPEC, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            list(grid.send_and_receive(asked))
        said = read_statement(told[0].content)
        assert said is not None
        for node in nodes:
            server.take(node, said.model)
    assert sum(tally.total().down.values()) == expected


class Answering(AskingGrid):
    def __init__(self) -> None:
        self._run = claim_identity(1)

    def get_node_ids(self) -> Sequence[int]:
        return [2, 3]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for message in messages:
            yield name_sender(Message(RecordDict(), reply_to=message), message.metadata.dst_node_id)


@pytest.mark.parametrize("mode", [CENTRAL, MASKED], ids=["central", "masked"])
def test_devices_are_sent_differences_or_the_whole_after_a_loss(
    mode: tuple[str, ...], tmp_path: Path
) -> None:
    """Whatever becomes of what devices hold, all of them answer in every round."""
    sent: list[tuple[int, str]] = []
    hearts = make_federation(tmp_path)

    def looking(message: Message, count: int) -> None:
        told = read_statement(message.content)
        if told is None:
            return
        number = read_round(message.content)[1]
        if number == 3 and not any(before == 3 for before, _ in sent):
            for held in (hearts / "clients").glob("*/state/held"):
                held.unlink()
        sent.append((number, "again" if told.again else "difference" if told.difference else "whole"))

    reach = reaching(Devices(hearts / "clients", looking))
    assert serve(hearts / "server", [*COMMON, *mode], reach=reach) == 0
    asked = {number: [how for at, how in sent if at == number] for number in range(1, 5)}
    assert asked[1] == ["whole"] * 5 and asked[2] == asked[4] == ["difference"] * 5
    assert sorted(asked[3]) == ["again"] * 5 + ["difference"] * 5
    told = "metrics.jsonl" if mode is MASKED else "operator.jsonl"
    rows = (hearts / "server" / "runs" / "run-1" / told).read_text().splitlines()
    assert [json.loads(row)["dropped"] for row in rows[:4]] == [{}] * 4
