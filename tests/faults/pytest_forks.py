"""Runs pytest again and again, each time in a fork of a process that has loaded other people's packages already.

Reads lines of JSON, each a list of the checkout's folder, the file for the output and pytest's arguments; answers
each with a line that holds pytest's exit code.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

import hypothesis
import pytest
from _pytest.config import default_plugins

LOADED = (
    *("torch", "opacus", "flwr.serverapp", "flwr.clientapp", "dp_accounting", "hydra", "msgpack", "pydantic"),
    *("cryptography.x509", "safetensors.numpy", "sqlite3", *(f"_pytest.{name}" for name in default_plugins)),
)


def run(checkout: Path, output: str, arguments: list[str]) -> int:
    """Run pytest in `checkout`, whose package shadows the installed one."""
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    gc.disable()  # a process this short has no garbage to speak of
    os.chdir(checkout)
    sys.path.insert(0, str(checkout.parent))
    code = pytest.main(arguments)
    sys.stdout.flush()
    return code


def main() -> None:
    """Answer until nobody asks any more."""
    for name in LOADED:
        importlib.import_module(name)
    # A red example is enough: to look for the smallest takes longer than to find it.
    found = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("red", phases=found, database=None)
    hypothesis.settings.load_profile("red")
    gc.freeze()  # pytest collects garbage at its end: these packages are none
    for line in sys.stdin:
        checkout, output, arguments = json.loads(line)
        process = os.fork()
        if not process:
            os._exit(run(Path(checkout), output, arguments))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
