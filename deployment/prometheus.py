"""Status of a server as numbers in Prometheus' text format, on the loopback address unless its operator names another."""

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ..base.open_files import Listener
from ..base.refusal import Refusal
from ..evidence.live import LOOPBACK, is_local_request

PATH = "/metrics"
ANSWER_SECONDS = 5.0
REASON_COUNTS = (
    ("dropped", "Invited clients that were not added."),
    ("turned_away", "Connections and replies refused."),
)


def text_of(status: Mapping[str, Any]) -> str:
    """Return the status in Prometheus' text format."""
    registry: Any = SimpleNamespace(collect=lambda: _families(status))
    return generate_latest(registry).decode()


def _families(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the metrics of a status."""
    yield _family(GaugeMetricFamily, "state", "State of the run.", _by({status["state"]: 1}), ("state",))
    yield _family(GaugeMetricFamily, "round", "The last finished round.", {(): status["round"]})
    yield _family(GaugeMetricFamily, "rounds_planned", "Rounds of the run.", {(): status["num_rounds"]})
    yield _family(
        CounterMetricFamily, "rounds_abandoned", "Rounds that released nothing.", {(): status["abandoned"]}
    )
    yield _family(
        CounterMetricFamily, "rounds_untrue", "Rounds with a sum that cannot be true.", {(): status["untrue"]}
    )
    yield _family(
        CounterMetricFamily, "invited", "Clients that rounds invited, or planned to.", {(): status["invited"]}
    )
    text = "Seconds of the last round, with the wait for its clients."
    yield _family(GaugeMetricFamily, "round_seconds", text, {(): status["round_seconds"]})
    for key, text in (
        ("invited", "Clients that the last round invited."),
        ("replies", "Those that it added."),
    ):
        yield _family(GaugeMetricFamily, f"round_{key}", text, {(): status[f"last_{key}"]})
    text = "Of the released model: on public held-out examples, or means of an evaluation at the clients."
    yield _family(GaugeMetricFamily, "figure", text, _by(status["figures"]), ("figure",))
    if status["bytes"] is not None:  # None where counts would show who takes part
        yield _family(CounterMetricFamily, "replies", "Replies that were added.", {(): status["replies"]})
        for name, text in REASON_COUNTS:
            yield _family(CounterMetricFamily, name, text, _by(status[name]), ("reason",))
        text = "Bytes from the server to clients (down) and back, by purpose."
        yield _family(CounterMetricFamily, "bytes", text, _carried(status["bytes"]), ("direction", "purpose"))
    here = sum(each["since"] is not None for each in status["clients"])
    yield _family(GaugeMetricFamily, "clients_connected", "Clients that are connected.", {(): here})
    yield _family(GaugeMetricFamily, "clients", "Clients of the roster.", {(): len(status["clients"])})
    for key in ("spent", "target"):
        epsilons = {(row["unit"],): row[key] for row in status["privacy"]}
        yield _family(GaugeMetricFamily, f"epsilon_{key}", f"Epsilon, {key}.", epsilons, ("unit",))
    if (audit := status.get("audit")) is not None:
        alarms = Counter((each["level"], each["test"]) for each in audit["alarms"])
        yield _family(CounterMetricFamily, "audit_alarms", "Alarms of the audit.", alarms, ("level", "test"))
        text = "Of what the audit's checks saw in the last round."
        yield _family(GaugeMetricFamily, "audit_p_value", text, _by(audit["p_values"]), ("test",))


def _family(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    text: str,
    samples: Mapping[tuple[str, ...], float | str | None],
    labels: tuple[str, ...] = (),
) -> Metric:
    """Return a metric with its samples, by the values of its labels.

    Unknown samples are left out. An epsilon may be the word "infinity".
    """
    family = kind(f"fedveil_{name}", text, labels=labels)
    for values, sample in sorted(samples.items()):
        if sample is not None:
            family.add_metric(values, float(sample))
    return family


def _by(counts: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    """Return samples of a metric with one label."""
    return {(name,): count for name, count in counts.items()}


def _carried(by_direction: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, ...], float]:
    """Return samples of bytes by direction and purpose."""
    return {(way, purpose): size for way, sizes in by_direction.items() for purpose, size in sizes.items()}


@contextmanager
def serving(
    port: int | None, status: Callable[[], Mapping[str, Any]], address: str = LOOPBACK
) -> Generator[None]:
    """Answer `GET /metrics` within the context.

    Args:
      port: nothing is served where it is None.
      status: returns the server's status.
      address: on which the port is opened; on the loopback address, a request must also name this machine as its host.

    Raises:
      Refusal: the port is taken, or the address is not one of this machine.
    """
    if port is None:
        yield
        return

    class Answer(BaseHTTPRequestHandler):
        timeout = ANSWER_SECONDS

        def do_GET(self) -> None:
            if address == LOOPBACK and not is_local_request(self.headers):
                self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
                return
            if self.path != PATH:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = text_of(status()).encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: requests for numbers are not events."""

    try:
        server = ThreadingHTTPServer((address, port), Answer)
    except OSError as error:
        remedy = f"cannot be listened on ({error.strerror}); choose another port or metrics_address"
        raise Refusal("metrics_port", f"{address}:{port}", remedy) from error
    server.socket = Listener(fileno=server.socket.detach())
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="prometheus", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
