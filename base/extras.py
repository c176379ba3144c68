"""Extras of the installation: the packages of each part of fedveil besides `fedveil.privacy`, and their extra."""

from importlib.util import find_spec

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
