"""Types of values of the configuration, each with its range."""

from typing import Annotated, Literal

from pydantic import Field

from ..base.extensions import names
from ..messages.local_training import GRAD_NORM
from ..privacy.budget import Adjacency
from .group import remedy

Parameter = float | int | str | bool
Argument = Parameter | None | list[Parameter | None]
OF_ARGUMENTS = remedy("must be a finite number, a word, true, false, null or a list of them")
Epochs = Annotated[int, Field(ge=1, le=10_000)]
# Accountants compose round by round in floating point; beyond this their own error is no longer negligible.
MAX_ROUNDS = 100_000
Rounds = Annotated[int, Field(ge=1, le=MAX_ROUNDS)]
Clients = Annotated[int, Field(ge=1, le=10_000_000)]
Records = Annotated[int, Field(ge=1, le=10**12)]
Positive = Annotated[float, Field(gt=0)]
GradNorm = Annotated[float, GRAD_NORM]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Times = Annotated[float, Field(ge=1)]  # a factor
Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]+$")]
MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
Module = Annotated[str, Field(pattern=f"^{MODULE}$")]
Adjacent = Annotated[Adjacency, Field(strict=False)]
FixedOrAdaptive = Literal["fixed", "adaptive"]
TRACKERS = names("callback")
CallbackName = Annotated[str, Field(pattern=rf"^({'|'.join(TRACKERS)}|{MODULE}:[^\W\d]\w*)$")]
HIDDEN_CLIENTS = "clients are hidden as a whole when they evaluate; use client_central or client_distributed"
CLASS = rf"{MODULE}:[^\W\d]\w*"
Target = Annotated[str, remedy("must name a class as 'module:Class'", pattern=f"^{CLASS}$")]
_NO_MODEL = "must be student, or name a class as 'module:Class'"
OtherModel = Annotated[str, remedy(_NO_MODEL, pattern=f"^(student|{CLASS})$")] | None
By = Field(discriminator="name")  # of a union of groups, of which the key `name` chooses one
