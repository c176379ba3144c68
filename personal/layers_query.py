"""Query of a run with layers that stay: its clients hold rows out, on which their whole models are measured."""

from __future__ import annotations

from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..run.queries import Query
from .settings import layers_of


def _check(federation: Federation) -> None:
    """Refuse real data on this machine, whose owners would not have their layers."""
    if federation.population.reads_data and not federation.simulated:
        remedy = "layers of real clients lie with the clients: deploy them, or declare task.simulated=true"
        raise Refusal("personal", layers_of(federation.settings).name, remedy)


LAYERS = Query(held_out=lambda settings: layers_of(settings).share, check=_check)
