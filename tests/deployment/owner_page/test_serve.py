"""The owner's page: who may read it and decide on it, what hostile requests get, and that it is usable by keys alone."""

import http.client
import json
import os
import re
import runpy
import socket
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.owner_desk import read_desk
from fedveil.deployment.device.owner_roles import FILE, read_roles, set_passphrase
from fedveil.deployment.owner_page import sessions, view
from fedveil.deployment.owner_page.serve import OwnerPage, OwnerServer, page_beside
from fedveil.evidence.live import listener
from fedveil.privacy.ledger.ledger import read_entries

FAULTS = Path(__file__).parents[2] / "faults"
MADE = runpy.run_path(str(FAULTS / "devices.py"))
APPROVALS = runpy.run_path(str(Path(__file__).parents[1] / "device" / "test_approvals.py"))
BROWSER = runpy.run_path(str(FAULTS / "browser.py"))
until = runpy.run_path(str(FAULTS / "patience.py"))["until"]
question, folder = APPROVALS["question"], APPROVALS["folder"]
code_of, device_of, in_the_clear = (MADE[name] for name in ("code_of", "device_of", "in_the_clear"))
SECONDS = 240.0
OWNERS, OFFICERS = "correct horse battery", "staple of the officer"
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclass
class Site:
    """A page that is served by a thread of this process, as a browser sees it."""

    page: OwnerPage
    port: int
    path: str

    def ask(
        self, path: str, method: str = "GET", body: str | bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as link:
            link.putrequest(method, path, skip_host=True)
            data = body.encode() if isinstance(body, str) else body
            common = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(data))}
            for name, value in {**common, **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
                for each in value.split("\n") if value else ():
                    link.putheader(name, each)
            link.endheaders(data)
            answer = link.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, named, answer.read().decode()

    def post(self, path: str, fields: dict[str, str], **headers: str) -> tuple[int, dict[str, str], str]:
        own = {
            "Origin": f"http://127.0.0.1:{self.port}",
            "Content_Type": "application/x-www-form-urlencoded",
            "Sec_Fetch_Site": "same-origin",
        }
        return self.ask(path, "POST", urllib.parse.urlencode(fields), **{**own, **headers})

    def form(self, request: str) -> dict[str, str]:
        """Return the fields of a form that refuses a request."""
        status, _, text = self.ask(f"{self.path}request/{request}")
        assert status == 200
        token = re.search(r'name="csrf" value="([^"]+)"', text)
        assert token is not None
        return {"csrf": token[1], "request": request, "verdict": "refused", "reason": "no purpose given"}


def opened(folder: Path) -> Iterator[Site]:
    with listener(0) as listens:
        page, port = OwnerPage(folder), listens.getsockname()[1]
        address = urllib.parse.urlsplit(page.address(port))
        server = OwnerServer(listens, page, os.getppid())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Site(page, port, address.path)
        finally:
            server.shutdown()
            thread.join(SECONDS)


@pytest.fixture
def device(folder: Path) -> Any:
    """A device at which a question waits whose reason is markup."""
    device = device_of(folder)
    code_of(device, question(why='Which <b>patients</b> & "who"?'))
    return device


@pytest.fixture
def site(device: Any) -> Iterator[Site]:
    yield from opened(device.bundle.folder)


@pytest.fixture
def locked(device: Any) -> Iterator[Site]:
    """A page with two roles."""
    set_passphrase(device.bundle.state, "owner", OWNERS)
    set_passphrase(device.bundle.state, "officer", OFFICERS)
    yield from opened(device.bundle.folder)


def waiting(site: Site) -> str:
    (request,) = read_desk(site.page.folder).waiting
    return request.id


def acts(device: Any) -> list[dict[str, Any]]:
    path = device.ledger.path
    entries = read_entries(path) if path.exists() else []
    return [json.loads(each.payload) for each in entries if each.kind == "owner's decision"]


# --- what it shows -------------------------------------------------------------------------------------------------


def test_page_shows_requests_the_policy_and_the_spending(site: Site, device: Any) -> None:
    code_of(device, in_the_clear())
    for request in read_desk(device.bundle.folder).waiting:
        if request.kind == "run":
            site.post(f"{site.path}decide", {**site.form(request.id), "verdict": "approved"})
    assert code_of(device, in_the_clear()) == 0
    status, headers, text = site.ask(site.path)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    words = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "What waits for you question labels" in words and "run spring: approved" in words
    assert "noise multiplier 3 at least 1" in words and "epochs in a round 1 at most" in words
    assert "epsilon 1.27 of 8 at delta 1e-05; 6.73 left" in words and "spring 1 1.27" in words
    assert "Which &lt;b&gt;patients&lt;/b&gt;" in text and "<b>" not in text
    assert site.ask(f"{site.path}watch")[1]["refresh"] == "10" and "refresh" not in headers


def test_page_shows_a_roster_that_waits(folder: Path) -> None:
    from fedveil.deployment.device.roster_changes import _wait
    from fedveil.privacy.secagg.roster_change import RosterChange

    policy = folder / "policy.toml"
    policy.write_text(policy.read_text().replace("approve_rosters = false", "approve_rosters = true"))
    device = device_of(folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")  # an old one counts as refused, and does not wait
    change = RosterChange(2, "ab" * 32, 1, 6, ("eve ff",), ("bob ee",), now)
    _wait(device.bundle.state, change, b"signed")
    text = view.overview(read_desk(folder), "owner", "token")
    assert "roster version 2" in text and "added: eve ff" in text and "removed: bob ee" in text


def test_page_has_no_secret_and_no_script(site: Site, device: Any) -> None:
    secrets = [each.read_bytes() for each in device.bundle.folder.glob("*.key")]
    assert secrets
    for path in ("", f"request/{waiting(site)}", "pause"):
        text = site.ask(f"{site.path}{path}")[2]
        assert site.path.strip("/").partition("/")[2] not in text  # the session is in the address alone
        assert "<script" not in text and "javascript:" not in text and not re.search(r"\son\w+=", text)
        assert not any(
            line in text for secret in secrets for line in secret.decode().split() if len(line) > 20
        )


# --- decisions -----------------------------------------------------------------------------------------------------


def test_refusal_on_the_page_reaches_the_device_and_its_ledger(site: Site, device: Any) -> None:
    status, headers, _ = site.post(f"{site.path}decide", site.form(waiting(site)))
    assert (status, headers["location"]) == (303, site.path)
    assert code_of(device, question(why='Which <b>patients</b> & "who"?')) == 1003
    (act,) = acts(device)
    assert (act["verdict"], act["name"], act["reason"]) == ("refused", "labels", "no purpose given")
    assert "no purpose given" in site.ask(site.path)[2]


def test_pause_on_the_page_holds_the_device(site: Site, device: Any) -> None:
    token = site.form(waiting(site))["csrf"]
    fields = {"csrf": token, "request": "", "verdict": "paused", "reason": "audit"}
    assert site.post(f"{site.path}decide", fields)[0] == 303
    assert code_of(device, in_the_clear()) == 1013
    status, _, text = site.post(f"{site.path}decide", fields)
    assert status == 422 and "paused already" in text


@pytest.mark.parametrize(
    "change",
    [{"reason": ""}, {"reason": "x" * 501}, {"request": "0" * 12}, {"request": "../../policy.toml"}],
    ids=["no reason", "long reason", "no request", "path"],
)
def test_form_that_makes_no_sense_decides_nothing(site: Site, device: Any, change: dict[str, str]) -> None:
    status, _, text = site.post(f"{site.path}decide", {**site.form(waiting(site)), **change})
    assert status == 422 and "Not done" in text and not acts(device)


# --- hostile requests ----------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[dict[str, str], int]] = {
    "another origin": ({"Origin": "http://evil.example"}, 403),
    "another port of this machine": ({"Origin": "http://127.0.0.1:1"}, 403),
    "no origin": ({"Origin": ""}, 403),
    "two origins": ({"Origin": "http://127.0.0.1:{port}\nhttp://evil.example"}, 403),
    "a null origin": ({"Origin": "null"}, 403),
    "another site": ({"Sec_Fetch_Site": "cross-site"}, 403),
    "the same site at another port": ({"Sec_Fetch_Site": "same-site"}, 403),
    "a rebound name": ({"Host": "evil.example"}, 421),
    "plain text": ({"Content_Type": "text/plain"}, 415),
    "JSON": ({"Content_Type": "application/json"}, 415),
    "no length": ({"Content_Length": ""}, 413),
    "a negative length": ({"Content_Length": "-1"}, 413),
    "a large form": ({"Content_Length": "9000"}, 413),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_form_of_another_site_decides_nothing(site: Site, device: Any, kind: str) -> None:
    headers, expected = HOSTILE[kind]
    formed = {name: value.format(port=site.port) for name, value in headers.items()}
    status, _, text = site.post(f"{site.path}decide", site.form(waiting(site)), **formed)
    assert status == expected and "<html" not in text and not acts(device)


@pytest.mark.parametrize("token", ["", "x" * 43, "é"])
def test_form_without_its_token_decides_nothing(site: Site, device: Any, token: str) -> None:
    fields = {**site.form(waiting(site)), "csrf": token}
    assert site.post(f"{site.path}decide", fields)[0] == 403
    del fields["csrf"]
    assert site.post(f"{site.path}decide", fields)[0] == 403 and not acts(device)


def test_token_of_another_session_is_refused(locked: Site, device: Any) -> None:
    first, second = (locked.page.sessions.open("owner", has_passphrase=True) for _ in range(2))
    fields = {"csrf": first.csrf, "request": waiting(locked), "verdict": "refused", "reason": "no"}
    assert locked.post(f"/s/{second.secret}/decide", fields)[0] == 403
    assert not acts(device)


@pytest.mark.parametrize(
    "body",
    [b"\xff=\xfe", b"csrf", b"a=1&a=2", b"&".join(b"f%d=1" % n for n in range(9)), b"", b"\0" * 50],
    ids=["no text", "no value", "twice", "many", "empty", "zeros"],
)
def test_malformed_form_is_answered_in_a_line(site: Site, device: Any, body: bytes) -> None:
    headers = {"Origin": f"http://127.0.0.1:{site.port}", "Content_Type": "application/x-www-form-urlencoded"}
    status, _, text = site.ask(f"{site.path}decide", "POST", body, **headers)
    assert status in (400, 403) and "Traceback" not in text and not acts(device)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/s/",
        "/s//",
        "/s/wrong/",
        "/decide",
        "/roles.json",
        "/s/../policy.toml",
        "/?",
        "http://127.0.0.1/",
    ],
)
def test_page_needs_the_secret_of_its_session(site: Site, path: str) -> None:
    status, _, text = site.ask(path)
    assert status == 404 and "labels" not in text
    assert site.ask(site.path.rstrip("/"))[0] == 404


