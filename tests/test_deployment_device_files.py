"""What a device installs and how it is started: pins and hashes, no CUDA, a unit that systemd knows, container files."""

import hashlib
import re
import shutil
import subprocess
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedveil.deployment.requirements import DEVICE, cuda_on_device, installed_requirements, wheel_requirements
from fedveil.deployment.systemd_units import CLIENT_UNIT, SERVER_UNIT, client_unit, server_unit
from fedveil.privacy.refusal import Refusal

ROOT = Path(__file__).parents[1]

# As torch's wheels for Linux on aarch64 say it: 2.10 and 2.13.
TORCH_2_10 = [
    "filelock",
    'nvidia-cudnn-cu12==9.10; platform_system == "Linux" and platform_machine == "x86_64"',
    "sympy",
]
TORCH_2_13 = [
    "filelock",
    'nvidia-cudnn-cu13==9.20; platform_system == "Linux"',
    'cuda-toolkit[cudart]==13.0; sys_platform == "linux"',
]


def wheel(folder: Path, name: str, requires: list[str] = []) -> Path:  # noqa: B006 (never changed)
    folder.mkdir(exist_ok=True)
    path = folder / name
    project, version = name.split("-")[:2]
    lines = ["Metadata-Version: 2.1", f"Name: {project}", f"Version: {version}"]
    with zipfile.ZipFile(path, "w") as archive:
        text = "\n".join(
            [*lines, *(f"Requires-Dist: {each}" for each in requires), "", "Requires-Dist: nvidia-x"]
        )
        archive.writestr(f"{project}-{version}.dist-info/METADATA", text)
    return path


# --- requirements -----------------------------------------------------------------------------------------------


def test_pins_are_what_is_installed_and_hold_no_cuda_and_no_simulation() -> None:
    lines = [line for line in installed_requirements().splitlines() if not line.startswith("#")]
    pins = {line.split("==")[0]: line for line in lines}
    assert pins["cryptography"] == f"cryptography=={metadata.version('cryptography')}"
    assert "fedveil" in pins and "grpcio" in pins
    assert not any(re.match(r"nvidia|cuda|triton", name) for name in pins)
    assert not {"ray", "hydra-core", "matplotlib", "scikit-learn"} & pins.keys()
    torch = [line for line in lines if line.startswith("torch")]
    public = metadata.version("torch").partition("+")[0]
    assert torch == [
        "torch>=2.10,<2.11; platform_machine == 'aarch64'",
        f"torch=={public}; platform_machine != 'aarch64'",
    ]


def test_the_package_itself_asks_for_no_newer_torch_on_aarch64() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(each) for each in project["optional-dependencies"]["opacus"]]
    asked = [each for each in asked if each.name == "torch"]
    on_device = [each for each in asked if each.marker is None or each.marker.evaluate(DEVICE)]
    assert len(on_device) == 1
    assert on_device[0].specifier.contains("2.10.0") and not on_device[0].specifier.contains("2.11.0")


def test_wheels_become_pins_with_their_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    mine = wheel(folder, "fedveil-0.1.0-py3-none-any.whl")
    torch = wheel(folder, "torch-2.10.0+cpu-cp311-cp311-manylinux_2_28_aarch64.whl", TORCH_2_10)
    other = wheel(folder, "torch-2.10.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", TORCH_2_13)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (mine, torch, other)]
    assert wheel_requirements(folder).splitlines() == [
        f"fedveil==0.1.0 --hash=sha256:{digests[0]}",
        f"torch==2.10.0 --hash=sha256:{digests[1]} --hash=sha256:{digests[2]}",
    ]


