"""Files of a run folder, by name, as the rooms above reports call them."""

from ...reports.files import (
    ASSESSMENT,
    AUDIT_KEY,
    AUDIT_ROWS,
    AUDIT_TERMS,
    CARD,
    CONFIG,
    CURVE,
    MANIFEST,
    MATERIALS,
    METRICS,
    MODEL,
    OPERATOR,
    PAGE,
    REPORT,
    RESULT,
    SAVED,
)

__all__ = [
    "ASSESSMENT",
    "AUDIT_KEY",
    "AUDIT_ROWS",
    "AUDIT_TERMS",
    "CARD",
    "CONFIG",
    "CURVE",
    "MANIFEST",
    "MATERIALS",
    "METRICS",
    "MODEL",
    "OPERATOR",
    "PAGE",
    "REPORT",
    "RESULT",
    "SAVED",
]