@pytest.mark.parametrize(
    "path", ["policy.toml", "request/", "request/a/b", "request/%2e%2e", "../", "decide"]
)
def test_session_has_no_other_path(site: Site, path: str) -> None:
    assert site.ask(f"{site.path}{path}")[0] in (404, 422)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_not_answered(site: Site, method: str) -> None:
    assert site.ask(site.path, method)[0] in (405, 501)


def test_browser_loads_nothing_and_forms_go_to_the_page_alone(site: Site) -> None:
    for path, method in ((site.path, "GET"), (site.path, "HEAD"), ("/nothing", "GET"), (site.path, "POST")):
        headers = site.ask(path, method)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-") and "script" not in policy
        assert (
            "unsafe" not in policy and "form-action 'self'" in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers and "set-cookie" not in headers
        assert "python" not in headers["server"].lower()


def test_reading_request_under_another_name_is_refused(site: Site) -> None:
    for host in (
        "evil.example",
        f"127.0.0.1:{site.port}.evil.example",
        f"127.0.0.1:{site.port}\nevil.example",
        "",
    ):
        status, _, text = site.ask(site.path, Host=host)
        assert status == 421 and "labels" not in text
    assert site.ask(site.path, Host=f"localhost:{site.port}")[0] == 200


def test_invalid_request_is_answered_and_the_page_goes_on(site: Site) -> None:
    for sent in (
        b"\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET " + b"x" * 70_000 + b"\r\n\r\n",
        b"\xff\xfe\0\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", site.port), timeout=SECONDS) as link:
            link.sendall(sent)
            link.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda link=link: link.recv(1 << 16), b""))
        assert b"Traceback" not in said and b"<html" not in said
    assert site.ask(site.path)[0] == 200


