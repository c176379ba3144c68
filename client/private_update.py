"""Client's half of the private sum, as a Flower mod: add it to any ClientApp that trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..messages import wire
from ..messages.client_settings import TRAIN_LOSS
from ..messages.flower_adapter import records_of
from ..privacy.mechanisms.compression import compress
from ..privacy.mechanisms.private_sum import Arrays, Contribution, NotFinite, encode
from ..privacy.mechanisms.sum_spec import SumSpec

if TYPE_CHECKING:
    from ..privacy.secagg.transcript import AttemptTerms

# Records of an app's reply, which stay at the client: they are encoded into its vector. `SUM_PART` is its part of a sum over
# records, or the update of a client that has trained in a stack, by name of the model's arrays.
SUM_PART, METRICS = "fedveil.summed", "metrics"
SEGMENTS_RECORD = "fedveil.segments"  # the client's values of the segments that have a shape, by name

T = TypeVar("T")

logger = logging.getLogger("fedveil.client")


class NotTrained(Exception):
    """Failure for which a client answers with an error code; one that is not in `DROP_REASONS` becomes `FAILED`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code if code in wire.DROP_REASONS else wire.FAILED


# Charges a device's own ledger: entered before the app is called, left once the vector is made. It takes the
# instruction and, in secure aggregation, the attempt's terms, and raises NotTrained if training is not allowed.
Charge = Callable[[RecordDict, "AttemptTerms | None"], AbstractContextManager[None]]


def uncharged(content: RecordDict, terms: AttemptTerms | None) -> AbstractContextManager[None]:
    """Charge nothing: the population's ledger at the server is charged for all clients."""
    return nullcontext()


def private_update(
    message: Message, context: Context, call_next: ClientAppCallable, charge: Charge = uncharged
) -> Message:
    """Replace a client's reply by its clipped vector on the lattice.

    The update is the arrays that the app returns minus the arrays it received, matched by name. The example count and
    the metrics with a bound from the server are part of the same vector. Everything else stays at the client: other
    metrics, configuration records, error texts. An instruction outside a private sum is refused, so that an evaluation
    with unaccounted metrics is not sent either.

    Args:
      message: the instruction.
      context: Flower's, of this node.
      call_next: the app, or the next mod.
      charge: charges the device's own ledger.

    Returns:
      The reply: one vector, or an error with a code and no detail.

    Example:
      >>> import fedveil as fv
      >>> from flwr.clientapp import ClientApp
      >>> app = ClientApp()
      >>> @app.train(mods=[fv.private_update])
      ... def train(message, context):
      ...     ...
    """
    spec = wire.read_spec(message.content)
    if spec is None:
        return Message(Error(wire.FAILED, "this client answers private sums only"), reply_to=message)
    received = dict(wire.only_arrays(message.content).items())  # the app may modify its input

    def trained() -> Message:
        with charge(message.content, None):
            vector = _encode(without_error(call_next(message, context)), received, message.content, spec)
        return wire.reply_with(vector, spec, message)

    return answer_of(message, trained)


def _encode(
    reply: Message, received: Mapping[str, Array], content: RecordDict, spec: SumSpec
) -> Contribution:
    """Return the vector of an app's reply to an instruction, which contained the arrays `received`."""
    update, values = update_of(reply, received, content, spec), values_of(reply)
    return or_of_zeros(lambda arrays: encode(arrays, values, spec)[0], update)


def or_of_zeros(encode_update: Callable[[Arrays], T], update: Arrays) -> T:
    """Return the vector that `encode_update` makes of an update or, if the update is not finite, of zeros.

    Divergence of training may depend on one record and on the server's message. A failure would reveal it, uncharged,
    to everyone who sees which clients answer; so the client answers with zeros, like one without examples.
    """
    try:
        return encode_update(update)
    except NotFinite as error:
        logger.warning("%s; this client answers with a zero update", error)
        return encode_update({name: np.zeros_like(value) for name, value in update.items()})


def answer_of(message: Message, compute_reply: Callable[[], Message]) -> Message:
    """Return a client's reply, or an error with a code and no detail.

    Args:
      message: the instruction.
      compute_reply: computes the reply; raises NotTrained if there is none.
    """
    try:
        return compute_reply()
    except NotTrained as error:
        return Message(Error(error.code, "the client did not train"), reply_to=message)
    except Exception:
        # The error may depend on the data: only the owner may read it.
        logger.exception("round failed at this client")
        return Message(Error(wire.FAILED, "the client failed"), reply_to=message)


