"""The one error a user's mistake raises: which field, what value, what to do instead."""


class Refusal(Exception):
    """A request that is declined before anything is written, sent or spent.

    The command line prints it as one sentence and exits non-zero; nobody sees a traceback for it.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy
