"""Log of what a server has told: every device holds each instruction against it, and a server that forks is found out."""

import hashlib
import json
import logging
import runpy
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.client.private_update import NotTrained
from fedveil.configs.bundle_files import read_credentials
from fedveil.deployment.device.log_copy import FORK, HEAD, LEAVES, LogCopy, text_of_head
from fedveil.links.attestation import AttestedGrid
from fedveil.links.later_heads import LaterHeads
from fedveil.links.log_export import LogExport, read_log
from fedveil.links.log_wire import LogStatement, log_of, log_record
from fedveil.links.logged_grid import LoggedGrid
from fedveil.links.server_bundle import ServerBundle, read_server_bundle
from fedveil.links.server_log import (
    LOG,
    ServerLog,
    contradicting_entries,
    final_entry,
    model_entry,
    read_entries,
    roster_entry,
)
from fedveil.links.tree_head import check_head, read_head, sign_head
from fedveil.messages.message_codec import pack_body, question_id
from fedveil.messages.secure_wire import model_hash
from fedveil.messages.wire import FORKED, LOG_RECORD, NOT_READY, OVER
from fedveil.privacy.ledger.hash_chain import canonical
from fedveil.privacy.merkle import leaf_hash, root_of
from fedveil.server.masking import Masking
from fedveil.server.participants import Participants
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import SecureSums
from fedveil.strategies.cohorts import Poisson

MADE_ERROR = Error(NOT_READY, "")
MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "devices.py"))
Devices, device_of, in_the_clear = MADE["Devices"], MADE["device_of"], MADE["in_the_clear"]


def client(made: Path, number: int = 0, **policy: Any) -> Any:
    return device_of(made / "clients" / f"c{number}", **{"require_log": True, **policy})


def logged(made: Path, grid: Any, name: str = LOG) -> LoggedGrid:
    server = read_server_bundle(made / "server")
    rosters = (server.roster, server.signed_roster)
    return LoggedGrid(
        grid, ServerLog(server.folder / name), server, lambda: server.credentials, lambda: rosters
    )


def asked(grid: Any, number: int = 1) -> bool:
    """Ask node 2 for one vector in the clear; return whether it answered."""
    [reply] = grid.send_and_receive([in_the_clear(number=number)])
    return not reply.has_error()


def seen(made: Path, number: int = 0) -> LogCopy:
    bundle = client(made, number).bundle
    return LogCopy(bundle.state, bundle.settings.federation, bundle.credentials.ca)


def masked(made: Path, grid: Any, number: int) -> Any:
    server = read_server_bundle(made / "server")
    masking = Masking(server.roster, dropout=0.4, collusion=0.1, signed_roster=server.signed_roster)
    size = MADE["CLASSES"] * (MADE["FEATURES"] + 1)
    wanted = Sum("spring", number, MADE["content"](), "train", MADE["SPEC"], {"w": (size,)}, 3.0)
    nodes = [member.node for member in server.roster.members]
    return SecureSums(grid, masking).sum(nodes, wanted, None)


# --- a server that tells one story ---------------------------------------------------------------------------------


def test_every_device_has_the_log_of_all_instructions(made: Path) -> None:
    devices = Devices({2 + number: client(made, number) for number in range(5)})
    grid = logged(made, devices)
    assert [masked(made, grid, number).survivors for number in (1, 2)] == [5, 5]
    entries = read_entries(made / "server" / LOG)
    model = model_hash(MADE["content"]())
    roster = read_server_bundle(made / "server").roster
    assert entries == [roster_entry(roster), *(model_entry("spring", number, model) for number in (1, 2))]
    logs = [seen(made, number) for number in range(5)]
    assert {each.head.size for each in logs if each.head} == {3} and len(
        {tuple(each.leaves) for each in logs}
    ) == 1
    again = logged(
        made, Devices({2 + number: client(made, number) for number in range(5)})
    )  # both ends restarted
    assert masked(made, again, 3).survivors == 5 and seen(made).head is not None
    assert len(read_entries(made / "server" / LOG)) == len(seen(made).leaves) == 4


