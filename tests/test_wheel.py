"""The wheel holds the three packages under one name, and works where the repository is out of sight."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"engine", "locking", "storage"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the working tree, without network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, with nothing of this environment that could help it, and return its output."""
    names = ("HOME", "PATH", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """No `engine`, `storage` or `locking` at the top, no tests; every module of the tree, and `py.typed`."""
    with zipfile.ZipFile(wheel) as archive:
        files = {PurePosixPath(name) for name in archive.namelist()}
    code = {path for path in files if not path.parts[0].endswith(".dist-info")}
    assert {path.parts[0] for path in code} == {"onceflow"}
    assert {path.parts[1] for path in code} == PACKAGES, "and no __init__.py: onceflow is a namespace"
    for package in PACKAGES:
        assert PurePosixPath("onceflow", package, "py.typed") in code
        modules = {
            PurePosixPath("onceflow", path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")
        }
        assert modules <= code
    assert not {path for path in code if path.suffix == ".pyc"}


def test_the_wheel_runs_where_the_repository_is_out_of_sight(wheel: Path, tmp_path: Path) -> None:
    """Installed in a fresh environment, example 01 runs from an empty folder, and the code comes from the wheel."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=empty)
    python = environment / "bin" / "python"
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--python",
        python,
    ]
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=empty)
    # The dependencies come from here: a folder that a .pth names is not searched for .pth files itself, so that
    # the editable install beside them stays out of sight.
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (installed / "dependencies.pth").write_text("\n".join(theirs), encoding="utf-8")
    for package in PACKAGES:
        origin = run(
            python, "-c", f"import onceflow.{package} as package; print(package.__file__)", cwd=empty
        )
        assert Path(origin).is_relative_to(installed)
    assert run(python, ROOT / "examples" / "01_hello.py", cwd=empty) == "Hello, Ada!\nHello, Grace!\n"
    assert list(empty.iterdir()) == []