# --- roles ---------------------------------------------------------------------------------------------------------


def signed_in(site: Site, role: str, passphrase: str) -> tuple[int, str]:
    status, headers, _ = site.post("/sign-in", {"role": role, "passphrase": passphrase})
    return status, headers.get("location", "")


def test_page_with_roles_shows_nothing_before_a_passphrase(locked: Site, device: Any) -> None:
    assert locked.path == "/"
    status, _, text = locked.ask("/")
    assert status == 200 and "Passphrase" in text and "labels" not in text
    for role, passphrase in (("owner", OFFICERS), ("officer", OWNERS), ("nobody", OWNERS), ("owner", "")):
        assert signed_in(locked, role, passphrase) == (403, "")
    status, path = signed_in(locked, "officer", OFFICERS)
    assert status == 303 and "labels" in locked.ask(path)[2]
    officers = Site(locked.page, locked.port, path)
    assert officers.post(f"{path}decide", officers.form(waiting(locked)))[0] == 303
    assert [act["role"] for act in acts(device)] == ["officer"]


def test_only_the_officer_takes_back_the_officers_refusal(locked: Site, device: Any) -> None:
    (_, owners), (_, officers) = signed_in(locked, "owner", OWNERS), signed_in(locked, "officer", OFFICERS)
    request, sites = waiting(locked), [Site(locked.page, locked.port, path) for path in (owners, officers)]
    owner, officer = ((each, each.form(request)) for each in sites)
    assert officer[0].post(f"{officers}decide", officer[1])[0] == 303
    status, _, text = owner[0].post(f"{owners}decide", {**owner[1], "verdict": "approved"})
    assert status == 422 and "the officer decided" in text and len(acts(device)) == 1
    assert officer[0].post(f"{officers}decide", {**officer[1], "verdict": "approved"})[0] == 303


