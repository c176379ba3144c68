"""What users install: the wheel holds the rooms and nothing else, and works away from the tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shared.absent import ABSENT

ROOT = Path(__file__).parents[1]
ROOMS = (
    "base",
    "privacy",
    "messages",
    "configs",
    "tasks",
    "text",
    "strategies",
    "links",
    "client",
    "server",
    "modes",
    "questions",
    "adapters",
    "engines",
    "export",
    "populations",
    "run",
    "audit",
    "evidence",
    "personal",
    "tables",
    "simulations",
    "deployment",
    "cli",
)
NOT_SHIPPED = "simulations/quickstart/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(folder.glob("*.whl"))


PAGES = ("evidence/page/", "deployment/owner_page/")  # rooms with templates
PRIVACY = ("base/py.typed", "privacy/py.typed", "privacy/ledger/export.schema.json")


def tree() -> set[str]:
    documents = {path for path in (ROOT / "docs").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    top = {*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "py.typed", ROOT / "LICENSE", ROOT / "mkdocs.yml"}
    files = {f"fedveil/{path.relative_to(ROOT).as_posix()}" for path in top | documents}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            data = room == "configs" or name.startswith("cli/templates/")
            page = name.startswith(PAGES) and path.is_file() and path.suffix != ".pyc"
            wanted = path.suffix == ".py" or (path.suffix in (".yaml", ".toml", ".json") and data) or page
            if (wanted or name in PRIVACY) and not name.startswith(NOT_SHIPPED):
                files.add(f"fedveil/{name}")
    return files


def test_the_wheel_is_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == tree()


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import fedveil; print(fedveil.__file__)"

    def output(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert str(site) in output("-c", where)
    assert "num_rounds: 100" in output("-m", "fedveil", "simulate", "--cfg", "job")


def test_importing_the_face_or_privacy_loads_no_torch() -> None:
    probe = (
        "import sys, fedveil, fedveil.privacy;"
        "print([m for m in ('torch', 'flwr', 'hydra', 'ray', 'dp_accounting', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# What an extra does not bring, and the rooms that must do without.
WITHOUT = {
    "": (("torch", "flwr", "opacus", "hydra", "grpc", "matplotlib", "h11"), ("base", "privacy", "evidence")),
    "client": (
        (
            "hydra",
            "omegaconf",
            "pydantic",
            "ray",
            "matplotlib",
            "sklearn",
            "h11",
            "uvicorn",
            "yaml",
            "packaging",
        ),
        ("client", "strategies", "deployment.device", "deployment.owner_page"),
    ),
}
PROBE = (
    f"""
import importlib, pkgutil, sys
blocked, rooms = sys.argv[1].split(","), sys.argv[2].split(",")
{ABSENT}"""
    + """
failed = []
for room in rooms:
    package = importlib.import_module(f"fedveil.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"fedveil.{room}."):
        try:
            importlib.import_module(module.name)
        except Exception as problem:
            failed.append(f"{module.name}: {problem}")
print("\\n".join(failed))
"""
)


@pytest.mark.parametrize("extra", WITHOUT)
def test_a_room_needs_no_more_than_its_extra_brings(extra: str) -> None:
    blocked, rooms = WITHOUT[extra]
    command = [sys.executable, "-c", PROBE, ",".join(blocked), ",".join(rooms)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    said = "fedveil.privacy.opacus needs torch: pip install 'fedveil[opacus]'"
    assert shown == ("" if extra else f"fedveil.privacy.opacus: extra='opacus': {said}")
