"""Attestation: shares leave a device once a command of its owner has accepted the server's quote, and not before."""

import logging
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.base.refusal import Refusal
from fedveil.deployment.device import server_quotes
from fedveil.links.attestation import (
    AttestedGrid,
    nonce_of,
    quote_of,
    report_data,
    run_quote_command,
    with_nonce,
)
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.message_codec import pack_body, question_id
from fedveil.messages.secure_wire import read_position
from fedveil.messages.wire import QUOTE_RECORD, Exchange

MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "devices.py"))
Devices, device_of, in_the_clear = MADE["Devices"], MADE["device_of"], MADE["in_the_clear"]
QUOTES = 'printf "quote of %s\\n" "$1"'  # a dummy: it vouches for whatever it is asked to
ACCEPTS = 'read -r said; [ "$said" = "quote of $1" ] || { echo "measured: $said" >&2; exit 3; }'


@pytest.fixture
def made(made: Path, tmp_path: Path) -> Path:
    for name, line in (("quotes", QUOTES), ("accepts", ACCEPTS)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o700)
    return made


def clients(made: Path, **policy: Any) -> dict[int, Any]:
    """Return five devices, of which the first asks for quotes."""
    asks = {"attest": (str(made.parent / "accepts"),), **policy}
    return {
        2 + number: device_of(made / "clients" / f"c{number}", **(asks if number == 0 else {}))
        for number in range(5)
    }


def attested(made: Path, devices: Any, command: str | None = None) -> AttestedGrid:
    own = read_server_bundle(made / "server").credentials
    return AttestedGrid(devices, command or shlex.quote(str(made.parent / "quotes")), lambda: own)


def opened(grid: Any, number: int = 1) -> Any:
    """Sum in masks over all five devices, by a grid that attests or by the devices alone."""
    devices = grid._grid if isinstance(grid, AttestedGrid) else grid
    masking = MADE["Masking"](devices.devices[2].bundle.identity.roster, dropout=0.4, collusion=0.1)
    size = MADE["CLASSES"] * (MADE["FEATURES"] + 1)
    wanted = MADE["Sum"]("spring", number, MADE["content"](), "train", MADE["SPEC"], {"w": (size,)}, 3.0)
    return MADE["SecureSums"](grid, masking).sum(devices.get_node_ids(), wanted, None)


def exchanges(devices: Any, node: int) -> list[Exchange]:
    """Return the exchanges in which a node has answered."""
    pairs = [(message, reply) for message, reply in devices.seen if message.metadata.dst_node_id == node]
    return [read_position(message.content).exchange for message, reply in pairs if not reply.has_error()]


