"""Witnesses and time stamps of a run: what outside of a server shows that its files were there, checked offline."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.deployment.serve import serve
from fedveil.evidence.binding import time_stamp as time_stamp_module
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.time_stamp import stamp, time_of_stamp
from fedveil.evidence.binding.verify import CheckLine, verify_folder
from fedveil.evidence.binding.witnesses import note_witnesses
from fedveil.links.server_log import LOG, manifest_entry, read_entries
from fedveil.messages.training_order import people_call
from fedveil.privacy.merkle import leaf_hash, root_of
from fedveil.privacy.witness import HeadCosignature, cosign_head
from fedveil.run.files import MANIFEST, TIME_STAMP, WITNESSES
from fedveil.run.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

KEPT = Path(__file__).parents[2] / "fixtures" / "signed_run" / "run"
SERVED = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "served.py"))
KEYS = {name: Ed25519PrivateKey.generate() for name in ("north", "south")}
PUBLIC = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Return a run that is closed, without its page, of which this release makes another."""
    left_out = shutil.ignore_patterns("report.html", "report.json")
    return Path(shutil.copytree(KEPT, tmp_path / "runs" / "kept", ignore=left_out))


def entry_of(folder: Path) -> bytes:
    manifest = read_manifest(folder)
    return leaf_hash(manifest_entry(people_call(manifest.run), manifest.hash))


def log_with(*middle: bytes) -> list[bytes]:
    return [leaf_hash(b"a"), leaf_hash(b"b"), *middle, leaf_hash(b"c")]


def cosigned(leaves: list[bytes], *names: str, federation: str = "made") -> tuple[HeadCosignature, ...]:
    root = root_of(leaves).hex()
    return tuple(cosign_head(federation, len(leaves), root, 1_900_000_000, KEYS[name]) for name in names)


def line(folder: Path, name: str, known: Knowledge) -> CheckLine | None:
    return next((each for each in verify_folder(folder, known) if each.name == name), None)


def witnesses(folder: Path, *names: str) -> CheckLine:
    found = line(folder, "witnesses", Knowledge(witnesses=[PUBLIC[name] for name in names]))
    assert found is not None
    return found


# --- witnesses ------------------------------------------------------------------------------------------------------


def test_run_counts_its_witnesses_and_a_verifier_can_require_them(kept: Path) -> None:
    assert line(kept, "witnesses", Knowledge()) is None
    assert witnesses(kept, "north").ok is False
    leaves = log_with(entry_of(kept))
    assert note_witnesses(kept.parent, leaves, cosigned(leaves, "north")) == ["kept"]
    found = line(kept, "witnesses", Knowledge())
    assert found is not None and found.ok and "is co-signed by 1:" in found.finding
    assert f"{PUBLIC['north'][:16]} at 2030-03-17T17:46:40+00:00; compare the keys" in found.finding
    assert witnesses(kept, "north").ok and "compare" not in witnesses(kept, "north").finding
    missing = witnesses(kept, "north", "south")
    assert missing.ok is False and PUBLIC["south"][:16] in missing.finding
    # A later head of one that has signed changes nothing; a head before the manifest shows nothing.
    later = [*leaves, leaf_hash(b"d")]
    assert note_witnesses(kept.parent, later, cosigned(later, "north")) == []
    assert note_witnesses(kept.parent, later, cosigned(leaves[:2], "south")) == []
    assert note_witnesses(kept.parent, later, cosigned(later, "south")) == ["kept"]
    assert "is co-signed by 2:" in witnesses(kept, "north", "south").finding
    command = ["verify", str(kept), "--witness", PUBLIC["north"]]
    assert run(command) == 0 and run([*command, "--witness", "0" * 64]) == 2
    assert run(["verify", str(kept / "ledger"), "--witness", PUBLIC["north"]]) == 2


