"""The three public faces: what they name, where it says it lives, what importing it costs, every error."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onceflow.engine
import onceflow.locking
import onceflow.storage
import pytest

ENGINE = """
flow task transaction Engine
DEFAULT INPUTS TASK_SOURCE FLOW_PARAMETERS RUN_ID NONE CachePolicy IsolationLevel
State StateType TaskFuture FlowFuture as_completed wait unmapped allow_failure quote
get_run_context get_run_logger tags Settings
"""
STORAGE = "Storage LocalStorage S3Storage MemoryStorage storage_from_url"
LOCKING = """
LockManager Lease MemoryLockManager FileLockManager RedisLockManager StorageLockManager lock_manager_from_url
"""
CONTRACT = {"engine": ENGINE, "storage": STORAGE, "locking": LOCKING}
INTERFACE = {"Stat", "Stored"}
"""What a storage of the user's own returns: `Storage` cannot be implemented without them."""
LATER = {"transaction", "Explanation"}
"""Names of issues that are still under way: allowed, not yet demanded."""

FACES = [onceflow.engine, onceflow.storage, onceflow.locking]
each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)


def errors_of(face: ModuleType) -> dict[str, type[Exception]]:
    """The error classes of a package's `_errors.py`."""
    module = importlib.import_module(f"{face.__name__}._errors")
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Exception) and not name.startswith("_")
    }


def public_of(face: ModuleType) -> list[tuple[str, Any]]:
    return [(name, getattr(face, name)) for name in face.__all__]


ALL_ERRORS = [error for face in FACES for error in errors_of(face).values()]
ALL_PUBLIC = [(face, name) for face in FACES for name in face.__all__]


@each_face
def test_a_face_is_short_and_its_all_is_sorted(face: ModuleType) -> None:
    """A face is under 40 lines, and its `__all__` is sorted and without duplicates."""
    source = Path(inspect.getfile(face)).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 40
    assert len(set(face.__all__)) == len(face.__all__)
    # As ruff's RUF022 sorts: constants, then classes, then functions.
    assert face.__all__ == sorted(face.__all__, key=_isort_style)


def _isort_style(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@each_face
def test_a_face_names_the_contract_and_the_errors_and_nothing_else(face: ModuleType) -> None:
    """The public names are those of the contract's first section and the package's errors."""
    short = face.__name__.rpartition(".")[2]
    expected = set(CONTRACT[short].split()) | set(errors_of(face))
    public = set(face.__all__) - LATER
    if short == "storage":
        public -= INTERFACE
    assert public == expected - LATER


@each_face
def test_what_a_face_shows_without_an_underscore_is_public(face: ModuleType) -> None:
    """Nothing lies in a face's namespace that looks public and is not: no leaked import."""
    # pytest leaves names with an @ in what it rewrites: here, the package of our own plugin
    own = {name for name in vars(face) if not name.startswith(("_", "@")) and name != "annotations"}
    modules = {name for name in own if inspect.ismodule(getattr(face, name))}
    assert own - modules == set(face.__all__)
    assert {name for name in modules if not getattr(face, name).__name__.startswith(face.__name__)} == set()


@pytest.mark.parametrize(("face", "name"), ALL_PUBLIC, ids=[f"{f.__name__}.{n}" for f, n in ALL_PUBLIC])
def test_a_public_object_says_where_it_lives_and_pickles_by_that_path(face: ModuleType, name: str) -> None:
    """A public class or function carries its package's name as its module, and pickles as itself."""
    value = getattr(face, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == face.__name__
        assert value.__qualname__ == name
        assert pickle.loads(pickle.dumps(value)) is value
        assert face.__name__.encode() in pickle.dumps(value, protocol=0)
    else:
        assert pickle.loads(pickle.dumps(value)) == value


def test_importing_the_engine_loads_nothing_that_is_optional_or_slow() -> None:
    """`import onceflow.engine` loads no client, no pydantic, no numpy: each comes with its first use."""
    slow = {
        "aiobotocore", "botocore", "redis", "pydantic_settings", "pydantic", "rich", "starlette", "numpy",
        "pandas", "polars", "pyarrow", "cloudpickle",
    }  # fmt: skip
    script = "import sys, onceflow.engine, onceflow.storage, onceflow.locking; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parent.parent / ".dev")},
    ).stdout.split()
    assert "onceflow.engine" in loaded
    assert slow & set(loaded) == set()


def test_a_simple_run_without_caching_loads_no_client() -> None:
    """A task and a flow that cache nothing run without pydantic and without any client."""
    script = """
import sys
from onceflow.engine import flow, task
@task
async def double(x): return 2 * x
@flow
async def main(x: int = 1): return await double(x)
assert main.run() == 2
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parent.parent / ".dev")},
    )
    assert {"aiobotocore", "botocore", "redis", "pydantic", "numpy"} & set(done.stdout.split()) == set()


def test_the_packages_are_declared_in_the_wheel() -> None:
    """The wheel maps exactly the three folders to the three public packages."""
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {path.replace("/", ".") for path in wheel["sources"].values()} == {f.__name__ for f in FACES}


# --- errors


def samples(error: type[Exception]) -> Iterator[Any]:
    """One argument for each parameter of an error's constructor, by its annotation."""
    if error.__init__ in (Exception.__init__, OSError.__init__, ValueError.__init__):
        yield "the text"  # a base of others, with no message of its own
        return
    for name, parameter in inspect.signature(error).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = str(parameter.annotation)
        if kind.startswith(("Sequence[str]", "tuple[str", "list[str]")):
            yield [f"first {name}", f"second {name}"]
        elif kind == "bool":
            yield True  # chooses the message, and is not in it
        elif kind.startswith(("int", "float")):
            yield 4711
        else:
            yield f"the {name}"


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: error.__name__)
def test_an_error_says_what_it_was_built_from(error: type[Exception]) -> None:
    """The message of every error names what it was built from, and its attributes carry it."""
    given = list(samples(error))
    made = error(*given)
    text = str(made)
    assert text.strip()
    if given == ["the text"]:
        assert text == "the text"
        return
    for name, value in zip(inspect.signature(error).parameters, given, strict=True):
        assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)
        for part in value if isinstance(value, list) else [value] if value is not True else []:
            assert str(part) in text, f"{error.__name__} does not name {name}"


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: error.__name__)
def test_an_error_pickles(error: type[Exception]) -> None:
    """Every error survives pickling with its type, its message, its attributes and its note."""
    made = error(*samples(error))
    made.add_note("seen in passing")
    twin = pickle.loads(pickle.dumps(made))
    assert type(twin) is error
    assert str(twin) == str(made)
    assert vars(twin) == vars(made)
    assert twin.args == made.args


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: error.__name__)
def test_an_error_is_drawn_in_the_tree(error: type[Exception]) -> None:
    """The tree at the top of `_errors.py` shows every error, with the builtin it derives from."""
    package = error.__module__.removesuffix("._errors")
    tree = importlib.import_module(f"{package}._errors").__doc__ or ""
    line = next((line for line in tree.splitlines() if f"{error.__name__} " in f"{line} "), None)
    assert line is not None, f"{error.__name__} is not in the tree"
    own = [
        base for base in error.__bases__ if base.__module__ == "builtins" and base not in (Exception, object)
    ]
    assert not own or f"({', '.join(base.__name__ for base in own)})" in line
