"""Page of a run while it goes on: who may read it, what it is made of, and that it ends with the run."""

import http.client
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shared.reports import texts_of

from fedveil.base.refusal import Refusal
from fedveil.evidence import live
from fedveil.evidence.commands import commands_of
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.live import listener
from fedveil.evidence.live_page import serving
from fedveil.evidence.page import page_of
from fedveil.run import run as running
from fedveil.run.run_files import read_run

until = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "patience.py"))["until"]
KEPT = Path(__file__).parents[1] / "fixtures" / "reported_run"
SECONDS = 240.0


def asked(
    port: int, path: str = "/", method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as link:
        link.putrequest(method, path, skip_host=True)
        for each in (f"127.0.0.1:{port}",) if host is None else host.split("\n") if host else ():
            link.putheader("Host", each)
        link.endheaders()
        answer = link.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read().decode()


def open_at(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on, with files that are its operator's alone."""
    ignored = shutil.ignore_patterns("golden", "result.json")
    run = Path(shutil.copytree(KEPT, tmp_path_factory.mktemp("live") / "run", ignore=ignored))
    for name in ("operator.jsonl", "checkpoint.safetensors", "audit.npy", "clients.log"):
        (run / name).write_bytes(b'{"round": 1, "invited": 31337, "replies": 31337}\n')
    return run


def served(folder: Path, owner: int) -> tuple[subprocess.Popen[bytes], int]:
    """Return the process that serves a folder for another process, and its port."""
    with listener(0) as listens:
        return serving(listens, folder, owner), listens.getsockname()[1]


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    process, found = served(folder, os.getpid())
    yield found
    process.terminate()
    assert process.wait(SECONDS) == -signal.SIGTERM
    assert not open_at(found)


def test_live_page_is_the_report_of_the_folder(folder: Path, port: int) -> None:
    status, headers, text = asked(port, "/report.json")
    assert (status, headers["content-type"]) == (200, "application/json; charset=utf-8")
    run, made = read_run(folder), json.loads(text)["run"]["as_of"]
    assert text == to_json(report_of(run, commands_of(run), as_of=made))
    status, headers, page = asked(port)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    shown = texts_of(page)
    later = f"{made[:11]}{shown['/run/as_of']}{made[19:]}"  # it may be made anew between the two requests
    assert page == page_of(report_of(run, commands_of(run), as_of=later))
    assert shown["/run/status"] == "running" and "chip not-ended" not in page and "no value is final" in page


def test_page_is_cached_for_a_bounded_time_however_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, made = [0.0], list[float]()
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: now[0]))

    def slow() -> dict[str, bytes]:
        made.append(now[0])
        now[0] += 60.0
        return {"/": b""}

    page = live.FolderPage(tmp_path)
    monkeypatch.setattr(page, "_make", slow)
    for _ in range(1000):
        page.texts()
        now[0] += 1.0
    assert all(60.0 <= later - before <= 60.0 + 16.0 for before, later in pairwise(made)) and len(made) > 10


def test_it_tells_nothing_that_is_the_operators(port: int) -> None:
    for path in ("/", "/report.json"):
        assert "31337" not in asked(port, path)[2]


def test_a_browser_loads_nothing_else_and_gives_it_to_no_other_site(port: int) -> None:
    for path, method in (("/", "GET"), ("/", "HEAD"), ("/nothing", "GET")):
        headers = asked(port, path, method)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store" and "access-control-allow-origin" not in headers
        assert int(headers["refresh"]) >= 5 and "python" not in headers["server"].lower()


def test_request_under_another_name_is_refused(port: int) -> None:
    """A name that was rebound to this machine comes as the host of a page from elsewhere."""
    for tunnel in (port, port + 1):
        assert asked(port, host=f"LOCALHOST:{tunnel}")[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1:{port}.evil.example",
        f"127.0.0.1:{port}\nevil.example",
        "",
    ):
        status, _, said = asked(port, host=host)
        assert status == 421 and "<html" not in said, host


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_nothing_but_reading_is_answered(port: int, method: str) -> None:
    status, _, said = asked(port, method=method)
    assert status in (405, 501) and "<html" not in said


def test_a_head_has_no_body(port: int) -> None:
    status, headers, said = asked(port, method="HEAD")
    assert status == 200 and said == "" and int(headers["content-length"]) > 10_000


@pytest.mark.parametrize(
    "path",
    [
        "/report.html",
        "/operator.jsonl",
        "/../operator.jsonl",
        "/report.json/",
        "/?",
        "/%2e%2e/ledger",
        "http://127.0.0.1/",
    ],
)
def test_there_is_no_other_path(port: int, path: str) -> None:
    status, _, said = asked(port, path)
    assert status == 404 and said == "Not Found\n"


def test_invalid_request_is_answered_in_a_line(port: int) -> None:
    for sent in (
        b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"x" * 70_000 + b"\r\n\r\n",
        b"\xff\xfe \x00\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as link:
            link.sendall(sent)
            link.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda link=link: link.recv(1 << 16), b""))
        assert b"Traceback" not in said and b"<html" not in said
    assert asked(port)[0] == 200


def test_run_before_its_start_has_no_page(tmp_path: Path) -> None:
    process, port = served(tmp_path, os.getpid())
    try:
        status, headers, said = asked(port)
        assert status == 503 and "the page is not available" in said and "refresh" in headers
    finally:
        process.terminate()
        process.wait(SECONDS)


