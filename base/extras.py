"""Extras of the installation: the packages of each part of fedveil besides `fedveil.privacy`, and their extra."""

from importlib.util import find_spec

from .refusal import Refusal

_SIMULATION = ("flwr", "hydra", "matplotlib", "opacus", "pydantic", "torch")
# By extra: modules of its main packages. If these are installed, so are the packages that they depend on.
MODULES = {
    "opacus": ("opacus", "torch"),
    "client": ("flwr", "grpc", "opacus", "torch"),
    "server": tuple(sorted((*_SIMULATION, "grpc", "prometheus_client", "starlette"))),
    "simulation": _SIMULATION,
    "ray": ("ray",),
    "mlflow": ("mlflow",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "tables": ("pyarrow",),
    "spreadsheets": ("pyarrow", "python_calamine"),
    "databases": ("duckdb", "psycopg", "pyarrow", "sqlalchemy"),
    "text": ("gguf", "tokenizers", "transformers"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "qr": ("segno",),
    "nvflare": ("nvflare",),
    "timestamps": ("rfc3161_client",),
    "docs": ("material", "mkdocs"),
}


def require_extra(extra: str, what: str) -> None:
    """Refuse to continue without an extra.

    Args:
        extra: a key of `MODULES`.
        what: the feature that needs it, such as `fedveil server`.

    Raises:
        Refusal: naming what is missing and the command that installs it.
    """
    missing = [name for name in MODULES[extra] if not find_spec(name)]
    if missing:
        remedy = f"{what} needs {', '.join(missing)}: pip install 'fedveil[{extra}]'"
        raise Refusal("extra", extra, remedy)
