"""Mode `client_distributed`: whole clients are hidden by shares of noise that clients add to encrypted updates."""

from .sums import ClientMode


class ClientDistributedMode(ClientMode):
    """Hides whole clients from everybody, the server included."""

    distributed = True


MODE = ClientDistributedMode
