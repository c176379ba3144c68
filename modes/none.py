"""Mode `none`: nothing is promised, and epsilon is infinite."""

from .mode import Mode


class NoPromise(Mode):
    """No promise: nobody is charged, so that noise and draws may be repeated by a seed."""

    spends = False


MODE = NoPromise