def test_answering_node_gets_new_entries_and_an_absent_one_its_gap(made: Path) -> None:
    away = [False]
    devices = Devices(
        {2: client(made)}, lambda message: Message(MADE_ERROR, reply_to=message) if away[0] else None
    )
    grid = logged(made, devices)
    for number, is_away in enumerate((False, True, True, False, False), 1):
        away[0] = is_away
        assert asked(grid, number) is not is_away
    brought = [len(log_of(message.content).leaves) for message, _ in devices.seen]
    assert brought == [2, 1, 2, 3, 1] and len(seen(made).leaves) == 6


def test_a_round_that_drew_nobody_leaves_no_gap_in_the_log(made: Path) -> None:
    """Devices would otherwise learn from the number of entries which cohorts were empty: a draw is secret."""
    owned = partial(read_credentials, made / "server")
    everybody = Participants(
        AttestedGrid(logged(made, Devices({2: client(made)})), "true", owned), Poisson(0.5), 1
    )
    size = MADE["CLASSES"] * (MADE["FEATURES"] + 1) + MADE["SPEC"].segment_size
    for number, cohort in enumerate(([2], [], [2]), 1):
        everybody.sum(in_the_clear(number=number), cohort, MADE["SPEC"], size, None)
    entries = [json.loads(each) for each in read_entries(made / "server" / LOG)]
    assert [each.get("round") for each in entries] == [None, 1, 2, 3] and len(seen(made).leaves) == 4


def test_a_device_that_has_forgotten_the_log_is_sent_all_of_it_again(made: Path) -> None:
    grid = logged(made, devices := Devices({2: client(made)}))
    assert asked(grid, 1) and asked(grid, 2)
    for name in (HEAD, LEAVES):
        (devices.devices[2].bundle.state / name).unlink()
    devices.devices[2] = client(made)
    assert not asked(grid, 3)  # the server does not know yet
    assert asked(grid, 4) and len(seen(made).leaves) == 5


def test_an_instruction_that_a_newer_one_overtook_is_no_fork(made: Path) -> None:
    kept: list[Message] = []
    devices = Devices({2: client(made)}, kept.append)
    grid = logged(made, devices)
    assert asked(grid, 1) and asked(grid, 2)
    devices.devices[2].check_log(kept[0].content)
    assert len(seen(made).leaves) == 3


def test_log_is_no_part_of_a_questions_id(made: Path) -> None:
    """A question that is asked again after a restart, with another head, is the same question."""
    devices = Devices({2: client(made)})
    grid, bare = logged(made, devices), in_the_clear()
    assert asked(grid)
    message = devices.seen[0][0]
    named = [question_id(each, pack_body(each), 2) for each in (bare, message)]
    assert named[0] == named[1] is not None
    content = RecordDict({**dict(message.content.items()), "more": ConfigRecord({"a": 1})})
    other = Message(content, 2, "train")
    assert question_id(other, pack_body(other), 2) != named[0]


def test_a_log_goes_on_behind_its_last_whole_entry(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / LOG)
    assert [log.index_of(entry) for entry in (b"a", b"b", b"a")] == [0, 1, 0]
    with open(tmp_path / LOG, "ab") as file:
        file.write(b'{"kind":"cut')
    again = ServerLog(tmp_path / LOG)
    assert (again.index_of(b"b"), again.index_of(b"c")) == (1, 2) and read_entries(tmp_path / LOG) == [
        b"a",
        b"b",
        b"c",
    ]


# --- a server that lies ---------------------------------------------------------------------------------------------


