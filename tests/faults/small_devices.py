"""Devices with little memory: a memory cgroup of version 1, and the tasks that fit in one."""

import re
from pathlib import Path

import numpy as np

MIB = 2**20
CGROUP = Path("/sys/fs/cgroup/memory")


class Limited:
    """A memory cgroup of so many MiB: processes in it are killed above."""

    def __init__(self, name: str, mebibytes: int) -> None:
        self.folder = CGROUP / f"fedveil-{name}"
        self.folder.mkdir()
        (self.folder / "memory.limit_in_bytes").write_text(str(mebibytes * MIB))

    def command(self, *arguments: str) -> list[str]:
        """Return a command line that runs this one inside."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *arguments]

    @property
    def peak(self) -> float:
        """MiB."""
        return int((self.folder / "memory.max_usage_in_bytes").read_text()) / MIB

    @property
    def killed(self) -> int:
        """How many processes were killed for what they took."""
        found = re.search(r"oom_kill (\d+)", (self.folder / "memory.oom_control").read_text())
        assert found is not None
        return int(found[1])

    @property
    def empty(self) -> bool:
        return not (self.folder / "cgroup.procs").read_text()

    def remove(self) -> None:
        self.folder.rmdir()


def _give_task(bundle: Path, lines: str) -> None:
    file = bundle / "client.toml"
    text = re.sub(r"\[task\]\n.*?(?=\n\[|\Z)", f"[task]\n{lines}", file.read_text(), flags=re.DOTALL)
    file.write_text(text)


def make_pictures(bundle: Path) -> None:
    """Give the device the task with the convolutional network, of 26 010 parameters, in torch."""
    _give_task(bundle, 'target = "device_cnn:Pictures"\nallow_modules = ["device_cnn"]\nclient = 0\n')


def make_linear(bundle: Path, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Give the device a linear model in NumPy on these records."""
    np.savez(bundle / "device.npz", inputs=inputs, targets=targets)
    _give_task(bundle, 'kind = "linear"\ndata = "device.npz"\nclient = 0\n')
