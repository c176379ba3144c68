"""Bytes that are aimed at structure, for everything that reads what another wrote.

Each surface takes a sound value apart and puts it together wrong: deeper than any stack, wider than the bytes, with a
length that lies, a number of another type or beyond 64 bits, an extension, a key that stands twice. It names the errors
that the reader documents; whatever else comes out of the reader is a finding.

As a script: `structured_fuzz.py COUNT SEED` reads COUNT inputs and prints how many each surface read, and what was wrong.
"""

import io
import json
import math
import random
import resource
import runpy
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tomli_w
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedveil.base.bounded_decoding import Undecodable, plain_of
from fedveil.base.refusal import Refusal
from fedveil.configs.bundle_files import read_toml
from fedveil.deployment.device.agent import read_health
from fedveil.deployment.device.client_bundle import DeviceFile
from fedveil.deployment.device.owner_policy import OwnerPolicy
from fedveil.deployment.device.run_end import read_ended
from fedveil.deployment.federation_yaml import read_federation
from fedveil.deployment.register import read_register
from fedveil.links.device_answers import Journal
from fedveil.links.enrolment.messages import Ask, decode
from fedveil.links.server_bundle import read_admitted
from fedveil.messages import frames, message_codec
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.notices import read_over
from fedveil.messages.secure_wire import read_share_spec, write_share_spec
from fedveil.messages.training_order import TrainingOrder
from fedveil.messages.wire import SPEC_RECORD, VECTOR, VECTOR_RECORD, add_reply, memory_arrays
from fedveil.messages.wire import read_spec as read_sum_spec
from fedveil.privacy.ledger.caps import read_caps
from fedveil.privacy.ledger.data_sets import read_data_sets
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sizing import Attendance, Layer, ShareSpec
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.privacy.secagg.client import Participant, read_state, write_state
from fedveil.privacy.secagg.messages import read_any
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.roster import Member, Roster, read_roster, write_roster
from fedveil.privacy.secagg.shamir import combine, polynomial, values
from fedveil.privacy.secagg.suite import SUITES, public_of, seal, sign, unseal
from fedveil.privacy.secagg.transcript import Purpose, digest, frame

HERE = Path(__file__).parent
COHORT = runpy.run_path(str(HERE / "secagg_cohort.py"))
DEPTHS = (5, 40, 500, 1500, 100_000)
HUGE = (2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -(2**63), -1)
BEYOND = (10**30, -(10**400), 10**5000)  # texts alone can say these
ODD = (
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "x",
    "\ud7ff" * 3,
    "x" * 300,
    b"",
    b"x" * 40,
    [],
    {},
)
NODE_KEY = b"k" * 32


class Raw(bytes):
    """Bytes that stand in a packed value as they are."""


# --- values, and their bytes ---------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every part of a value."""
    yield path
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from places(each, (*path, index))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*path, key))


def placed(value: Any, path: tuple[Any, ...], put: Callable[[Any], Any]) -> Any:
    """Return the value with one part changed."""
    if not path:
        return put(value)
    first, *rest = path
    if isinstance(value, list):
        return [placed(each, tuple(rest), put) if at == first else each for at, each in enumerate(value)]
    return {key: placed(each, tuple(rest), put) if key == first else each for key, each in value.items()}


def twisted(
    draw: random.Random, value: Any, bomb: Callable[[random.Random, Any], Any], odd: tuple[Any, ...]
) -> Any:
    """Return a value with one to three of its parts changed."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice(list(places(value)))
        value = placed(value, path, lambda old: _other(draw, old, bomb, odd))
    return value


def _other(
    draw: random.Random, old: Any, bomb: Callable[[random.Random, Any], Any], odd: tuple[Any, ...]
) -> Any:
    match draw.randrange(8):
        case 0:
            return bomb(draw, old)
        case 1:
            return [old]
        case 2 if isinstance(old, list):
            return [*old, *old] if draw.random() < 0.5 else old[:-1]
        case 3 if isinstance(old, list):
            return draw.sample(old, len(old))
        case 4 if isinstance(old, (bytes, str)):
            return old[: draw.randrange(len(old) + 1)]
        case 5 if isinstance(old, (int, float)):
            return draw.choice(HUGE)
        case 6 if isinstance(old, dict):
            return dict(list(old.items())[1:]) | {"another": 1}
        case _:
            return draw.choice(odd)


def packed(value: Any) -> bytes:
    """Return a value in msgpack; `Raw` bytes stand in it as they are."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, (list, tuple)):
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(packed, value))
    if isinstance(value, dict):
        return struct.pack(">BI", 0xDF, len(value)) + b"".join(
            packed(k) + packed(v) for k, v in value.items()
        )
    return msgpack.packb(value, unicode_errors="surrogatepass")