def test_server_with_two_stories_is_refused_and_signed_the_evidence(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = client(made)
    one, other = (logged(made, Devices({2: device}), name) for name in (LOG, "other.jsonl"))
    assert asked(one, 1)
    with caplog.at_level(logging.ERROR, "fedveil.client"):
        assert not asked(other, 2)
    assert "forks from what this device has seen" in caplog.text
    evidence = json.loads((device.bundle.state / FORK).read_text())
    assert evidence["seen"]["size"] == evidence["told"]["size"] == 2
    assert evidence["seen"]["root"] != evidence["told"]["root"]
    assert asked(one, 3) and not asked(other, 4)
    assert not asked(logged(made, Devices({2: client(made)}), "other.jsonl"), 5)  # nor after a restart
    assert [len(each.leaves) for each in (seen(made),)] == [3]


@pytest.mark.parametrize(
    "how", ["another model", "another roster", "left out", "a root that is none", "no place", "no log"]
)
def test_contents_of_an_instruction_are_compared_with_the_log(made: Path, how: str) -> None:
    devices = Devices({2 + number: client(made, number) for number in range(5)})
    grid = logged(made, devices)
    assert masked(made, grid, 1).survivors == 5
    devices.fault = lambda message: changed(devices, message, how)
    assert masked(made, grid, 2).survivors == 0
    assert all(len(seen(made, number).leaves) < 4 for number in range(5))
    devices.fault = None
    assert masked(made, logged(made, devices), 3).survivors == 5


def test_final_model_is_logged_as_no_start_of_a_round(made: Path) -> None:
    """Else it would stand in the log under a round that nobody knows, and another device's as that of the run."""
    kept: list[Message] = []
    devices = Devices({2: client(made)}, kept.append)
    records = dict(in_the_clear().content.items()) | {OVER: ConfigRecord({"run": "spring"})}
    [reply] = logged(made, devices).send_and_receive([Message(RecordDict(records), 2, "train")])
    assert reply.has_error()
    with pytest.raises(NotTrained):  # what the agent does at the end of a run
        devices.devices[2].check_log(kept[0].content)


def test_log_with_another_past_is_a_fork_even_with_the_sent_entry(made: Path) -> None:
    bundle, own = client(made).bundle, read_server_bundle(made / "server").credentials
    log = LogCopy(bundle.state, "made", own.ca)

    def told(*entries: bytes, signed: bytes | None = None, start: int = 0) -> LogStatement:
        leaves = tuple(map(leaf_hash, entries))
        head = sign_head("made", len(leaves), signed or root_of(leaves), own)
        return LogStatement(head.to_json(), start, leaves[start:], model=len(leaves) - 1)

    log.check(told(b"a", b"b"), b"b", None)
    for start in (0, 1, 2):
        with pytest.raises(Refusal, match="forks from what this device has seen"):
            log.check(told(b"a", b"x", b"c", start=start), b"c", None)
    with pytest.raises(Refusal, match="forks"):  # leaves that the head does not stand for
        log.check(told(b"a", b"b", b"c", signed=bytes(31) + b"1"), b"c", None)
    with pytest.raises(Refusal, match="forks"):  # a shorter one
        log.check(replace(told(b"x"), model=-1), None, None)
    assert len(log.leaves) == 2
    log.check(told(b"a", b"b", b"c", start=1), b"c", None)


def changed(devices: Any, message: Message, how: str) -> Message:
    """Return the device's answer to a message that was changed on its way."""
    records = dict(message.content.items())
    told = log_of(message.content)
    assert told is not None
    match how:
        case "another model" if told.model >= 0:
            told = replace(told, model=told.model - 1)
        case "another roster" if told.roster >= 0:
            told = replace(told, roster=told.roster + 1)
        case "left out":
            told = (
                replace(told, leaves=told.leaves[:-1]) if told.leaves else replace(told, start=told.start - 1)
            )
        case "a root that is none":
            told = (
                replace(told, leaves=(*told.leaves[:-1], bytes(32)), start=told.start)
                if told.leaves
                else replace(told, start=-1)
            )
        case _:
            pass
    records[LOG_RECORD] = log_record(told)
    if how == "no place":  # of the model, which then is in no log that others see
        del records[LOG_RECORD]["model"]
    if how == "no log":
        del records[LOG_RECORD]
    node = message.metadata.dst_node_id
    sent = Message(RecordDict(records), node, message.metadata.message_type)
    return devices.devices[node].answer(sent)


def test_device_with_a_log_copy_always_demands_one(made: Path) -> None:
    lenient = Devices({2: client(made, require_log=False)})
    assert asked(lenient, 1) and asked(logged(made, lenient), 2) and not asked(lenient, 3)
    assert not asked(Devices({2: client(made, require_log=False)}), 4)


def test_a_head_counts_with_the_servers_own_signature_alone(made: Path) -> None:
    server: ServerBundle = read_server_bundle(made / "server")
    bundle = client(made).bundle
    ca, own = server.credentials.ca, server.credentials
    sound = sign_head("made", 1, bytes(32), own)
    check_head(sound, ca, "made")
    stranger = read_credentials(made / "clients" / "c0", "made", "c0")
    wrong = [
        sign_head("made", 1, bytes(32), stranger),  # a client's certificate is of the same authority
        replace(sign_head("made", 1, bytes(32), stranger), certificate=sound.certificate),
        replace(sound, size=2),
        replace(sound, root="1" * 64),
        replace(sound, at=sound.at + 1),
        replace(sound, at=sound.at + 10**9),
        replace(sound, signature="00"),
        replace(sound, certificate="none"),
    ]
    for head in wrong:
        with pytest.raises(Refusal, match="was not signed by the server of 'made'"):
            check_head(head, ca, "made")
    with pytest.raises(Refusal, match="was not signed"):
        check_head(sound, ca, "another")
    assert bundle.credentials.ca == ca


def test_a_damaged_memory_of_the_log_is_refused(made: Path) -> None:
    device = client(made)
    grid = logged(made, Devices({2: device}))
    assert asked(grid, 1)
    path = device.bundle.state / LEAVES
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Refusal, match="does not match its head"):
        seen(made)
    assert not asked(logged(made, Devices({2: client(made)})), 2)
    path.unlink()
    with pytest.raises(Refusal, match="does not match"):
        seen(made)