@pytest.mark.parametrize(
    ("names", "requires", "said"),
    [
        ([], [], "holds no wheel of fedveil"),
        (["numpy-2.4.6-cp311-cp311-linux_aarch64.whl"], [], "holds no wheel of fedveil"),
        (["nvidia_cudnn_cu13-9.20-py3-none-manylinux_2_27_aarch64.whl"], [], "is of CUDA"),
        (["triton-3.7-cp311-cp311-manylinux_2_27_aarch64.whl"], [], "is of CUDA"),
        (
            ["torch-2.13.0-cp311-cp311-manylinux_2_28_aarch64.whl"],
            TORCH_2_13,
            "requires nvidia-cudnn-cu13 on aarch64",
        ),
        (["a-1-py3-none-any.whl", "a-2-py3-none-any.whl"], [], "holds a 1 and 2; keep one of them"),
        (["a.whl"], [], "is not named as a wheel is"),
    ],
)
def test_a_folder_that_no_small_device_can_use_is_refused(
    names: list[str], requires: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "wheels").mkdir()
    for name in names:
        wheel(tmp_path / "wheels", name if "-" in name else "a-0-py3-none-any.whl", requires).rename(
            tmp_path / "wheels" / name
        )
    with pytest.raises(Refusal, match=said):
        wheel_requirements(tmp_path / "wheels")


def test_a_wheel_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "wheels", "torch-2.10.0-cp311-cp311-manylinux_2_28_aarch64.whl")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(Refusal, match="is no wheel that can be read"):
        wheel_requirements(tmp_path / "wheels")


def test_cuda_is_found_in_the_metadata_of_torch() -> None:
    assert cuda_on_device(TORCH_2_10) == []
    assert cuda_on_device(TORCH_2_13) == ["nvidia-cudnn-cu13", "cuda-toolkit"]
    assert cuda_on_device(["triton==3.7", "nvidiamock", 'nvidia-nccl; extra == "gpu"']) == ["triton"]


# --- systemd ----------------------------------------------------------------------------------------------------

UNITS = {CLIENT_UNIT: client_unit("hearts", "cleveland"), SERVER_UNIT: server_unit("hearts")}


def complaints(folder: Path, name: str, text: str) -> str:
    """What `systemd-analyze verify` says; it returns 0 for a key that it does not know."""
    (folder / name).write_text(text.replace("/opt/fedveil/bin/fedveil", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", name], cwd=folder, capture_output=True, text=True, check=False
    )
    return "\n".join(line for line in done.stderr.splitlines() if name in line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_knows_every_line_of_the_unit(name: str, tmp_path: Path) -> None:
    assert complaints(tmp_path, name, UNITS[name]) == ""
    assert "Unknown key" in complaints(tmp_path, name, UNITS[name].replace("Restart=", "Restrat="))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_the_unit_little_exposed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(UNITS[name])
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=15", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]


def test_a_client_comes_back_for_ever_and_takes_its_children_along() -> None:
    lines = UNITS[CLIENT_UNIT].splitlines()
    for line in (
        "ExecStart=/opt/fedveil/bin/fedveil client start %S/fedveil-client",
        "After=network-online.target time-sync.target",
        "StartLimitIntervalSec=0",
        "Restart=always",
        "KillMode=control-group",
        "DynamicUser=yes",
        "ProtectSystem=strict",
        "StateDirectory=fedveil-client",
        "StateDirectoryMode=0700",
        "MemoryMax=1G",
        "LimitCORE=0",
        "LimitNOFILE=65536",
    ):
        assert line in lines


# --- containers -------------------------------------------------------------------------------------------------

CONTAINERS = sorted((ROOT / "containers").glob("*.Dockerfile"))


def test_the_containers_are_two() -> None:
    assert [path.name for path in CONTAINERS] == ["client.Dockerfile", "server.Dockerfile"]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_a_container_runs_as_nobody_and_installs_from_its_own_folder_alone(path: Path) -> None:
    text = path.read_text()
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 65532:65532$", final, re.MULTILINE)
    assert "RUN" not in final and "ADD" not in text and ":latest" not in text
    assert "--no-index" in text
    # A device's wheels come from elsewhere; the server's are collected by whoever builds its image.
    assert ("--require-hashes" in text) == (path.name == "client.Dockerfile")
    for flag in ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"):
        assert flag in text


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