def test_signing_out_and_age_end_a_session(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = signed_in(locked, "owner", OWNERS)
    site = Site(locked.page, locked.port, path)
    assert site.post(f"{path}sign-out", {"csrf": site.form(waiting(site))["csrf"]})[0] == 303
    assert site.ask(path)[0] == 404
    monkeypatch.setattr(sessions, "LIFE_SECONDS", 0.0)
    _, path = signed_in(locked, "owner", OWNERS)
    assert site.ask(path)[0] == 404


def test_first_passphrase_ends_the_session_without_one(site: Site) -> None:
    assert site.ask(site.path)[0] == 200
    fields = site.form(waiting(site))
    set_passphrase(site.page.state, "officer", OFFICERS)
    assert site.ask(site.path)[0] == 404 and site.post(f"{site.path}decide", fields)[0] == 404
    (site.page.state / FILE).write_bytes(b"")
    assert site.ask(site.path)[0] == 404


def test_wrong_passphrases_lock_the_sign_in_for_a_while(
    locked: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(read_roles(locked.page.state)), "opens", lambda self, role, text: text == OWNERS)
    for _ in range(sessions.MAX_FAILURES):
        assert signed_in(locked, "owner", "wrong")[0] == 403
    assert signed_in(locked, "owner", OWNERS)[0] == 429
    monkeypatch.setattr(locked.page.sessions, "_locked_until", 0.0)
    assert signed_in(locked, "owner", OWNERS)[0] == 303


def test_damaged_roles_let_nobody_in(locked: Site) -> None:
    (locked.page.state / FILE).write_bytes(b"{}}")
    assert locked.ask("/")[0] == 503
    assert locked.post("/sign-in", {"role": "owner", "passphrase": OWNERS})[0] == 422
    with pytest.raises(Refusal, match="nobody may decide"):
        OwnerPage(locked.page.folder).address(1)


def test_passphrases_are_stored_as_keys_for_their_owner_alone(device: Any, commands: Any) -> None:
    folder, state = str(device.bundle.folder), device.bundle.state
    command = ("client", "passphrase", folder, "--role", "officer")
    code, said = commands.run(*command)
    assert code == 2 and "no terminal" in said.err
    os.environ["FEDVEIL_PASSPHRASE"] = "short"
    try:
        code, said = commands.run(*command)
        assert code == 2 and "12 to 200 characters" in said.err and "short" not in said.err
        os.environ["FEDVEIL_PASSPHRASE"] = OFFICERS
        assert commands.run(*command)[0] == 0
        decision = ("client", "pause", folder, "--reason", "audit")
        code, said = commands.run(*decision)
        assert code == 2 and "has another passphrase, or none yet" in said.err
        assert commands.run(*decision, "--role", "officer")[0] == 0
    finally:
        del os.environ["FEDVEIL_PASSPHRASE"]
    path = state / FILE
    assert path.stat().st_mode & 0o777 == 0o600 and OFFICERS not in path.read_text()


# --- the processes -------------------------------------------------------------------------------------------------


def test_page_of_an_agent_is_a_process_without_its_secrets(
    device: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDVEIL_PASSPHRASE", "of the keys")
    said = ""

    def address() -> str | None:
        nonlocal said
        said += capfd.readouterr().err
        found = re.search(r"page: (http://127\.0\.0\.1:\d+/s/\S+/)", said)
        return found and found[1]

    with page_beside(device.bundle.folder, 0):
        until(address, lambda: said)
        parts = urllib.parse.urlsplit(str(address()))
        assert parts.port is not None
        site = Site(OwnerPage(device.bundle.folder), parts.port, parts.path)
        assert "labels" in site.ask(parts.path)[2]
        (pid,) = subprocess.run(
            ["pgrep", "-P", str(os.getpid()), "-f", "owner_page"], capture_output=True, text=True, check=True
        ).stdout.split()
        assert b"FEDVEIL" not in Path(f"/proc/{pid}/environ").read_bytes()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", parts.port), timeout=1)


def test_occupied_port_is_refused_before_the_client_starts(device: Any, commands: Any) -> None:
    with listener(0) as listens:
        port = str(listens.getsockname()[1])
        for verb in ("page", "start"):
            code, said = commands.run("client", verb, str(device.bundle.folder), "--page-port", port)
            assert code == 2 and f"--page-port={port}" in said.err


# --- in a real browser ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER["CHROMIUM"] is None, reason="Chromium is not installed")
def test_officer_refuses_a_question_by_keys_alone(locked: Site, device: Any, tmp_path: Path) -> None:
    with BROWSER["browsing"](tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{locked.port}/")
        assert browser.complaints == []
        browser.tab_to("Role")
        browser.press("ArrowDown")
        browser.tab_to("Passphrase")
        browser.type(OFFICERS)
        browser.press("Enter", loads=True)
        assert "signed in as officer" in browser.text and browser.complaints == []
        told = browser.roles()
        for role, name in (("main", ""), ("heading", "What waits for you"), ("heading", "question labels")):
            assert (role, name) in told, told
        browser.tab_to("Decide on question labels")
        browser.press("Enter", loads=True)
        # The officer sees why it was asked, as text.
        assert 'Which <b>patients</b> & "who"?' in browser.text
        assert ("cell", 'Which <b>patients</b> & "who"?') in browser.roles()
        browser.tab_to("Approve these terms")
        browser.press("ArrowDown")
        assert browser.focused() == "Refuse these terms"
        browser.tab_to("Reason, which goes on your ledger")
        browser.type("it names patients")
        browser.press("Enter", loads=True)
        assert "it names patients" in browser.text and "refused" in browser.text
        browser.tab_to("Sign out")
        browser.press("Enter", loads=True)
        assert browser.url == f"http://127.0.0.1:{locked.port}/"
    (act,) = acts(device)
    assert (act["verdict"], act["role"], act["reason"]) == ("refused", "officer", "it names patients")
    assert code_of(device, question(why='Which <b>patients</b> & "who"?')) == 1003