# --- compared without the server ------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = run([*argv])
    return code, capsys.readouterr().out


def test_two_clients_and_the_server_compare_their_logs(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = Devices({2: client(made), 3: client(made, 1)})
    grid = logged(made, devices)
    for number in (1, 2, 3):
        for node in (2, 3)[: 1 + (number < 3)]:
            message = in_the_clear(number=number)
            [reply] = grid.send_and_receive([Message(message.content, node, "train")])
            assert not reply.has_error()
    ahead, behind, server = (str(made / each) for each in ("clients/c0", "clients/c1", "server"))
    files = {name: made / f"{name}.json" for name in ("ahead", "behind", "server", "other")}
    for name, argv in (("ahead", ["client", "log", ahead]), ("behind", ["client", "log", behind])):
        files[name].write_text(told(capsys, *argv, "--json")[1])
    files["server"].write_text(told(capsys, "server", "log", server, "--json")[1])
    shown = told(capsys, "server", "log", server)[1]
    assert (
        "made: 4 entries, root " in shown
        and "roster version 1" in shown
        and "model of round 3 of spring" in shown
    )
    for mine, other, known in (
        (ahead, "behind", 3),
        (behind, "ahead", 3),
        (behind, "server", 3),
        (ahead, "server", 4),
    ):
        code, said = told(capsys, "client", "log", mine, "--against", str(files[other]))
        assert code == 0 and f"the logs agree on their first {known} entries" in said
    forked = ServerLog(made / "forked.jsonl")
    for entry in (*read_entries(made / "server" / LOG)[:2], b"another", b"more"):
        forked.index_of(entry)
    own = read_server_bundle(made / "server").credentials
    leaves = tuple(each.hex() for each in forked.leaves)
    files["other"].write_text(
        json.dumps(as_export(LogExport(sign_head("made", 4, forked.root, own), leaves)))
    )
    code, said = told(capsys, "client", "log", ahead, "--against", str(files["other"]))
    assert code == 1 and "FORKED: entry 2 is another one there; the server signed both" in said
    files["other"].write_text(files["ahead"].read_text().replace('"size": 4', '"size": 3'))
    with pytest.raises(Refusal, match="was not signed by the server"):
        read_log(files["other"], own.ca, "made")


def test_two_stories_in_one_log_show_in_its_entries(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices, log = Devices({2: client(made)}), ServerLog(made / "server" / LOG)
    digest = model_hash(in_the_clear().content)
    others = [
        model_entry("spring", 1, digest[:8] + bytes(24)),  # the digits that are shown are the same
        canonical({"kind": "roster", "version": 1, "hash": "0" * 64}).encode(),
        final_entry("spring", digest[:8] + bytes(24)),
    ]
    log.index_of(final_entry("spring", digest))
    mine, server = str(made / "clients" / "c0"), made / "server.json"
    log.index_of(model_entry("\x1b[8mautumn", 1, digest))  # would hide the rest of what a terminal shows
    for number, entry in enumerate((None, *others)):
        if entry is not None:
            log.index_of(entry)
        assert asked(logged(made, devices), number + 1)
        server.write_text(told(capsys, "server", "log", str(made / "server"), "--json")[1])
        code, said = told(capsys, "client", "log", mine, "--against", str(server))
        assert code == (number > 0) and said.count("  CONFLICT") == number
        assert "\x1b" not in said and "round 1 of \\x1b[8mautumn" in said
        log = ServerLog(made / "server" / LOG)


def test_two_stories_under_two_names_of_one_run_show() -> None:
    def told(*names: str) -> list[int]:
        rounds = Counter[str]()
        entries: list[str] = []
        for name in names:
            rounds[name] += 1
            entries.append(
                model_entry(
                    name, rounds[name], hashlib.sha256(f"{name} {rounds[name]}".encode()).digest()
                ).decode()
            )
        return sorted(contradicting_entries(entries))

    assert told("run-1@x", "run-1@y", "run-1@x", "run-1@y", "run-1@x") == [2, 4]
    assert told("run-1@x", "run-1@x y", "run-1@x") == [2]
    # A run that was resumed, one that asks its clients between rounds, and two runs by turns tell one story each.
    assert told("run-1@x", "run-1@x", "run-1@y", "run-1@y") == []
    assert told("run-1@x scaling", "run-1@x", "run-1@x evaluation", "run-1@x", "run-1@x evaluation") == []
    assert told("run-1@x", "run-2@y", "run-1@x", "run-2@y") == []


def as_export(export: LogExport) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(export)


@pytest.mark.parametrize("proof", [("--inclusion", "1"), ("--consistency", "2"), ("--consistency", "1")])
def test_a_proof_stands_for_the_log(
    made: Path, proof: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    devices = Devices({2: client(made)})
    grid = logged(made, devices)
    assert asked(grid, 1) and asked(grid, 2)
    file, ca = made / "proof.json", read_server_bundle(made / "server").credentials.ca
    file.write_text(told(capsys, "server", "log", str(made / "server"), *proof)[1])
    assert told(capsys, "client", "log", str(made / "clients" / "c0"), "--against", str(file))[0] == 0
    fields = json.loads(file.read_text())
    key = proof[0].removeprefix("--")
    for wrong in ({key: ["0" * 64, *fields[key]]}, {"place": 2} if key == "inclusion" else {"size": 3}):
        file.write_text(json.dumps({**fields, **wrong}))
        with pytest.raises(Refusal, match="does not match its head; ask for a true copy"):
            read_log(file, ca, "made")
    assert run(["server", "log", str(made / "server"), proof[0], "9"]) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"format": "fedveil log 1"}', "[" * 2000, '{"inclusion": 1}'])
def test_invalid_export_is_refused(made: Path, text: str) -> None:
    (made / "other.json").write_text(text)
    with pytest.raises(Refusal, match="is not an export or proof of a log"):
        read_log(made / "other.json", read_server_bundle(made / "server").credentials.ca, "made")


# --- a server that was restored from an older copy ------------------------------------------------------------------


def heads(made: Path) -> LaterHeads:
    server = read_server_bundle(made / "server")
    return LaterHeads(server.folder, ServerLog(server.folder / LOG), server.credentials.ca, server.federation)


def test_head_on_a_device_shows_a_restored_server(made: Path) -> None:
    devices = Devices({2: client(made)})
    assert asked(logged(made, devices), 1)
    earlier = (made / "server" / LOG).read_bytes()
    assert asked(logged(made, devices), 2)
    newest = (made / "server" / LOG).read_bytes()
    told = text_of_head(client(made).bundle.state)
    assert heads(made).log_loss([told, "", "no head"]) is None
    (made / "server" / LOG).write_bytes(earlier)
    [reply] = logged(made, devices).send_and_receive([in_the_clear(number=3)])
    assert reply.has_error() and reply.error.code == FORKED

    (made / "server" / LOG).write_bytes(earlier)
    forged = replace(read_head(told), size=9).to_json()  # a device cannot sign for the server
    assert heads(made).log_loss([forged]) is None
    assert "restored from an older copy" in (heads(made).log_loss([forged, told]) or "")
    with pytest.raises(Refusal, match="restored from an older copy"):
        heads(made).refuse()
    shutil.copy(made / "server" / "log.later.json", made / "server" / "log.lost.json")  # its operator's word
    assert heads(made).log_loss([told]) is None
    (made / "server" / "log.lost.json").unlink()
    (made / "server" / LOG).write_bytes(newest)
    heads(made).refuse()
    assert not (made / "server" / "log.later.json").exists()
    assert text_of_head(made) == ""