def packed_bomb(draw: random.Random, old: Any) -> Raw:
    """Return what stands for a value in msgpack and is none, or too much of one."""
    depth, inner = draw.choice(DEPTHS), packed(draw.choice((1, "x", [], b"")))
    lie = draw.choice((1 << 8, 1 << 16, 1 << 20, (1 << 32) - 1))
    return Raw(
        draw.choice(
            (
                b"\x91" * depth + inner,
                b"\x91" * depth + inner,
                b"\x91" * depth + inner,
                b"\x81\xa1x" * depth + inner,
                (b"\xdc" + struct.pack(">H", 8191)) * depth,
                (b"\xdd" + struct.pack(">I", lie)) * draw.choice((1, 100, 2000)) + inner,
                draw.choice((b"\xc6", b"\xdb", b"\xdf", b"\xdd")) + struct.pack(">I", lie) + inner,
                b"\xdd" + struct.pack(">I", 300_000) + b"\x90" * 300_000,
                b"\xd4\x05x",
                b"\xd6\xff" + bytes(4),
                b"\xc9" + struct.pack(">I", lie) + b"\x05" + bytes(draw.randrange(50)),
                b"\xc1",
                b"\x82" + 2 * (b"\xa5bytes" + packed(8)),
                b"\x82" + b"\xa1k\x01" + b"\xa1k\x02",
                b"\x81\x01\x02",
                b"\xa2\xff\xfe",
                b"",
                packed(old) + packed(old),
            )
        )
    )


def packed_wrong(draw: random.Random, value: Any) -> bytes:
    """Return a value in msgpack with its structure changed, and one time in four its bytes."""
    data = bytearray(packed(twisted(draw, value, packed_bomb, (*ODD, *HUGE))))
    if data and draw.random() < 0.25:
        for _ in range(draw.choice((1, 1, 5))):
            data[draw.randrange(len(data))] = draw.choice(
                (0x90, 0x91, 0xC1, 0xDC, 0xDD, 0xDF, 0xFF, draw.randrange(256))
            )
        del data[draw.choice((len(data), draw.randrange(len(data)))) :]
    return bytes(data)


class Text(str):
    """Text that stands in JSON, YAML or TOML as it is."""


def text_bomb(draw: random.Random, old: Any) -> Text:
    """Return what stands for a value in JSON and is too much of one."""
    depth = draw.choice(DEPTHS)
    number = draw.choice(
        (str(draw.choice(BEYOND[:2])), "9" * 5000, "1e999", "-0.0", "NaN", "Infinity", "1e-999")
    )
    return Text(
        draw.choice(
            (
                "[" * depth + "]" * depth,
                '{"a":' * depth + "1" + "}" * depth,
                number,
                '{"a": 1, "a": 2}',
                '"\\ud800"',
                "[" * depth,
            )
        )
    )


def json_wrong(draw: random.Random, value: Any) -> str:
    """Return a value as JSON with its structure changed."""
    return _marked(
        twisted(draw, value, text_bomb, tuple(each for each in ODD if not isinstance(each, bytes))),
        json.dumps,
    )


def _marked(value: Any, dump: Callable[[Any], str]) -> str:
    """Dump a value in which texts stand as they are."""
    raw: dict[str, str] = {}

    def mark(each: Any) -> Any:
        if isinstance(each, Text):
            raw[f"raw{len(raw)}raw"] = str(each)
            return f"raw{len(raw) - 1}raw"
        if isinstance(each, list):
            return [mark(item) for item in each]
        return {key: mark(item) for key, item in each.items()} if isinstance(each, dict) else each

    text = dump(mark(value))
    for name, each in raw.items():
        text = text.replace(f'"{name}"', each).replace(name, each)
    return text


