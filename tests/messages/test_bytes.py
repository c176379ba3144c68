"""Bytes of messages and stored values, kept from before one codec wrote them: read, and written again as they were."""

import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.base.bounded_decoding import build, plain_of, read_json
from fedveil.base.refusal import Refusal
from fedveil.deployment.device import ledger_heads, order_policy, run_end
from fedveil.links.enrolment.messages import Ask, Reply, decode, send
from fedveil.links.log_export import ConsistencyProof, InclusionProof, LogDocument, LogExport, to_text
from fedveil.links.log_wire import LOG_RECORD, log_of, log_record
from fedveil.links.tree_head import read_head
from fedveil.links.witness import heads_of_key
from fedveil.messages import frames, message_codec, notices, secure_wire, wire
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.training_order import TrainingOrder
from fedveil.privacy.ledger import receipt
from fedveil.privacy.statistics.evaluation import evaluation_from_json
from fedveil.privacy.witness import format_cosignatures, read_cosignature, read_stored_cosignatures
from fedveil.run.files import SAVED
from fedveil.run.prepared_run import Saved
from fedveil.run.saved import read_saved
from fedveil.server import checkpoint

claim_identity(1)
KEPT: dict[str, str] = json.loads((Path(__file__).parents[1] / "fixtures" / "messages.json").read_text())
SPEC, MESSAGE = wire.SPEC_RECORD, Message(RecordDict(), 5, "query")


class Sent:
    """Socket that keeps what is sent."""

    data = b""

    def settimeout(self, seconds: float) -> None:
        """Do nothing."""

    def sendall(self, data: bytes) -> None:
        """Keep the bytes."""
        self.data += data


