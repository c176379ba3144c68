"""Mode `client_distributed`: whole clients are hidden by shares of noise that clients add to encrypted updates."""

from .sums import ClientMode


class ClientDistributedMode(ClientMode):
    """Hides whole clients from everybody, the server included."""

    distributed = True
    usual_over_selection = 1.3  # Bonawitz et al. 2019 (arXiv:1902.01046), section 9
    public_draw = "none: the server sees who takes part"


MODE = ClientDistributedMode