def yaml_bomb(draw: random.Random, old: Any) -> Text:
    """Return what stands for a value in YAML and is none, or too much of one."""
    tags = (
        "timestamp",
        "int",
        "float",
        "bool",
        "binary",
        "set",
        "omap",
        "pairs",
        "null",
        "seq",
        "map",
        "str",
        "python/name:os.system",
    )
    words = (
        "junk",
        "2020-13-45",
        "0x",
        "''",
        "[]",
        "{a: 1}",
        "[1, 2]",
        "99999999999999999999-01-01",
        "1:99:99",
        ".",
        "0b",
    )
    if draw.random() < 0.5:
        return Text(f"!!{draw.choice(tags)} {draw.choice(words)}")
    more = (
        "2020-13-45",
        "0o9",
        "1_000",
        "*nobody",
        "&a [*a]",
        "? [a]\n: b",
        "{a: 1, a: 2}",
        "{<<: 1}",
        "{[1]: 2}",
        "1e400",
        "9999-99-99T99:99:99Z",
    )
    return Text(draw.choice(more)) if draw.random() < 0.5 else text_bomb(draw, old)


def toml_bomb(draw: random.Random, old: Any) -> Text:
    """Return what stands for a value in TOML and is none, or too much of one."""
    more = (
        "2020-13-45",
        "1979-05-27T99:32:00Z",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1e999",
        "nan",
        "inf",
        '"\\uD800"',
        "{a=1,a=2}",
        "00:00:60",
    )
    return Text(draw.choice(more)) if draw.random() < 0.7 else text_bomb(draw, old)