def file_with(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def spec(text: str, key: str = "spec") -> RecordDict:
    return RecordDict({SPEC: ConfigRecord({key: text, "run": "r", "round": 1})})


def log(text: str) -> str:
    kind = (
        InclusionProof
        if '"inclusion"' in text
        else ConsistencyProof
        if '"consistency"' in text
        else LogExport
    )
    told: LogDocument = build(kind, read_json(text))
    return to_text(told)


def witnessed(text: str, folder: Path) -> str:
    heads = heads_of_key(file_with(folder, "key.heads.json", text).with_name("key"))
    return json.dumps({name: asdict(each) for name, each in heads.items()}, indent=1)


def opening(text: str, folder: Path) -> str:
    path = file_with(folder, "opening", text)
    run = receipt.RunDescription("hearts", "run 1", "cd" * 32)
    return receipt.opening_text(receipt.read_opening(path), run, 5).decode()


def heads(text: str, folder: Path) -> str:
    ledger_heads._write(folder / "new", ledger_heads._read(file_with(folder, "heads", text)))
    return (folder / "new").read_text()


TEXTS: dict[str, Callable[[str], str]] = {
    "order": lambda text: TrainingOrder.from_json(text).to_json(),
    "settings": lambda text: ClientSettings.from_json(text).to_json(),
    "sum": lambda text: json.dumps(plain_of(wire.read_spec(spec(text)))),
    "shares": lambda text: secure_wire.write_share_spec(secure_wire.read_share_spec(spec(text))),
    "head": lambda text: read_head(text).to_json(),
    "cosignature": lambda text: read_cosignature(text).to_json(),
    "cosignatures": lambda text: format_cosignatures(read_stored_cosignatures(text.encode())).decode(),
    "log": log,
    "inclusion": log,
    "consistency": log,
    "evaluation": lambda text: evaluation_from_json(text).text,
    "frame": lambda text: frames.write(frames.read(bytes.fromhex(text))).hex(),
}
FILES: dict[str, Callable[[str, Path], str]] = {"witnessed": witnessed, "opening": opening, "heads": heads}
RECORDS: dict[str, Callable[[RecordDict, Message], RecordDict]] = {
    "m log": lambda content, _: RecordDict({LOG_RECORD: log_record(log_of(content))}),
    "m log bare": lambda content, _: RecordDict({LOG_RECORD: log_record(log_of(content))}),
    "m instruction": lambda content, _: wire.instruct(
        RecordDict({"arrays": content["arrays"]}), wire.read_spec(content), *wire.read_round(content)
    ),
    "m shares": lambda content, _: RecordDict(
        dict(
            secure_wire.ask(
                secure_wire.messages_of(content),
                secure_wire.read_share_spec(content),
                secure_wire.read_position(content),
            )
        )
    ),
    "m over": lambda _, message: notices.message_to(5, notices.read_over(message)).content,
    "m over bare": lambda _, message: notices.message_to(5, notices.read_over(message)).content,
    "m receipt": lambda _, message: notices.reply_with(notices.read_receipt(message), MESSAGE).content,
    "m facts": lambda _, message: notices.facts_reply(MESSAGE, notices.read_facts(message)).content,
    "m renewal": lambda _, message: (
        notices.renewal_to(5, notices.read_renewal(message), notices.rollovers_in(message)).content
    ),
}


@pytest.mark.parametrize("name", [name for name in KEPT if name in TEXTS or name.split()[0] in TEXTS])
def test_a_text_is_read_and_written_as_before(name: str) -> None:
    write = TEXTS.get(name) or TEXTS[name.split()[0]]
    assert write(KEPT[name]) == KEPT[name]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_and_written_as_before(name: str, tmp_path: Path) -> None:
    assert FILES[name](KEPT[name], tmp_path) == KEPT[name]


@pytest.mark.parametrize("name", RECORDS)
def test_a_message_is_read_and_written_as_before(name: str) -> None:
    message = message_codec.unpack(bytes.fromhex(KEPT[name]))
    before, after = message.content, RECORDS[name](message.content, message)
    assert message_codec.pack_body(Message(after, 5, "train")) == message_codec.pack_body(
        Message(before, 5, "train")
    )


@pytest.mark.parametrize(("name", "difference"), [("m difference", b"diff"), ("m model", b"")])
def test_a_model_statement_is_read_as_before(name: str, difference: bytes) -> None:
    told = wire.read_statement(message_codec.unpack(bytes.fromhex(KEPT[name])).content)
    assert told == wire.ModelStatement("a" * 64, "arrays", 32, difference, bool(difference))


@pytest.mark.parametrize("kind", [Ask, Reply])
def test_an_enrolment_is_read_and_written_as_before(kind: type[Ask] | type[Reply]) -> None:
    data, sent = bytes.fromhex(KEPT[f"enrolment {kind.__name__}"]), Sent()
    send(sent, decode(kind, data[struct.calcsize(">I") :]), float("inf"))
    assert sent.data == data


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint bare"])
def test_a_checkpoint_is_read_and_written_as_before(name: str, tmp_path: Path) -> None:
    path = file_with(tmp_path, checkpoint.NAME, bytes.fromhex(KEPT[name]))
    read = checkpoint.read(tmp_path)
    checkpoint.write(tmp_path, read)
    assert path.read_bytes().hex() == KEPT[name]
    assert checkpoint.head_in(tmp_path) == read.head


def test_the_state_of_a_run_and_of_a_device_is_read_as_before(tmp_path: Path) -> None:
    file_with(tmp_path, SAVED, KEPT["saved"])
    assert read_saved(tmp_path) == Saved("run 1@ab", 1.5, 12.0, "cyclic", "ab" * 16, "cd")
    file_with(tmp_path, SAVED, KEPT["saved bare"])
    assert read_saved(tmp_path) == Saved("run 1")
    file_with(tmp_path, run_end.ENDED, KEPT["ended"])
    ended = run_end.LastRun("run 1", "finished", 3, "2026-11-30T00:00:00+00:00", "model.safetensors")
    assert run_end.read_ended(tmp_path) == ended
    file_with(tmp_path, order_policy.DEALS, KEPT["deals"])
    assert order_policy._read_deals(tmp_path) == json.loads(KEPT["deals"])


def test_nameless_leftover_of_a_process_is_not_a_new_run(tmp_path: Path) -> None:
    file_with(tmp_path, SAVED, json.dumps({**json.loads(KEPT["saved"]), "run": ""}))
    with pytest.raises(Refusal, match=r"cannot be read \(name=''"):
        read_saved(tmp_path)
    checkpoint.write(tmp_path, checkpoint.NO_CHECKPOINT)
    with pytest.raises(Refusal, match="checkpoint"):
        checkpoint.read(tmp_path)
