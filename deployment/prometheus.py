"""Status of a server as numbers in Prometheus' text format, on the loopback address alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..links.open_files import Listener
from ..privacy.refusal import Refusal

LOOPBACK = "127.0.0.1"
PATH = "/metrics"
CONTENT = "text/plain; version=0.0.4; charset=utf-8"
ANSWER_SECONDS = 5.0
PLAIN = ("round", "num_rounds", "invited", "replies", "abandoned", "untrue")
COUNTED = (
    ("dropped", "Invited clients that were not added.", "reason"),
    ("turned_away", "Connections and replies refused.", "reason"),
)

Sample = tuple[dict[str, str], float]


def text_of(status: Mapping[str, Any]) -> str:
    """Return the status as Prometheus reads it."""
    blocks = [
        "\n".join(
            [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(_line(name, each) for each in samples)]
        )
        for name, kind, text, samples in _families(status)
    ]
    return "\n".join(blocks) + "\n"


def _families(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Sequence[Sample]]]:
    here = sum(each["since"] is not None for each in status["clients"])
    plain: dict[str, list[Sample]] = {
        name: [({}, float(status[name]))] for name in PLAIN if status[name] is not None
    }
    yield "fedveil_round", "gauge", "The last finished round.", plain["round"]
    yield "fedveil_rounds_planned", "gauge", "Rounds of the run.", plain["num_rounds"]
    yield "fedveil_rounds_abandoned_total", "counter", "Rounds that released nothing.", plain["abandoned"]
    yield "fedveil_rounds_untrue_total", "counter", "Rounds with a sum that cannot be true.", plain["untrue"]
    yield "fedveil_invited_total", "counter", "Clients that rounds invited, or planned to.", plain["invited"]
    if status["bytes"] is not None:  # a trusted server keeps who takes part to its operator, from the first
        yield "fedveil_replies_total", "counter", "Replies that were added.", plain["replies"]
        for name, text, label in COUNTED:
            yield f"fedveil_{name}_total", "counter", text, _by(label, status[name])
        text = "Bytes from the server to clients (down) and back, by purpose."
        yield "fedveil_bytes_total", "counter", text, _carried(status["bytes"])
    yield "fedveil_clients_connected", "gauge", "Clients that are connected.", _one(here)
    yield "fedveil_clients", "gauge", "Clients of the roster.", _one(len(status["clients"]))
    for name, key in (("fedveil_epsilon_spent", "spent"), ("fedveil_epsilon_target", "target")):
        known: list[Sample] = [
            ({"unit": row["unit"]}, _number(row[key])) for row in status["privacy"] if row[key] is not None
        ]
        yield name, "gauge", f"Epsilon, {key}.", known
    if status.get("audit") is not None:
        yield from _of_audit(status["audit"])


def _of_audit(audit: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Sequence[Sample]]]:
    alarms = Counter((each["level"], each["test"]) for each in audit["alarms"])
    counted = [({"level": level, "test": test}, float(n)) for (level, test), n in sorted(alarms.items())]
    yield "fedveil_audit_alarms_total", "counter", "Alarms of the audit.", counted
    text = "Of what the audit's checks saw in the last round."
    yield "fedveil_audit_p_value", "gauge", text, _by("test", audit["p_values"])


def _one(count: int) -> list[Sample]:
    return [({}, float(count))]


def _by(label: str, counts: Mapping[str, float]) -> list[Sample]:
    return [({label: name}, float(count)) for name, count in sorted(counts.items())]


def _carried(by_purpose: Mapping[str, Mapping[str, int]]) -> list[Sample]:
    return [
        ({"direction": direction, "purpose": purpose}, float(size))
        for direction, sizes in sorted(by_purpose.items())
        for purpose, size in sorted(sizes.items())
    ]


def _number(value: object) -> float:
    return float(str(value).replace("infinity", "inf"))


def _line(name: str, sample: Sample) -> str:
    labels, value = sample
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    shown = "+Inf" if value == float("inf") else f"{value:.17g}"
    return f"{name}{{{inside}}} {shown}" if inside else f"{name} {shown}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


@contextmanager
def serving(port: int | None, status: Callable[[], Mapping[str, Any]]) -> Generator[None]:
    """Answer `GET /metrics` on 127.0.0.1 as long as the context lasts.

    Args:
      port: to listen on; nothing is served where it is None.
      status: returns what is told.

    Raises:
      Refusal: the port is taken.
    """
    if port is None:
        yield
        return

    class Answer(BaseHTTPRequestHandler):
        timeout = ANSWER_SECONDS

        def do_GET(self) -> None:
            if self.path != PATH:
                self.send_error(404)
                return
            body = text_of(status()).encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: who asks for numbers is no event."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Answer)
    except OSError as error:
        raise Refusal(
            "metrics_port", port, f"cannot be listened on ({error.strerror}); give another"
        ) from error
    server.socket = Listener(fileno=server.socket.detach())
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="prometheus", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