def test_shares_leave_once_the_owners_command_accepts_the_quote(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices = Devices(clients(made))
    grid = attested(made, devices)
    with caplog.at_level(logging.INFO, "fedveil.client"):
        assert [opened(grid, number).survivors for number in (1, 2)] == [5, 5]
    assert caplog.text.count("the server's quote is accepted by") == 1  # for the hours that it counts
    brought = [message for message, _ in devices.seen if QUOTE_RECORD in message.content]
    assert [(each.metadata.dst_node_id, read_position(each.content).exchange) for each in brought] == [
        (2, Exchange.COHORT)
    ]
    sent = [nonce_of(reply.content) for _, reply in devices.seen if not reply.has_error()]
    assert len([nonce for nonce in sent if nonce]) == 1


@pytest.mark.parametrize(
    ("command", "policy", "said"),
    [
        (
            None,
            {"attest": ("/bin/false",)},
            "does not accept the server's quote (exit code 1: silent)",
        ),
        ("printf other", {}, "does not accept the server's quote (exit code 3: measured: other)"),
        ("/bin/false", {}, "does not accept the server's quote (exit code 3: measured:)"),
        (None, {"attest": ("/nowhere/accepts",)}, "cannot be run"),
    ],
)
def test_without_an_accepted_quote_no_share_leaves(
    made: Path, command: str | None, policy: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    devices = Devices(clients(made, **policy))
    result = opened(attested(made, devices, command))
    assert result.survivors == 4 and result.dropped == {"owner's policy": 1}
    assert exchanges(devices, 2) == [Exchange.PROPOSAL] and said in caplog.text
    assert not devices.devices[2].ledger.path.exists()


def test_a_server_that_gives_no_quotes_gets_no_shares(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    devices = Devices(clients(made))
    assert opened(devices).survivors == 4 and exchanges(devices, 2) == [Exchange.PROPOSAL]
    assert "the server sent no quote" in caplog.text
    assert (
        devices.devices[2].answer(in_the_clear()).has_error()
    )  # in the clear there is no exchange before the vector


def test_a_quote_is_good_for_one_nonce_and_one_key(made: Path) -> None:
    device = clients(made)[2]
    own = read_server_bundle(made / "server").credentials
    quotes, ca, command = device.server_quotes, device.bundle.roots, [str(made.parent / "quotes")]
    asked: list[Message] = []
    opened(Devices(clients(made), asked.append))
    proposal, cohort = (
        next(
            each
            for each in asked
            if read_position(each.content).exchange is kind and each.metadata.dst_node_id == 2
        )
        for kind in (Exchange.PROPOSAL, Exchange.COHORT)
    )

    def bringing(quote: bytes, certificate: bytes) -> RecordDict:
        record = ConfigRecord({"quote": quote, "certificate": certificate})
        return RecordDict({**dict(cohort.content.items()), QUOTE_RECORD: record})

    first, second = (quotes.nonce(proposal.content) for _ in range(2))
    assert first and second and first != second
    with pytest.raises(Refusal, match="does not accept"):  # made for the nonce before
        quotes.check(bringing(run_quote_command(command, first, own.certificate), own.certificate), ca)
    with pytest.raises(Refusal, match="sent no quote"):  # a nonce is spent by one try
        quotes.check(bringing(run_quote_command(command, second, own.certificate), own.certificate), ca)
    third = quotes.nonce(proposal.content)
    assert third
    stranger = (made / "clients" / "c1" / "tls.pem").read_bytes()
    with pytest.raises(Refusal, match="is not the server's"):
        quotes.check(bringing(run_quote_command(command, third, stranger), stranger), ca)
    fourth = quotes.nonce(proposal.content)
    assert fourth and report_data(fourth, own.certificate) != report_data(fourth, stranger)
    quotes.check(bringing(run_quote_command(command, fourth, own.certificate), own.certificate), ca)
    quotes.check(cohort.content, ca)
    assert not quotes.nonce(proposal.content)


def test_another_quote_comes_in_time_and_an_old_one_does_not_count(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(server_quotes.time, "monotonic", lambda: now[0])
    devices = Devices(clients(made))
    grid = attested(made, devices)
    assert opened(grid, 1).survivors == 5
    now[0] += server_quotes.RENEW_SECONDS + 1
    assert opened(grid, 2).survivors == 5
    assert len([each for each, _ in devices.seen if QUOTE_RECORD in each.content]) == 2
    now[0] += server_quotes.VALID_SECONDS + 1
    assert opened(devices, 3).survivors == 4


@pytest.mark.parametrize(
    "record", [{}, {"quote": 1, "certificate": b""}, {"quote": b"x" * (2 << 20), "certificate": b""}]
)
def test_invalid_quote_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=r"is not a quote|is longer"):
        quote_of(RecordDict({QUOTE_RECORD: ConfigRecord(record)}))
    assert nonce_of(RecordDict({QUOTE_RECORD: ConfigRecord(record)})) is None
    assert nonce_of(with_nonce(RecordDict(), bytes(32))) == bytes(32)


def test_quote_is_no_part_of_a_questions_id() -> None:
    bare = in_the_clear()
    record = ConfigRecord({"quote": b"q", "certificate": b"c"})
    with_one = Message(RecordDict({**dict(bare.content.items()), QUOTE_RECORD: record}), 2, "train")
    assert question_id(bare, pack_body(bare), 2) == question_id(with_one, pack_body(with_one), 2)
