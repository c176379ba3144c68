"""Mod that makes a Flower app's evaluation part of a private sum: its metric is bounded, clipped and noised."""

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from ..client.private_update import answer_of, values_of, without_error
from ..messages.wire import FAILED, WEIGHT, read_spec, reply_with
from ..privacy.mechanisms.private_sum import encode
from ..privacy.statistics.evaluation import LOSS, Evaluation, HeldOutMeans
from .wire import question_of

LOSSES = (LOSS, "eval_loss")  # names of an app's mean loss
NO_LOSS = float("inf")  # of an app that reports no loss: counts as the largest one


def private_evaluation(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Replace an app's evaluation by its clipped vector on the lattice: the requested metric, and its loss.

    An app that reports no example, by `num-examples` 0, adds nothing to any figure. All other values stay at the
    client. An instruction outside a private evaluation is refused.

    Args:
      message: the instruction to evaluate a model.
      context: Flower's, of this node.
      call_next: the app, or the next mod.

    Returns:
      A reply of one vector, or an error with a code and no detail.

    Example:
      >>> import fedveil as fv
      >>> from flwr.clientapp import ClientApp
      >>> app = ClientApp()
      >>> @app.evaluate(mods=[fv.private_evaluation])
      ... def evaluate(message, context):
      ...     ...
    """

    def private_reply() -> Message:
        spec, evaluation = read_spec(message.content), question_of(message.content)
        if spec is None or not isinstance(evaluation, Evaluation) or spec.segments != evaluation.segments:
            return Message(Error(FAILED, "this client answers private evaluations only"), reply_to=message)
        reply = without_error(call_next(message, context))
        vector, _ = encode({}, evaluation.contribution(_reported_means(reply, evaluation)), spec)
        return reply_with(vector, spec, message)

    return answer_of(message, private_reply)


def _reported_means(reply: Message, evaluation: Evaluation) -> HeldOutMeans | None:
    """Return the metric and the loss that an app reports; None if it evaluated no example."""
    metrics = values_of(reply)
    if metrics.get(WEIGHT) == 0:
        return None
    loss = next((metrics[name] for name in LOSSES if name in metrics), NO_LOSS)
    return HeldOutMeans(float(metrics[evaluation.metric]), float(loss))
