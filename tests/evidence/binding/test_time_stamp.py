"""Time stamps of manifests, by an authority of OpenSSL's."""

import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from shared.bundles import line

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.evidence.binding import time_stamp as time_stamp_module
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.time_stamp import stamp, time_of_stamp
from fedveil.evidence.binding.verify import CheckLine
from fedveil.run.files import MANIFEST, TIME_STAMP
from fedveil.run.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


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