def of_another_run(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    leaf = leaf_hash(manifest_entry("another", read_manifest(folder).hash))
    assert manifest["run"] != "another"
    forge(folder, log_with(leaf), 2)


def of_no_log_with_it(folder: Path) -> None:
    forge(folder, log_with(leaf_hash(b"x")), 2)


def of_a_cut_log(folder: Path) -> None:
    """A head before the manifest, shown as that of the log with it."""
    leaves = log_with(entry_of(folder))
    fields = noted(folder, leaves)
    fields["witnesses"][0]["cosignature"] = asdict(cosigned(leaves[:2], "north")[0])
    (folder / WITNESSES).write_text(json.dumps(fields))


def of_a_changed_time(folder: Path) -> None:
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["cosignature"]["at"] += 1
    (folder / WITNESSES).write_text(json.dumps(fields))


def with_another_key(folder: Path) -> None:
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["cosignature"]["public"] = PUBLIC["south"]
    (folder / WITNESSES).write_text(json.dumps(fields))


def with_no_digits(folder: Path) -> None:
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["inclusion"][0] = "x"
    (folder / WITNESSES).write_text(json.dumps(fields))


def cut_short(folder: Path) -> None:
    noted(folder, log_with(entry_of(folder)))
    (folder / WITNESSES).write_bytes((folder / WITNESSES).read_bytes()[:-9])


def noted(folder: Path, leaves: list[bytes]) -> dict[str, object]:
    note_witnesses(folder.parent, leaves, cosigned(leaves, "north"))
    return json.loads((folder / WITNESSES).read_text())


def forge(folder: Path, leaves: list[bytes], place: int) -> None:
    """Write a proof of another entry as that of the manifest's."""
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["cosignature"] = asdict(cosigned(leaves, "north")[0])
    fields["place"] = place
    (folder / WITNESSES).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "change",
    [
        of_another_run,
        of_no_log_with_it,
        of_a_cut_log,
        of_a_changed_time,
        with_another_key,
        with_no_digits,
        cut_short,
    ],
)
def test_no_other_co_signature_passes_for_one_of_this_run(kept: Path, change: Callable[[Path], None]) -> None:
    change(kept)
    assert witnesses(kept).ok is False


def test_repeated_key_counts_once(kept: Path) -> None:
    fields = noted(kept, log_with(entry_of(kept)))
    fields["witnesses"] = [*fields["witnesses"], *fields["witnesses"]]
    (kept / WITNESSES).write_text(json.dumps(fields))
    assert "is co-signed by 1:" in witnesses(kept).finding


# --- time stamps ----------------------------------------------------------------------------------------------------

CONFIG = """\
[req]
distinguished_name = name
[name]
[root]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign
[leaf]
basicConstraints = CA:false
extendedKeyUsage = critical, timeStamping
[tsa]
serial = serial
crypto_device = builtin
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
accuracy = secs:1
ess_cert_id_chain = no
tsa_name = no
"""


@dataclass(frozen=True)
class Tsa:
    """Authority for time stamps on this machine."""

    folder: Path
    url: str

    @property
    def root(self) -> Path:
        return self.folder / "root.pem"


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