def or_unchanged(message: Message, compute_reply: Callable[[], Message], must_hide: bool) -> Message:
    """Return a client's reply or, if its task fails and an encrypted sum with noise must hide this, a zero update."""
    try:
        return compute_reply()
    except Exception as error:
        if not must_hide or isinstance(error, NotTrained | Refusal):
            raise
        logger.exception("this client answers with a zero update, since its task failed")
        return unchanged(message)


def unchanged(message: Message) -> Message:
    """Return the reply with a zero update, because a different or missing reply would reveal something about the records."""
    arrays = wire.views(wire.only_arrays(message.content))
    if wire.sum_spec_of(message.content).unit_norm is not None:
        return record_sum_reply(message, {name: np.zeros_like(value) for name, value in arrays.items()})
    metrics = MetricRecord({wire.WEIGHT: 0, TRAIN_LOSS: 0.0})
    content = RecordDict({"arrays": wire.memory_arrays(arrays), "metrics": metrics})
    return Message(content, reply_to=message)


def record_sum_reply(message: Message, parts: Mapping[str, NDArray[np.generic]]) -> Message:
    """Return an app's reply to an instruction with its part of a sum over records, by name of the model's arrays."""
    return Message(computed_reply(parts, {}), reply_to=message)


def computed_reply(parts: Mapping[str, NDArray[np.generic]], metrics: Mapping[str, float]) -> RecordDict:
    """Return the content of an app's reply with its part of a sum, by name of the model's arrays, and its metrics."""
    return RecordDict({SUM_PART: wire.memory_arrays(parts), METRICS: MetricRecord(dict(metrics))})


def without_error(reply: Message) -> Message:
    """Return an app's reply.

    Raises:
      NotTrained: the reply is an error, whose text stays here.
    """
    if reply.has_error():
        raise NotTrained(reply.error.code)
    return reply


def update_of(reply: Message, received: Mapping[str, Array], content: RecordDict, spec: SumSpec) -> Arrays:
    """Return a client's update, by name in the order of `received`, the instruction's arrays, not clipped or scaled yet.

    Raises:
      KeyError: an array is missing, or records are summed and the app does not support it.
      ValueError: an array has another shape.
    """
    if spec.asks:  # a question has no update
        return {}
    if spec.unit_norm is None and SUM_PART not in reply.content:
        arrays = RecordDict({k: v for k, v in reply.content.items() if k != SEGMENTS_RECORD})
        update: Arrays = difference(wire.only_arrays(arrays), received)
    else:
        sums = cast(ArrayRecord, reply.content[SUM_PART])
        update = {k: cast(NDArray[np.floating], wire.view(sums[k])) for k in wire.layout_of(received)}
    return compressed(update, content, spec)


def compressed(update: Arrays, content: RecordDict, spec: SumSpec) -> Arrays:
    """Return the update to clip and send: compressed if the sum's spec asks for it, otherwise unchanged."""
    sketch = wire.sketch_for(content, spec)
    return update if sketch is None else compress(update, sketch)


def difference(trained: ArrayRecord, received: Mapping[str, Array]) -> dict[str, NDArray[np.floating]]:
    """Return trained minus received for every averaged array, matched by name, in the received order.

    Args:
      trained: arrays that the app returned; the update overwrites those that are lent.
      received: arrays of the instruction.

    Raises:
      KeyError: an array is missing.
      ValueError: an array has another shape.
    """
    layout = wire.layout_of(received)
    update: dict[str, NDArray[np.floating]] = {}
    for name, shape in layout.items():
        value, start = wire.view(trained[name]), wire.view(received[name])
        if value.shape != shape:
            raise ValueError(f"array {name} has shape {value.shape}, expected {shape}")
        writable = wire.is_lent(trained[name]) and value.dtype == start.dtype
        update[name] = np.subtract(value, start, out=value if writable else None)
    return update


def values_of(reply: Message) -> dict[str, float | NDArray[np.floating]]:
    """Return a reply's values for the segments besides the update: numeric metrics, and parts with a shape."""
    values: dict[str, float | NDArray[np.floating]] = {}
    for record in records_of(reply.content, MetricRecord).values():
        values |= {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    parts = records_of(reply.content, ArrayRecord).get(SEGMENTS_RECORD, ArrayRecord())
    return values | {name: cast(NDArray[np.floating], wire.view(part)) for name, part in parts.items()}
