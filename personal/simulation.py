"""Query of a run with personal models: its clients hold rows out, on which each chooses after the release."""

from __future__ import annotations

from ..run.queries import Query
from .settings import personal_of

PERSONAL_MODELS = Query(held_out=lambda settings: personal_of(settings).share)