def test_it_ends_with_the_process_of_the_run(tmp_path: Path) -> None:
    process, port = served(tmp_path, owner=1)
    assert process.wait(SECONDS) == 0 and not open_at(port)


# --- where it listens ---------------------------------------------------------------------------------------------


def test_it_listens_on_the_loopback_address_alone() -> None:
    with listener(0) as listens:
        assert listens.getsockname()[0] == "127.0.0.1"
        assert not listens.get_inheritable()


def test_occupied_port_is_refused() -> None:
    with listener(0) as listens, pytest.raises(Refusal, match=r"--page-port=.*cannot be listened on"):
        listener(listens.getsockname()[1])


# --- the commands -------------------------------------------------------------------------------------------------

LONG = ("task=digits", "num_rounds=400", "privacy.target_epsilon=null", "privacy.noise_multiplier=1")
LOOSE = ("privacy.allow_large_delta=true", "task.num_clients=20", "batch_size=40", "checkpoint_every=1000")


def port_said(said: str) -> int | None:
    found = re.search(r"page: http://127\.0\.0\.1:(\d+)/ for the duration of the run", said)
    return int(found[1]) if found else None


def slowed() -> None:
    """Let each round of this process take a while, in which somebody may look."""
    true = running.keep

    def slow(*given: Any) -> None:
        true(*given)
        time.sleep(0.5)

    running.keep = slow


def test_a_simulation_shows_its_page_until_it_ends(tmp_path: Path, commands: Any) -> None:
    run = tmp_path / "run"
    command = commands.start(
        "simulate", "--page", "--json", *LONG, *LOOSE, f"hydra.run.dir={run}", first=slowed
    )
    try:
        until(lambda: command.err_file.exists() and port_said(command.err))
        port = port_said(command.err)
        assert port is not None
        until(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text()) > 500)
        report = json.loads(asked(port, "/report.json")[2])
        assert report["run"]["status"] == "running" and report["run"]["rounds_completed"] > 0
        assert report["cost"]["answers"]["public"] is False  # of a trusted server, as in every report
    finally:
        command.signal(signal.SIGINT)
        assert command.wait() == 130
    until(lambda: not open_at(port))
    assert len(command.out.splitlines()) == 1 and json.loads(command.out)["status"] == "interrupted"


def test_occupied_port_is_refused_before_anything_is_spent(tmp_path: Path, commands: Any) -> None:
    run = tmp_path / "run"
    with listener(0) as listens:
        port = str(listens.getsockname()[1])
        code, said = commands.run("simulate", "--page-port", port, *LONG, f"hydra.run.dir={run}")
        assert code == 2 and f"--page-port={port}" in said.err and not run.exists()
        code, said = commands.run("server", str(tmp_path), "--page-port", port, "task=digits")
        assert code == 2 and f"--page-port={port}" in said.err
    code, said = commands.run("simulate", "--page-port", "80", *LONG)
    assert code == 2 and "80" in said.err and not (tmp_path / "runs").exists()


def test_a_sweep_has_no_page(tmp_path: Path, commands: Any) -> None:
    code, said = commands.run(
        "simulate", "-m", "--page", "task=digits", "seed=0,1", f"hydra.sweep.dir={tmp_path / 's'}"
    )
    assert code == 2 and "one page shows one run" in said.err and not (tmp_path / "s").exists()


@pytest.mark.campaign
def test_server_of_real_devices_shows_its_page_and_their_signatures(tmp_path: Path) -> None:
    served_by = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
    with served_by["serving"](served_by["Served"], tmp_path) as world:
        bundle = world.hearts / "server"
        loose = ("privacy.target_epsilon=20", "privacy.allow_large_delta=true", "link.wait=120")
        masked = (
            "task=digits",
            "privacy=client_distributed",
            "num_rounds=4",
            *loose,
            "privacy.target_epsilon=9",
        )
        asked_for = ("ask", "count", "--name", "rows", "--records", "400", "--noise-multiplier", "2")
        question = world.start(
            *asked_for, "--server", bundle, "task=digits", "privacy=client_distributed", *loose
        )
        assert question.wait() == 0, question.said
        world.clients["boston"].kill()  # so that the run waits, and somebody can look
        all_of_them = ("link.clients=1.0", "run=shown", "--page", "--accept-vacuous")
        server = world.start("server", bundle, *masked, *all_of_them)
        until(lambda: port_said(server.said) or not server.alive)
        port = port_said(server.said)
        assert port is not None, server.said
        page = asked(port)[2]
        assert "real clients" in page and "Devices give receipts when the run ends." in page
        told = json.loads(asked(port, "/report.json")[2])
        assert [each["name"] for each in told["answers"]] == ["rows"] and told["answers"][0]["on_this_ledger"]
        world.client("boston")
        assert server.wait() == 0, server.said
        until(lambda: not open_at(port))
        run = bundle / "runs" / "shown"
        report = report_of(read_run(run))
        wanted = {"public": True, "ended": True, "given": 5, "members": 5, "of_this_run": True}
        assert report["receipts"] == wanted
        if kept := os.environ.get("FEDVEIL_KEEP_PAGE"):  # to look at it
            Path(kept).write_text(page_of(report))