# --- surfaces --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """One reader: what it is given, and what it may raise.

    Attributes:
      name: of the surface.
      share: of all inputs; a slow reader is given fewer.
      made: returns one input.
      read: reads it.
      refused: what it may raise.
    """

    name: str
    share: float
    made: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    refused: tuple[type[Exception], ...]


HELLO, BEGIN = [1, 7, ["run/1/0/0/7", "x"]], ["run/1/0/0/7", 12]
NAMED = [1, "id", "run/1/0/0/7", 1, 5, "3", "train"]
RECORDS = [
    ["arrays", "a", [["w", ["<f4", [2, 3]]], ["b", ["<i8", []]]]],
    [
        "config",
        "c",
        [["lr", 0.1], ["names", ["x", "y"]], ["bytes", [{"bytes": 3}, {"bytes": 0}]], ["on", True]],
    ],
    ["metrics", "m", [["loss", [0.5, 1.5]]]],
    ["run over", "c", [["run", "r"], ["status", "s"], ["rounds", 3]]],
    ["model", "a", []],
]
BLOBS = bytes(24) + bytes(8) + b"abc".ljust(8, b"\0")
ORDER = json.loads(runpy.run_path(str(HERE / "devices.py"))["ORDER"].to_json())
SPEC = SumSpec(1.0, (Segment("train_loss", 5.0), Segment("num-examples", 100.0)), 0.05)
SHARES = ShareSpec(SPEC, 10, Attendance(5, 3, 1), 40, 32, True, False, (Layer(4, 40),))
POLICY = {
    "target_epsilon": 8.0,
    "target_delta": 1e-5,
    "runs": [],
    "trust_server": False,
    "minimum_cohort": 3,
    "collusion": 0.1,
    "dropout": 0.4,
    "maximum_clipping_norm": 100.0,
    "minimum_noise_multiplier": 0.0,
    "profile": "malicious",
    "maximum_local_epochs": 10,
    "suites": [1, 2, 3, 4],
    "peers": {"north": "a" * 64},
    "peers_at_least": 1,
    "approve_rosters": True,
    "cosigned_by_at_least": 1,
    "require_log": True,
    "witnesses": {"north": "b" * 64},
    "witnessed_by_at_least": 1,
    "attest": ["true"],
    "queries": ["c" * 64],
    "authority": "0" * 64,
    "minimum_roster_version": 1,
}
CLIENT = {
    "federation": "hearts",
    "name": "cleveland",
    "node": 2,
    "server": "fl.example.org:8443",
    "task": {"name": "digits", "client": 0, "allow_modules": [], "options": {"a": 1}},
    "eligibility": {"hours": "22-06", "min_free_mebibytes": 3},
}
FEDERATION = {
    "federation": "hearts",
    "server": {"address": "fl.example.org:8443", "also": ["10.0.0.1"]},
    "task": {"name": "digits"},
    "policy": {"target_epsilon": 8.0, "target_delta": 1e-5},
    "clients": [{"name": "cleveland"}, {"name": "hungary", "policy": {"runs": ["a"]}}],
}
ISSUED = dict.fromkeys(
    ("name", "identity", "certificate", "fingerprint", "supernode", "supernode_fingerprint"), "x"
)
FILES = {
    "admitted": ({"0" * 64: 2, "1" * 64: 3}, read_admitted),
    "register": (
        {
            "format": 1,
            "version": 2,
            "clients": [{**ISSUED, "node": 2, "on_device": True, "revoked": False}],
            "server": "",
            "hosts": ["a"],
        },
        read_register,
    ),
    "caps": (
        {"version": 1, "caps": [{"data": "all", "target_epsilon": 1.0, "target_delta": 1e-5, "until": None}]},
        read_caps,
    ),
    "data sets": ({"a": {"fingerprints": ["0" * 64], "adopted": [], "records": "x"}}, read_data_sets),
    "health": ({"name": "a", "federation": "b", "node": 2, "pid": 3, "state": "s"}, read_health),
    "ended": ({"run": "a", "status": "b", "rounds": 2, "at": "c", "model": "d"}, read_ended),
}
FILE_NAMES = {
    "caps": "caps.json",
    "data sets": "data_sets.json",
    "health": "health.json",
    "ended": "ended.json",
}


def surfaces(folder: Path) -> list[Surface]:
    """Return all surfaces.

    Args:
      folder: for the files that some of them read.
    """
    claim_identity(1)
    return [
        Surface("frames", 20, _frame, frames.read, (frames.BadFrame,)),
        Surface(
            "enrolments",
            10,
            lambda draw: packed_wrong(draw, ["sensor-1", bytes(32), b"request", bytes(32)]),
            lambda data: decode(Ask, data),
            (Undecodable,),
        ),
        Surface("messages", 20, _message, _whole_message, (message_codec.MalformedMessage,)),
        Surface("replies", 6, _reply, _summed, ()),
        Surface("secure messages", 20, _secure_message, read_any, (Refused,)),
        *_nodes(),
        Surface("shares", 5, _shares, lambda each: combine(*each), (Refused,)),
        *_rosters(),
        Surface("orders", 12, lambda draw: json_wrong(draw, ORDER), TrainingOrder.from_json, (Refusal,)),
        Surface(
            "sum specs", 4, lambda draw: json_wrong(draw, plain_of(SPEC)), _sum_spec, (ValueError, Refusal)
        ),
        Surface(
            "share specs",
            8,
            lambda draw: json_wrong(draw, json.loads(write_share_spec(SHARES))),
            _share_spec,
            (ValueError, Refusal),
        ),
        *_memories(),
        *_files(folder),
    ]


def _frame(draw: random.Random) -> bytes:
    kind, value = draw.choice(((1, HELLO), (2, BEGIN), (3, ["x"]), (draw.randrange(256), HELLO)))
    return bytes([kind]) + packed_wrong(draw, value)


def _message(draw: random.Random) -> bytes:
    header = packed_wrong(draw, [1, NAMED, draw.choice((RECORDS, RECORDS, 1001))])
    length = len(header) if draw.random() < 0.9 else draw.choice(HUGE[:2])
    return length.to_bytes(4, "little") + header + bytes(-(4 + len(header)) % 8) + BLOBS


def _whole_message(data: bytes) -> None:
    message = message_codec.unpack(data)
    read_over(message)
    Message(Error(1), reply_to=message)


def _reply(draw: random.Random) -> Message:
    """Return a reply as Flower's link brings it: dtype, shape and bytes are the sender's words."""
    file = io.BytesIO()
    np.save(file, np.zeros(4, np.int32))
    data = file.getvalue()
    if draw.random() < 0.6:
        said = draw.choice(
            (
                "-" * 3000 + "1",
                "(" * 300,
                "{'descr': 'O', 'fortran_order': False, 'shape': (4,)}",
                "[" * 900,
                "{" * 90,
                "x",
            )
        )
        data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said) + 1) + said.encode() + b"\n" + bytes(16)
    dtype = draw.choice(("int32", "<i4", "junk", "", "O", "i4,i4", "V8", "M8[s]", "(" * 100, "int32"))
    shape = draw.choice(((4,), (4, 1), (), (2**63,), (-4,)))
    array = Array(
        dtype=dtype,
        shape=shape,
        stype=draw.choice(("numpy.ndarray", "x")),
        data=data[: draw.choice((None, 9, 100))],
    )
    content: dict[str, Any] = {VECTOR_RECORD: ArrayRecord({VECTOR: array})}
    if draw.random() < 0.2:
        content = draw.choice(
            ({}, {VECTOR_RECORD: MetricRecord({VECTOR: 1})}, {**content, "more": ConfigRecord({})})
        )
    asked = Message(RecordDict({"x": memory_arrays({})}), 2, "train")
    code = draw.choice((0, -1, 2**40))
    return (
        Message(Error(code), reply_to=asked)
        if draw.random() < 0.05
        else Message(RecordDict(content), reply_to=asked)
    )


def _summed(reply: Message) -> None:
    add_reply(CohortSum(np.zeros(4)), reply, SumSpec(1.0))


def _secure_message(draw: random.Random) -> bytes:
    _, plain = draw.choice(_traffic())
    return packed_wrong(draw, plain)


_SEEN: list[tuple[bytes, Any]] = []
_LIVES: list[tuple[int, bytes, bytes]] = []  # node, its memory, and the message that it was sent next


def _traffic() -> list[tuple[bytes, Any]]:
    """Return the messages of a whole attempt, as bytes and as lists."""
    if not _SEEN:
        for suite in (1, 2):
            cohort = COHORT["Cohort"](3, 2, suite=suite)

            def keep(stage: str, node: int, message: bytes, cohort: Any = cohort) -> bytes:
                if cohort.suite == 1:
                    _LIVES.append((node, write_state(cohort.nodes[node], NODE_KEY), message))
                return message

            cohort.run(cohort.vectors(4), message_wire=keep)
            for stage, _, message, reply in cohort.traffic:
                for data in (message, *([reply] if stage == "advertise" else [])):
                    _SEEN.append((data, msgpack.unpackb(data)))
                if stage in ("share", "confirm", "reveal"):
                    _SEEN.append((reply, msgpack.Unpacker(io.BytesIO(reply)).unpack()))
    return _SEEN


def _nodes() -> list[Surface]:
    """Return the state machines: nodes and a server in the middle of an attempt, which are sent something else."""
    _traffic()
    cohort = COHORT["Cohort"](3, 2)
    people = dict(cohort.nodes)

    def to_node(draw: random.Random) -> tuple[Participant, bytes]:
        node, memory, message = draw.choice(_LIVES)
        old = people[node]
        fresh = Participant(node, old.key, old.policy, old.roster)
        read_state(fresh, memory, NODE_KEY)
        return fresh, packed_wrong(draw, msgpack.unpackb(message))

    def told(asked: tuple[Participant, bytes]) -> None:
        asked[0].handle(asked[1], COHORT["NOW"])

    attempt = cohort.attempt(4)
    attempt.proposal()
    adverts = [each for _, each in _traffic() if each[0] == 1]

    def to_server(draw: random.Random) -> tuple[int, bytes]:
        return draw.choice(list(people)), packed_wrong(draw, draw.choice(adverts))

    return [
        Surface("nodes", 4, to_node, told, (Refused,)),
        Surface("server", 6, to_server, lambda each: attempt.take(*each), (Refused,)),
    ]


def _shares(draw: random.Random) -> tuple[dict[int, bytes], int]:
    (dealt,) = values([polynomial(bytes(32), 3)], range(1, 6))
    shares = {point: each.to_bytes(32, "big") for point, each in enumerate(dealt, 1)}
    for point in draw.sample(list(shares), draw.randrange(1, 4)):
        shares[point] = draw.choice((b"", b"\xff" * 32, bytes(31), bytes(2000), shares[point][::-1]))
    return shares, draw.choice((1, 3, 6, 100))


def _rosters() -> list[Surface]:
    key, context = Ed25519PrivateKey.from_private_bytes(bytes(range(32))), digest(Purpose.ROSTER)
    members = (Member(3, "north", b"a" * 32, 1_800_000_000), Member(5, "sued", b"b" * 32, 1_900_000_000))
    body, _ = msgpack.unpackb(write_roster(Roster(7, members), key))
    plain = msgpack.unpackb(body)

    def signed(draw: random.Random) -> bytes:
        inner = packed_wrong(draw, plain)
        return msgpack.packb((inner, sign(key, context, inner)))

    def unsigned(draw: random.Random) -> bytes:
        return packed_wrong(draw, [body, bytes(64)])

    def read(data: bytes) -> object:
        return read_roster(data, public_of(key))

    return [
        Surface("rosters", 6, signed, read, (Refused,)),
        Surface("rosters of others", 6, unsigned, read, (Refused,)),
    ]


def _sum_spec(text: str) -> object:
    return read_sum_spec(RecordDict({SPEC_RECORD: ConfigRecord({"spec": text})}))


def _share_spec(text: str) -> object:
    return read_share_spec(RecordDict({SPEC_RECORD: ConfigRecord({"spec": text})}))


def _memories() -> list[Surface]:
    _traffic()
    people = COHORT["Cohort"](3, 2).nodes
    lives = [
        (node, msgpack.unpackb(unseal(SUITES[1], NODE_KEY, memory, frame(Purpose.STATE, node))))
        for node, memory, _ in _LIVES
    ]

    def made(draw: random.Random) -> tuple[int, bytes]:
        node, plain = draw.choice(lives)
        return node, seal(SUITES[1], NODE_KEY, packed_wrong(draw, plain), frame(Purpose.STATE, node))

    def read(given: tuple[int, bytes]) -> None:
        old = people[given[0]]
        read_state(Participant(given[0], old.key, old.policy, old.roster), given[1], NODE_KEY)

    return [Surface("memory", 4, made, read, (Refused,))]


def _files(folder: Path) -> Iterator[Surface]:
    path = folder / "file"

    def reading(read: Callable[[Path], object], file: Path = path) -> Callable[[Any], object]:
        def act(data: str | bytes) -> object:
            file.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
            return read(file)

        return act

    def toml(value: Any) -> Callable[[random.Random], str]:
        odd = tuple(each for each in ODD if not isinstance(each, bytes) and each is not None)

        def made(draw: random.Random) -> str:
            changed = twisted(draw, value, toml_bomb, (*odd, *HUGE))
            return _marked(changed if isinstance(changed, dict) else {"x": changed}, tomli_w.dumps)

        return made

    def a_yaml(draw: random.Random) -> str:
        odd = tuple(each for each in ODD if not isinstance(each, bytes))
        return _marked(twisted(draw, FEDERATION, yaml_bomb, (*odd, *HUGE)), lambda each: yaml.safe_dump(each))

    yield Surface("policies", 3, toml(POLICY), reading(lambda p: read_toml(OwnerPolicy, p)), (Refusal,))
    yield Surface("client files", 3, toml(CLIENT), reading(lambda p: read_toml(DeviceFile, p)), (Refusal,))
    yield Surface(
        "federation files", 1, a_yaml, reading(read_federation, folder / "federation.yaml"), (Refusal,)
    )
    for name, (value, read) in FILES.items():
        file = folder / FILE_NAMES.get(name, name)
        takes_folder = name in FILE_NAMES
        yield Surface(
            name,
            1,
            lambda draw, value=value: json_wrong(draw, value),
            reading(lambda p, read=read, whole=takes_folder: read(p.parent if whole else p), file),
            (Refusal,),
        )
    yield Surface(
        "journal", 1, lambda draw: draw.randbytes(draw.choice((0, 1, 50, 3000))), reading(_journal), ()
    )


def _journal(path: Path) -> None:
    journal = Journal(path)
    journal.close()


# --- all of it -------------------------------------------------------------------------------------------------------


def fuzzed(folder: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Read inputs; return how many each surface read or refused, and what was wrong.

    Args:
      folder: for files.
      count: of inputs, all surfaces together; each has at least 20.
      seed: of the inputs.
    """
    every = surfaces(folder)
    whole = sum(each.share for each in every)
    seen, wrong = Counter[str](), list[str]()
    for surface in every:
        draw = random.Random(f"{seed} {surface.name}")
        for number in range(max(20, math.ceil(count * surface.share / whole))):
            made, began = surface.made(draw), time.process_time()
            try:
                surface.read(made)
                seen[f"{surface.name}: read"] += 1
            except surface.refused as refusal:
                seen[f"{surface.name}: refused"] += 1
                if not str(refusal):
                    wrong.append(f"{surface.name} {number}: a refusal without words")
            except BaseException as error:
                wrong.append(f"{surface.name} {number}: {type(error).__name__}: {str(error)[:80]}")
                if isinstance(error, KeyboardInterrupt):
                    raise
            if (took := time.process_time() - began) > 5.0:
                wrong.append(f"{surface.name} {number}: {took:.1f} s of CPU")
    return seen, wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        began = time.process_time()
        found, faults = fuzzed(Path(made), int(sys.argv[1]), int(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    figures = {"inputs": found.total(), "seconds": round(time.process_time() - began), "peak_mebibytes": peak}
    print(
        json.dumps(
            {
                **figures,
                **dict(sorted(found.items())),
                "wrong": len(faults),
                "first": faults[:20] + faults[-20:],
            },
            indent=1,
        )
    )
