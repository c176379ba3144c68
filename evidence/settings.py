"""Settings of a report's estimates: the group cost."""

from typing import Annotated

from ..configs.group import Group, remedy
from ..configs.values import NotNegative, Positive, Records


class CostSettings(Group):
    """Prices and powers for a report's estimates; null is not computed. `assessment.yaml` overrides them."""

    watts_of_core: NotNegative | None = None
    """Watts of one busy core of the server's machine; null: 4, CodeCarbon's value, if no counter can be read."""
    grams_co2_of_kwh: NotNegative | None = None
    """Grams of CO2 for a kilowatt hour of its electricity."""
    price_of_kwh: NotNegative | None = None
    """Price of a kilowatt hour in `currency`."""
    price_of_gigabyte: NotNegative | None = None
    """Price of a gigabyte sent or received, in `currency`."""
    joules_of_gigabyte: NotNegative | None = None
    """Energy of a gigabyte on the network, in joules."""
    currency: (
        Annotated[
            str,
            remedy("must be a code of three letters such as EUR", pattern=r"^[A-Z]{3}$"),
        ]
        | None
    ) = None
    """Currency code of three letters such as EUR."""
    examples_of_client: Records | None = None
    """Public upper bound on the examples of one client, for the report's bound on its work in a round."""
    flops_of_client: Positive | None = None
    """Floating-point operations per second of CPU on a client's processor."""
