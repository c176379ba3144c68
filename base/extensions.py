"""Table of the extensions: the modules by which each one meets the core, which imports them where they are used."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .refusal import Refusal

# By extension, which is a folder of the package and the group of keys that asks for it, and by the core's protocol.
MODULES = {
    "audit": {
        "Observation": "observer",  # run/observer.py
        "ExtraParticipants": "participants",  # populations/extra.py
        "ExtraClients": "canary_updates",  # client/extra.py
        "ExtraRecords": "record_canaries",  # client/extra.py
    }
}


def part(extension: str, protocol: str, asked: str) -> Any:
    """Return the module of an extension that has the functions of a protocol.

    Args:
      extension: a key of `MODULES`.
      protocol: a key of its modules.
      asked: what the configuration asks of the extension.

    Raises:
      Refusal: the extension is not installed.
    """
    package = f"{__name__.split('.')[0]}.{extension}"
    if find_spec(package) is None:
        remedy = f"{package}, which does it, is missing here; install all of fedveil, or say {extension}=off"
        raise Refusal(extension, asked, remedy)
    return import_module(f"{package}.{MODULES[extension][protocol]}")
