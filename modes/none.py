"""Mode `none`: nothing is promised, and epsilon is infinite."""

from .mode import Mode

MODE = Mode
