"""Settings of evaluations at the clients: the group evaluate, and what it conflicts with."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..configs.group import Group, remedy
from ..configs.privacy_settings import ClientLevel, RecordDistributed
from ..configs.values import HIDDEN_CLIENTS, Positive, Text

PERSONAL = "personal"  # name of the query that trains after the release

if TYPE_CHECKING:
    from ..configs.schema import FederationSettings


class EvaluateSettings(Group):
    """Evaluation of the model at the clients, on records that each holds out of training."""

    clients: Annotated[
        str,
        remedy(
            "must be none, final, or every:N as in every:10", pattern=r"^(none|final|every:[1-9][0-9]{0,5})$"
        ),
    ] = "none"
    """When all clients evaluate the model: none, final (after the last round), or every:N rounds and after the last."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of its records that each client holds out, by a hash of each: the same ones in every run."""
    metric: Text = "accuracy"
    """Name of one of the task's metrics."""
    metric_bound: Positive = 1.0
    """Upper bound of the metric, which is clipped to [0, metric_bound]."""
    figures: Annotated[
        tuple[Literal["metric", "loss", "clients", "histogram"], ...], Field(strict=False, min_length=1)
    ] = ("metric", "loss", "clients", "histogram")
    """Figures to measure, with equal parts of the norm: mean metric, mean loss, number of clients that evaluated, and their
    histogram. With record-level privacy the number of held-out records, and no histogram."""
    noise_multiplier: Positive | None = None
    """Noise of one evaluation. Null: 5 times the root of the number of evaluations, which together then cost as much as one at 5."""
    resolution: Positive | None = None
    """Largest half-width of the interval of the mean metric; null: no limit."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse evaluations if sums hide no unit or noise adapts, and before the last round while arms have own models."""
        if self.clients == "none":
            return
        privacy = whole.privacy
        if not isinstance(privacy, ClientLevel | RecordDistributed):
            yield "evaluate.clients", f"{HIDDEN_CLIENTS}, record_distributed, which hides records, or none"
        elif isinstance(privacy, RecordDistributed) and privacy.per_person is not None:
            yield (
                "evaluate.clients",
                "counts records, of which a person may have several; leave privacy.per_person null, or none",
            )
        elif privacy.noise_schedule == "adaptive":
            text = "needs noise that is fixed in advance; use privacy.noise_schedule=fixed, or none"
            yield "evaluate.clients", text
        if trains_own_models(whole):
            yield from self._conflicts_of_own_models(whole)
        if whole.tried and self.clients != "final":
            text = "arms have models of their own, and which stays is not known yet; use final"
            yield "evaluate.clients", text

    def _conflicts_of_own_models(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse evaluations that cannot measure personal models."""
        if isinstance(whole.privacy, RecordDistributed):
            text = "would measure personal models, each of which depends on all records of its client, and single records "
            yield "evaluate.clients", f"{text}are hidden here; use none, or hide clients"
        elif self.clients != "final":
            yield (
                "evaluate.clients",
                "measures personal models, which are trained from the final model; use final",
            )

    def queries(self, whole: "FederationSettings") -> Mapping[str, tuple[str, object]]:
        """Return the evaluation of the run's rounds, if there is one."""
        if self.clients == "none":
            return {}
        return {"evaluation": ("evaluate.clients", self.clients)}


def trains_own_models(settings: "FederationSettings") -> bool:
    """Return whether each client trains on from the final model for itself."""
    return PERSONAL in settings.query_fields


def measures_own_models(settings: "FederationSettings") -> bool:
    """Return whether the evaluation after the last round measures the clients' own models too."""
    return trains_own_models(settings) and evaluate_of(settings).clients == "final"


def evaluate_of(settings: "FederationSettings") -> EvaluateSettings:
    """Return the settings of evaluations."""
    assert isinstance(settings.evaluate, EvaluateSettings)
    return settings.evaluate


def scored_metric(settings: "FederationSettings") -> str:
    """Return the metric by which clients compare arms."""
    return settings.tune.metric or evaluate_of(settings).metric
