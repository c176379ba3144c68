"""Extras of the installation: the packages that each part needs; and extensions, which the core finds here by name."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .refusal import Refusal

# By extra, the modules that stand for it: if these are there, the others are.
MODULES = {
    "opacus": ("opacus", "torch"),
    "client": ("flwr", "grpc", "opacus", "torch"),
    "server": (
        "flwr",
        "grpc",
        "hydra",
        "matplotlib",
        "opacus",
        "prometheus_client",
        "pydantic",
        "starlette",
        "torch",
    ),
    "simulation": ("flwr", "hydra", "matplotlib", "opacus", "pydantic", "torch"),
    "ray": ("ray",),
    "mlflow": ("mlflow",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "tables": ("pyarrow",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "qr": ("segno",),
    "timestamps": ("rfc3161_client",),
}


def require_extra(extra: str, what: str) -> None:
    """Refuse to continue without an extra.

    Args:
        extra: a key of `MODULES`.
        what: the feature that needs it, such as `fedveil server`.

    Raises:
        Refusal: naming what is missing and the command that installs it.
    """
    missing = [name for name in MODULES[extra] if find_spec(name) is None]
    if missing:
        remedy = f"{what} needs {', '.join(missing)}: pip install 'fedveil[{extra}]'"
        raise Refusal("extra", extra, remedy)


# By extension, which is a folder of the package and the group of keys that asks for it, and by the core's protocol.
EXTENSIONS = {
    "audit": {
        "Observation": "observer",  # run/observer.py
        "ExtraParticipants": "participants",  # populations/population.py
        "ExtraClients": "canary_updates",  # client/extra.py
        "ExtraRecords": "record_canaries",  # client/extra.py
    }
}


def part(extension: str, protocol: str, asked: str) -> Any:
    """Return the module of an extension that has the functions of a protocol.

    Args:
      extension: a key of `EXTENSIONS`.
      protocol: a key of its modules.
      asked: what the configuration asks of the extension.

    Raises:
      Refusal: the extension is not installed.
    """
    package = f"{__name__.split('.')[0]}.{extension}"
    if find_spec(package) is None:
        remedy = f"{package}, which does it, is missing here; install all of fedveil, or say {extension}=off"
        raise Refusal(extension, asked, remedy)
    return import_module(f"{package}.{EXTENSIONS[extension][protocol]}")