def make_tsa(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tsa.cnf").write_text(CONFIG)
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "tsa.cnf"]
    openssl(folder, "req", "-x509", *new, "-keyout", "root.key", "-out", "root.pem", "-subj", "/CN=Root",
            "-extensions", "root", "-days", "3650")  # fmt: skip
    openssl(folder, "req", *new, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=TSA")
    openssl(folder, "x509", "-req", "-in", "leaf.csr", "-CA", "root.pem", "-CAkey", "root.key", "-out",
            "leaf.pem", "-days", "3650", "-extfile", "tsa.cnf", "-extensions", "leaf")  # fmt: skip
    (folder / "serial").write_text("01\n")


def answered(folder: Path, query: bytes) -> bytes:
    (folder / "query").write_bytes(query)
    openssl(folder, "ts", "-reply", "-config", "tsa.cnf", "-section", "tsa", "-queryfile", "query", "-signer",
            "leaf.pem", "-inkey", "leaf.key", "-out", "reply")  # fmt: skip
    return (folder / "reply").read_bytes()


@pytest.fixture(scope="module")
def tsa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tsa]:
    pytest.importorskip("rfc3161_client")
    folder = tmp_path_factory.mktemp("tsa")
    make_tsa(folder)

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["Content-Length"]))
            told = (folder / "replay").read_bytes() if self.path == "/replay" else answered(folder, query)
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()
            self.wfile.write(b"no stamp" if self.path == "/none" else told)

        def log_message(self, format: str, *arguments: object) -> None:
            del format, arguments

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Tsa(folder, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def time_stamp(folder: Path, trusted: Path | None) -> CheckLine:
    found = line(folder, "time stamp", Knowledge(time_stamps=trusted))
    assert found is not None
    return found


def test_a_run_is_stamped_and_its_time_is_checked_offline(
    kept: Path, tsa: Tsa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert line(kept, "time stamp", Knowledge()) is None
    assert time_stamp(kept, tsa.root).ok is False
    assert run(["report", "stamp", str(kept), "--tsa", tsa.url]) == 0
    at = capsys.readouterr().out.partition("manifest.tsr: ")[2][:25]
    found = time_stamp(kept, tsa.root)
    assert found.ok and found.finding.startswith(f"{MANIFEST} was there at {at}, by an authority in")
    own = time_stamp(
        kept, tsa.folder / "leaf.pem"
    )  # the authority's own certificate, without the one above it
    assert own.ok is False and "no certificate in" in own.finding
    assert time_stamp(kept, None).ok is None
    assert run(["verify", str(kept), "--tsa", str(tsa.root)]) == 0
    monkeypatch.setattr(time_stamp_module, "find_spec", lambda _: None)
    without = time_stamp(kept, tsa.root)
    assert without.ok is None and "fedveil[timestamps]" in without.finding


def test_a_stamp_of_another_text_or_another_authority_does_not_hold(
    kept: Path, tsa: Tsa, tmp_path: Path
) -> None:
    stamp(kept, tsa.url)
    good = (kept / TIME_STAMP).read_bytes()
    make_tsa(tmp_path / "stranger")
    assert time_stamp(kept, tmp_path / "stranger" / "root.pem").ok is False
    (kept / TIME_STAMP).write_bytes(answered(tmp_path / "stranger", (tsa.folder / "query").read_bytes()))
    assert time_stamp(kept, tsa.root).ok is False
    text = read_manifest(kept).text.encode()
    with pytest.raises(Refusal, match="does not hold"):
        time_of_stamp(good, text + b" ", tsa.root)
    for cut in (good[:-1], good + b"x", b"", good[: len(good) // 2]):
        (kept / TIME_STAMP).write_bytes(cut)
        assert time_stamp(kept, tsa.root).ok is False
    (kept / TIME_STAMP).write_bytes(good)
    assert time_stamp(kept, tsa.folder / "serial").ok is False  # no certificate


@pytest.mark.parametrize("path", ["/none", "/broken", "/replay", None])
def test_run_without_a_stamp_is_reported_in_a_sentence(kept: Path, tsa: Tsa, path: str | None) -> None:
    before = {each.name: each.read_bytes() for each in kept.iterdir()}
    (tsa.folder / "query").unlink(missing_ok=True)
    openssl(tsa.folder, "ts", "-query", "-data", "root.pem", "-sha256", "-cert", "-out", "query")
    (tsa.folder / "replay").write_bytes(answered(tsa.folder, (tsa.folder / "query").read_bytes()))
    url = "http://127.0.0.1:1" if path is None else f"{tsa.url}{path}"
    with pytest.raises(
        Refusal, match=r"no time stamp was had .*; the run stands without: fedveil report stamp"
    ):
        stamp(kept, url)
    assert {each.name: each.read_bytes() for each in kept.iterdir()} == before
    with pytest.raises(Refusal, match="is not an address of http or https"):
        stamp(kept, "file:///etc/passwd")


def test_server_notes_its_witnesses_and_loses_no_run_without_a_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rfc3161_client")
    monkeypatch.setattr("fedveil.links.cosigned_heads.WITNESS_SECONDS", 3600.0)  # on a slow machine
    hearts = SERVED["make_federation"](tmp_path)
    (tmp_path / "north.key").write_bytes(KEYS["north"].private_bytes_raw())
    program = (
        "import json, sys;from fedveil.privacy.witness import cosign_head;"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey as Key;"
        "head = json.load(sys.stdin)['head'];key = Key.from_private_bytes(open(sys.argv[1], 'rb').read());"
        "print(cosign_head(head['federation'], head['size'], head['root'], 9, key).to_json())"
    )
    command = shlex.join([sys.executable, "-c", program, str(tmp_path / "north.key")])
    monkeypatch.setenv("FEDVEIL_WITNESSES", command)
    monkeypatch.setenv("FEDVEIL_TSA", "http://127.0.0.1:1")
    reach = SERVED["reaching"](SERVED["Devices"](hearts / "clients"))
    asked = ("task=digits", "num_rounds=1", "batch_size=40", "privacy=record", "link.wait=0.3")
    assert serve(hearts / "server", asked, reach=reach) == 0
    folder = hearts / "server" / "runs" / "run-1"
    assert "no time stamp was had" in capsys.readouterr().err and not (folder / TIME_STAMP).exists()
    assert leaf_hash(read_entries(hearts / "server" / LOG)[-1]) == entry_of(folder)
    assert witnesses(folder, "north").ok
    assert os.stat(folder / WITNESSES).st_mode & 0o777 == 0o644
    monkeypatch.setenv("FEDVEIL_WITNESSES", "false")
    with pytest.raises(Refusal, match="exit code 1"):
        serve(hearts / "server", (*asked, "run=second"), reach=reach)
