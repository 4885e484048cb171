"""What code means: which edits change a digest and which do not, for everything that a function reaches."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import linecache
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from onceflow.engine import INPUTS, TASK_SOURCE, task
from onceflow.engine._keys.source.meaning import Meaning, is_warm, source_meaning
from pythons import PYTHONS, Elsewhere, tree_digests

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Writes a module's text to its file and imports it anew, as a later process would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load_(text: str, name: str = "weather") -> Any:
        file = tmp_path / (name.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        linecache.clearcache()
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        # Not through the loader: two edits within one second would meet the first one's bytecode.
        exec(compile(file.read_text(), str(file), "exec", dont_inherit=True), module.__dict__)
        return module

    return load_


def meaning(module: Any, name: str = "f") -> Meaning:
    return source_meaning(getattr(module, name))


SAME = {
    "comment": "def f(x):\n    # why\n    return x + 1",
    "layout": "def f( x ):\n\n    return (x\n        + 1)",
    "docstring": 'def f(x):\n    """Add."""\n    return x + 1',
    "pass": "def f(x):\n    pass\n    return x + 1",
    "decorator options": "def d(**o):\n    return lambda g: g\n@d(retries=3)\ndef f(x):\n    return x + 1",
    "further down": "\n\n\ndef f(x):\n    return x + 1",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_what_does_not_matter(load: Load, text: str) -> None:
    """B15: comments, formatting, docstrings and decorator options do not matter."""
    assert meaning(load("def f(x):\n    return x + 1")) == meaning(load(text))


WRAPPER = "import functools\ndef w(g):\n @functools.wraps(g)\n"
DISPATCHER = "import functools\n@functools.singledispatch\ndef g(x): ...\n"
COUNTER = "class C:\n n = 0\n def hit(self): self.up()\n def up(self): self.n += 1\n"

DIFFERENT = {
    "body": ("def f(x): return x + 1", "def f(x): return x + 2"),
    "constant type": ("def f(x): return 1", "def f(x): return 1.0"),
    "bool constant": ("def f(x): return 1", "def f(x): return True"),
    "default": ("def f(x=1): return x", "def f(x=2): return x"),
    "computed default": ("D = 1\ndef f(x=D): return x", "D = 2\ndef f(x=D): return x"),
    "keyword default": ("D = 1\ndef f(*, x=D): return x", "D = 2\ndef f(*, x=D): return x"),
    "argument": ("def f(x): return 1", "def f(y): return 1"),
    "constant": ("K = 1\ndef f(): return K", "K = 2\ndef f(): return K"),
    "constant in a list": ("K = [1]\ndef f(): return K", "K = [2]\ndef f(): return K"),
    "constant in a comprehension": (
        "K = 1\ndef f(): return [K for _ in 'a']",
        "K = 2\ndef f(): return [K for _ in 'a']",
    ),
    "constant in a nested function": (
        "K = 1\ndef f():\n def g(): return K\n return g()",
        "K = 2\ndef f():\n def g(): return K\n return g()",
    ),
    "helper": ("def g(): return 1\ndef f(): return g()", "def g(): return 2\ndef f(): return g()"),
    "helper of a helper": (
        "def h(): return 1\ndef g(): return h()\ndef f(): return g()",
        "def h(): return 2\ndef g(): return h()\ndef f(): return g()",
    ),
    "helper's constant": (
        "K = 1\ndef g(): return K\ndef f(): return g()",
        "K = 2\ndef g(): return K\ndef f(): return g()",
    ),
    "helper in a table": (
        "def g(): return 1\nT = {'g': g}\ndef f(k): return T[k]()",
        "def g(): return 2\nT = {'g': g}\ndef f(k): return T[k]()",
    ),
    "partial": (
        "import functools\ndef g(x): return 1\np = functools.partial(g, 1)\ndef f(): return p()",
        "import functools\ndef g(x): return 1\np = functools.partial(g, 2)\ndef f(): return p()",
    ),
    "partial's function": (
        "import functools\ndef g(x): return 1\np = functools.partial(g, 1)\ndef f(): return p()",
        "import functools\ndef g(x): return 2\np = functools.partial(g, 1)\ndef f(): return p()",
    ),
    "cached helper": (
        "import functools\n@functools.cache\ndef g(): return 1\ndef f(): return g()",
        "import functools\n@functools.cache\ndef g(): return 2\ndef f(): return g()",
    ),
    "method": (
        "class C:\n def m(self): return 1\ndef f(): return C().m()",
        "class C:\n def m(self): return 2\ndef f(): return C().m()",
    ),
    "property": (
        "class C:\n @property\n def m(self): return 1\ndef f(): return C().m",
        "class C:\n @property\n def m(self): return 2\ndef f(): return C().m",
    ),
    "static method": (
        "class C:\n @staticmethod\n def m(): return 1\ndef f(): return C.m()",
        "class C:\n @staticmethod\n def m(): return 2\ndef f(): return C.m()",
    ),
    "class attribute": ("class C:\n K = 1\ndef f(): return C.K", "class C:\n K = 2\ndef f(): return C.K"),
    "base class": (
        "class B:\n def m(self): return 1\nclass C(B): ...\ndef f(): return C().m()",
        "class B:\n def m(self): return 2\nclass C(B): ...\ndef f(): return C().m()",
    ),
    "other base": (
        "class A: ...\nclass B: ...\nclass C(A): ...\ndef f(): return C()",
        "class A: ...\nclass B: ...\nclass C(B): ...\ndef f(): return C()",
    ),
    "class of an instance": (
        "class C:\n def m(self): return 1\nc = C()\ndef f(): return c.m()",
        "class C:\n def m(self): return 2\nc = C()\ndef f(): return c.m()",
    ),
    "state of an instance": (
        "class C:\n def __init__(self, n): self.n = n\nc = C(1)\ndef f(): return c.n",
        "class C:\n def __init__(self, n): self.n = n\nc = C(2)\ndef f(): return c.n",
    ),
    "dataclass field": (
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n n: int = 1\ndef f(): return C()",
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n n: int = 2\ndef f(): return C()",
    ),
    "enum": (
        "import enum\nclass C(enum.Enum):\n A = 1\ndef f(): return C.A",
        "import enum\nclass C(enum.Enum):\n A = 2\ndef f(): return C.A",
    ),
    "own wrapper": (
        f"{WRAPPER} def inner(): return g() + 1\n return inner\n@w\ndef f(): return 1",
        f"{WRAPPER} def inner(): return g() + 2\n return inner\n@w\ndef f(): return 1",
    ),
    "wrapped by own wrapper": (
        f"{WRAPPER} def inner(): return g()\n return inner\n@w\ndef f(): return 1",
        f"{WRAPPER} def inner(): return g()\n return inner\n@w\ndef f(): return 2",
    ),
    "wrapped without saying so": (
        "def w(g):\n def inner(): return g()\n return inner\n@w\ndef f(): return 1",
        "def w(g):\n def inner(): return g()\n return inner\n@w\ndef f(): return 2",
    ),
    "context manager": (
        "import contextlib\n@contextlib.contextmanager\ndef g(): yield 1\ndef f():\n with g() as x: return x",
        "import contextlib\n@contextlib.contextmanager\ndef g(): yield 2\ndef f():\n with g() as x: return x",
    ),
    "single dispatch": (
        f"{DISPATCHER}@g.register\ndef _(x: int): return 1\ndef f(x): return g(x)",
        f"{DISPATCHER}@g.register\ndef _(x: int): return 2\ndef f(x): return g(x)",
    ),
    "self's other method": (
        "class C:\n def f(self): return self.g()\n def g(self): return 1\nf = C.f",
        "class C:\n def f(self): return self.g()\n def g(self): return 2\nf = C.f",
    ),
    "self's constant": (
        "class C:\n K = 1\n def f(self): return self.K\nf = C.f",
        "class C:\n K = 2\n def f(self): return self.K\nf = C.f",
    ),
    "super": (
        "class B:\n def f(self): return 1\nclass C(B):\n def f(self): return super().f()\nf = C.f",
        "class B:\n def f(self): return 2\nclass C(B):\n def f(self): return super().f()\nf = C.f",
    ),
    "mutual recursion": (
        "def g(n): return f(n - 1)\ndef f(n): return n and g(n)",
        "def g(n): return f(n - 2)\ndef f(n): return n and g(n)",
    ),
    "callable object": (
        "class C:\n def __call__(self): return 1\nf = C()",
        "class C:\n def __call__(self): return 2\nf = C()",
    ),
    "object with a method called like a container's": (
        "class V:\n def __init__(self, x): self.x = x\n def add(self, y): return self.x + y\n"
        "o = V(1)\ndef f(): return o.add(1)",
        "class V:\n def __init__(self, x): self.x = x\n def add(self, y): return self.x + y\n"
        "o = V(2)\ndef f(): return o.add(1)",
    ),
    "attribute beside one that is set": (
        "import types\ns = types.SimpleNamespace(k=1)\ndef f():\n s.last = 1\n return s.k",
        "import types\ns = types.SimpleNamespace(k=2)\ndef f():\n s.last = 1\n return s.k",
    ),
    "class default beside an assignment to self": (
        "class C:\n k = 1\n def f(self):\n  old = self.k\n  self.k = 3\n  return old\nf = C.f",
        "class C:\n k = 2\n def f(self):\n  old = self.k\n  self.k = 3\n  return old\nf = C.f",
    ),
    "model in a field": (
        "import pydantic\nclass A(pydantic.BaseModel):\n x: int = 1\nclass B(pydantic.BaseModel):\n a: list[A]\n"
        "def f(): return B.model_validate({'a': [{}]})",
        "import pydantic\nclass A(pydantic.BaseModel):\n x: int = 2\nclass B(pydantic.BaseModel):\n a: list[A]\n"
        "def f(): return B.model_validate({'a': [{}]})",
    ),
    "validator": (
        "import pydantic\nclass A(pydantic.BaseModel):\n x: int\n @pydantic.field_validator('x')\n @classmethod\n"
        " def v(cls, x): return x\ndef f(): return A(x=1)",
        "import pydantic\nclass A(pydantic.BaseModel):\n x: int\n @pydantic.field_validator('x')\n @classmethod\n"
        " def v(cls, x): return x + 1\ndef f(): return A(x=1)",
    ),
    "default factory": (
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n x: list = dataclasses.field(default_factory=list)\n"
        "def f(): return C()",
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n x: list = dataclasses.field(default_factory=dict)\n"
        "def f(): return C()",
    ),
    "attrs field": (
        "import attrs\n@attrs.define\nclass C:\n x: int = attrs.field(default=1, converter=int)\ndef f(): return C()",
        "import attrs\n@attrs.define\nclass C:\n x: int = attrs.field(default=1, converter=str)\ndef f(): return C()",
    ),
    "enum of a member": (
        "import enum\nclass E(enum.Enum):\n A = 1\n def m(self): return 1\na = E.A\ndef f(): return a.m()",
        "import enum\nclass E(enum.Enum):\n A = 1\n def m(self): return 2\na = E.A\ndef f(): return a.m()",
    ),
    "named tuple": (
        "from typing import NamedTuple\nclass T(NamedTuple):\n x: int = 1\ndef f(): return T()",
        "from typing import NamedTuple\nclass T(NamedTuple):\n x: int = 2\ndef f(): return T()",
    ),
    "evaluated annotation": ("def f(x: int): return x", "def f(x: float): return x"),
    "built-in on self": (
        "class C:\n def __len__(self): return 1\n def f(self): return len(self)\nf = C.f",
        "class C:\n def __len__(self): return 2\n def f(self): return len(self)\nf = C.f",
    ),
    "self handed on": (
        "class C:\n def g(self): return 1\n def f(self): return h(self)\ndef h(c): return c.g()\nf = C.f",
        "class C:\n def g(self): return 2\n def f(self): return h(self)\ndef h(c): return c.g()\nf = C.f",
    ),
    "self in a variable": (
        "class C:\n def g(self): return 1\n def f(self):\n  me = self\n  return me.g()\nf = C.f",
        "class C:\n def g(self): return 2\n def f(self):\n  me = self\n  return me.g()\nf = C.f",
    ),
    "class of self": (
        "class C:\n k = 1\n def f(self): return type(self).k\nf = C.f",
        "class C:\n k = 2\n def f(self): return type(self).k\nf = C.f",
    ),
    "__class__ of self": (
        "class C:\n k = 1\n def f(self): return self.__class__.k\nf = C.f",
        "class C:\n k = 2\n def f(self): return self.__class__.k\nf = C.f",
    ),
    "getattr on self": (
        "class C:\n k = 1\n def f(self): return getattr(self, 'k')\nf = C.f",
        "class C:\n k = 2\n def f(self): return getattr(self, 'k')\nf = C.f",
    ),
    "self called": (
        "class C:\n def __call__(self): return 1\n def f(self): return self()\nf = C.f",
        "class C:\n def __call__(self): return 2\n def f(self): return self()\nf = C.f",
    ),
    "self indexed": (
        "class C:\n def __getitem__(self, i): return 1\n def f(self): return self[0]\nf = C.f",
        "class C:\n def __getitem__(self, i): return 2\n def f(self): return self[0]\nf = C.f",
    ),
    "self entered": (
        "class C:\n def __enter__(self): return 1\n def f(self):\n  with self: return 0\nf = C.f",
        "class C:\n def __enter__(self): return 2\n def f(self):\n  with self: return 0\nf = C.f",
    ),
    "attribute hook": (
        "class C:\n def __getattr__(self, name): return 1\n def f(self): return self.missing\nf = C.f",
        "class C:\n def __getattr__(self, name): return 2\n def f(self): return self.missing\nf = C.f",
    ),
    "hook of all attributes": (
        "class C:\n k = 0\n def __getattribute__(self, name): return 1\n def f(self): return self.k\nf = C.f",
        "class C:\n k = 0\n def __getattribute__(self, name): return 2\n def f(self): return self.k\nf = C.f",
    ),
    "hook of all settings": (
        "class C:\n def __setattr__(self, n, v): self.__dict__[n] = v + 1\n def f(self): self.x = 1\nf = C.f",
        "class C:\n def __setattr__(self, n, v): self.__dict__[n] = v + 2\n def f(self): self.x = 1\nf = C.f",
    ),
    "setter": (
        "class C:\n p = property(None, lambda self, v: print(1))\n def f(self): self.p = 1\nf = C.f",
        "class C:\n p = property(None, lambda self, v: print(2))\n def f(self): self.p = 1\nf = C.f",
    ),
    "object made by a class method": (
        "class C:\n def g(self): return 1\n @classmethod\n def f(cls): return cls().g()\nf = C.f",
        "class C:\n def g(self): return 2\n @classmethod\n def f(cls): return cls().g()\nf = C.f",
    ),
    "self in a closure": (
        "class C:\n def g(self): return 1\n def f(self): return (lambda: self.g())()\nf = C.f",
        "class C:\n def g(self): return 2\n def f(self): return (lambda: self.g())()\nf = C.f",
    ),
    "class of a global iterator": (
        "class C:\n def __iter__(self): return self\n def __next__(self): return 1\nc = C()\ndef f(): return next(c)",
        "class C:\n def __iter__(self): return self\n def __next__(self): return 2\nc = C()\ndef f(): return next(c)",
    ),
    "state of an object with its own pickling": (
        "class C:\n def __init__(self, x): self.x = x\n def __getstate__(self): ...\nc = C(1)\ndef f(): return c.x",
        "class C:\n def __init__(self, x): self.x = x\n def __getstate__(self): ...\nc = C(2)\ndef f(): return c.x",
    ),
    "options of a script": (
        "import argparse\noptions = argparse.Namespace(rate=1)\ndef f(): return options.rate",
        "import argparse\noptions = argparse.Namespace(rate=2)\ndef f(): return options.rate",
    ),
    "static method in a variable": (
        "g = staticmethod(lambda: 1)\ndef f(): return g()",
        "g = staticmethod(lambda: 2)\ndef f(): return g()",
    ),
    "async": ("def f(x): return x", "async def f(x): return x"),
    "decorator of an inner function": (
        "import functools\ndef f():\n @functools.lru_cache(1)\n def g(): return 1\n return g()",
        "import functools\ndef f():\n @functools.lru_cache(2)\n def g(): return 1\n return g()",
    ),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_matters(load: Load, one: str, other: str) -> None:
    """B15: the body, defaults, constants, helpers and classes that a function reaches change its meaning."""
    before, again, after = meaning(load(one)), meaning(load("# moved\n" + one)), meaning(load(other))
    assert before == again
    assert before != after


@pytest.mark.parametrize("edit", [edit for edit in DIFFERENT if edit != "evaluated annotation"])
def test_what_matters_without_source(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K8: where there is no source, the bytecode tells the same edits apart."""
    one, other = DIFFERENT[edit]

    def execute(text: str) -> Meaning:
        module = ModuleType("nowhere")
        monkeypatch.setitem(sys.modules, "nowhere", module)
        exec(text, vars(module))
        return meaning(module)

    assert execute(one) == execute("\n\n" + one)
    assert execute(one) != execute(other)


def test_names_of_changed_helpers(load: Load) -> None:
    """B28: of everything that a function reaches, exactly the edited helper's digest changes."""
    text = """
        LIMIT = 3
        def parse(x): return x
        def clean(x): return parse(x)[:LIMIT]
        class Store:
            def put(self, x): return clean(x)
        def f(x): return Store().put(x)
    """
    before = meaning(load(text))
    after = meaning(load(text.replace("def parse(x): return x", "def parse(x): return x.strip()")))
    assert set(before.helpers) == {"weather.Store", "weather.clean()", "weather.parse()"}
    assert before.own == after.own
    assert {name for name in before.helpers if before.helpers[name] != after.helpers[name]} == {
        "weather.parse()"
    }


def test_helpers_in_other_modules(load: Load) -> None:
    """B15: `helpers.clean` of an own module is followed, whatever way it was imported."""
    for text in (
        "import cleaning\ndef f(x): return cleaning.clean(x)",
        "from cleaning import clean\ndef f(x): return clean(x)",
        "def f(x):\n    from cleaning import clean\n    return clean(x)",
        "def f(x):\n    import cleaning as c\n    return c.clean(x)",
    ):
        load("def clean(x): return 1", "cleaning")
        before = meaning(load(text))
        load("def clean(x): return 2", "cleaning")
        after = meaning(load(text))
        assert before.own == after.own
        assert before.helpers != after.helpers


def test_import_in_the_body_is_not_run(load: Load, tmp_path: Path) -> None:
    """A key does not run the imports of a body, and is the same before and after they have run."""
    (tmp_path / "lazy.py").write_text("import deeper\nK = deeper.K")
    (tmp_path / "deeper.py").write_text("K = 1")
    text = "def f():\n    import lazy\n    return lazy.K"
    before = meaning(load(text))
    assert "lazy" not in sys.modules
    try:
        module = load(text)
        assert module.f() == 1
        assert meaning(load(text)) == before
        (tmp_path / "deeper.py").write_text("K = 2")
        assert meaning(load(text)).helpers != before.helpers
    finally:
        for name in ("lazy", "deeper"):
            sys.modules.pop(name, None)


def test_libraries_are_not_followed(load: Load) -> None:
    """The standard library and installed packages count by name."""
    found = meaning(
        load("import json, numpy, pydantic\ndef f(x): return json.dumps(numpy.sum(x), pydantic.BaseModel)")
    )
    assert found.helpers == {}


def test_closures_with_equal_text(load: Load) -> None:
    """B15: two closures with equal text and different cells differ; with equal cells they are equal."""
    make = load("def make(n):\n    def f(x): return x + n\n    return f").make
    assert source_meaning(make(1)) == source_meaning(make(1))
    assert source_meaning(make(1)) != source_meaning(make(2))
    assert source_meaning(make(1)) != source_meaning(make(True))


def test_lambdas_on_one_line(load: Load) -> None:
    """Lambdas on one line are told apart, nested ones too, and found again when the line moves."""
    text = "a, b, c, d = lambda x: x + 1, lambda x: x + 2, (lambda: lambda: 1)(), lambda: (lambda: 1)"
    digests = []
    for moved in ("", "# moved\n"):
        module = load(moved + text)
        digests.append([source_meaning(getattr(module, name)).own for name in "abcd"])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 4


def test_lambda_comment(load: Load) -> None:
    """B15: a comment beside a lambda does not matter."""
    assert meaning(load("f = lambda x: x + 1")) == meaning(load("f = (lambda x:  # why\n    x + 1)"))


def test_follow_helpers_off(load: Load) -> None:
    """`follow_helpers=False` stops at the function: helpers count by name, its own constants still do."""
    one = load("K = 1\ndef g(): return 1\ndef f(): return g() + K").f
    two = load("K = 1\ndef g(): return 2\ndef f(): return g() + K").f
    three = load("K = 2\ndef g(): return 2\ndef f(): return g() + K").f
    assert source_meaning(one, follow_helpers=False) == source_meaning(two, follow_helpers=False)
    assert source_meaning(two, follow_helpers=False) != source_meaning(three, follow_helpers=False)
    assert source_meaning(one, follow_helpers=False).helpers == {}


STATE = {
    "nonlocal": "def make():\n n = 0\n def f():\n  nonlocal n\n  n += 1\n return f\nf = make()",
    "global": "n = 0\ndef f():\n global n\n n += 1",
    "lazy global": "c = None\ndef f():\n global c\n if c is None: c = [1]\n return c",
    "list": "calls = []\ndef f(x=1): calls.append(x)",
    "list in a closure": "def make():\n calls = []\n def f(x=1): calls.append(x)\n return f\nf = make()",
    "dict": "n = {'n': 0}\ndef f(): n['n'] += 1",
    "dict item": "seen = {}\ndef f(x=1): seen[x] = len(seen)",
    "defaultdict": "import collections\nn = collections.Counter()\ndef f(x=1): n[x] += 1",
    "attribute": "import types\ns = types.SimpleNamespace(n=0)\ndef f(): s.n += 1",
    "in a helper": "calls = []\ndef g(): calls.append(1)\ndef f():\n g()\n return len(calls)",
    "in a nested function": "calls = []\ndef f():\n def g(): calls.append(1)\n g()",
    "by a method": "class C:\n n = 0\n def hit(self): self.n += 1\nc = C()\ndef f(): c.hit()",
    "by a method's method": f"{COUNTER}c = C()\ndef f(): c.hit()",
    "class attribute": "class C:\n n = 0\ndef f(): C.n += 1",
    "class attribute from a method": "class C:\n n = 0\n @classmethod\n def f(cls): cls.n += 1\nf = C.f",
    "function attribute": "def f(): f.n = getattr(f, 'n', 0) + 1",
    "mutable default": "def f(x=1, seen={}): seen[x] = len(seen)",
    "nested containers": "n = {'a': {'n': 0}, 'l': []}\ndef f():\n n['a']['n'] += 1\n n['l'].append(1)",
    "computed key": "n = {}\ndef f(x=1): n[f'{x}'] = n.get(f'{x}', 0) + 1",
    "item's method": "import collections\nn = collections.defaultdict(list)\ndef f(x=1): n[x].append(1)",
    "through a local": "n = {'a': []}\ndef f():\n a = n['a']\n a.append(1)\n for each in n.values(): each.append(2)",
    "method as a value": "n = []\ndef f(): list(map(n.append, [1]))",
    "slice": "n = []\ndef f(): n[len(n):] = [1]",
    "called object": "class C:\n n = 0\n def __call__(self): self.n += 1\nc = C()\ndef f(): c()",
    "passed to a helper": "n = {}\ndef h(d): d['n'] = d.get('n', 0) + 1\ndef g(d): h(d)\ndef f(): g(n)",
    "passed by keyword": "n = []\ndef g(x, *, to): to.append(x)\ndef f(): g(1, to=n)",
    "iterator": "import itertools\nn = itertools.count()\ndef f(): return next(n)",
    "library cache": "import functools\n@functools.cache\ndef g(x): return x\ndef f(): return g(1)",
    "random": "import random\nr = random.Random(1)\ndef f(): return r.random()",
}


@pytest.mark.parametrize("text", STATE.values(), ids=STATE)
@pytest.mark.parametrize("source", [True, False], ids=["source", "bytecode"])
def test_state_is_not_meaning(load: Load, text: str, source: bool) -> None:
    """What the code itself binds anew or changes is its state: running it does not change its meaning."""
    if source:
        f = load(text).f
    else:
        namespace: dict[str, Any] = {"__name__": "nowhere"}
        exec(text, namespace)
        f = namespace["f"]
    before = source_meaning(f)
    f()
    assert is_warm(f)
    assert source_meaning(f) == before
    f()
    assert source_meaning(f, follow_helpers=False) == source_meaning(f, follow_helpers=False)


def test_warm_walk_sees_changes(load: Load) -> None:
    """A reused walk notices rebound and changed constants, replaced code, defaults, methods and helpers."""
    module = load("""
        LIMIT = 1
        TABLE = {"a": [1]}
        class C:
            K = 1
            def m(self): return 1
        def g(): return 1
        def other(): return 2
        def f(x=1): return LIMIT, TABLE, C().m(), g()
    """)
    seen = [meaning(module)]

    def changed() -> None:
        now = meaning(module)
        assert now not in seen
        assert meaning(module) == now
        assert is_warm(module.f)
        seen.append(now)

    assert is_warm(module.f)
    module.LIMIT = 2
    assert not is_warm(module.f)
    changed()
    module.TABLE["a"].append(2)
    changed()
    module.C.m = lambda self: 3
    changed()
    module.C.K = 2
    changed()
    module.g.__code__ = module.other.__code__
    changed()
    module.g = module.other
    changed()
    module.f.__defaults__ = (2,)
    changed()


def test_is_warm_does_not_read(load: Load) -> None:
    """`is_warm` is false before the first walk, and for a large mutable constant always."""
    module = load("def f(): return 1")
    assert not is_warm(module.f)
    meaning(module)
    assert is_warm(module.f)
    module = load("T = list(range(100_000))\ndef f(): return T")
    meaning(module)
    assert not is_warm(module.f)


def test_file_changed_since_import(load: Load, tmp_path: Path) -> None:
    """A function whose file says something else by now is not taken for what the file says."""
    module = load("def f(): return 1")
    (tmp_path / "weather.py").write_text("def f(): return 2")
    stale = meaning(module)
    assert stale != meaning(load("def f(): return 2"))
    assert stale != meaning(load("def f(): return 1"))  # bytecode never equals source
    module = load("def f(): return 1")
    (tmp_path / "weather.py").unlink()
    assert meaning(module) == stale


def test_notebook_cells() -> None:
    """A cell's source is found in linecache; a comment in it does not matter."""

    def cell(text: str) -> Meaning:
        name = f"<ipython-input-{len(linecache.cache)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), namespace)
        return source_meaning(namespace["f"])

    assert cell("def f(): return 1\n") == cell("# why\ndef f():\n    return 1\n")
    assert cell("def f(): return 1\n") != cell("def f(): return 2\n")


def test_user_annotations_under_future_import(load: Load) -> None:
    """Annotations that are never evaluated do not matter: of locals, and all under the future import."""
    future = "from __future__ import annotations\n"
    assert meaning(load(future + "def f(x: int) -> int: return x")) == meaning(
        load(future + "def f(x): return x")
    )
    assert meaning(load("def f(x):\n y: int = x\n return y")) == meaning(load("def f(x):\n y = x\n return y"))


class _Pinned:
    """Has what a task has: the function it runs, and the version that pins it."""

    def __init__(self, fn: Callable[..., Any], version: str | None = None) -> None:
        self.fn, self.version = fn, version
        self.__wrapped__ = fn

    def __call__(self) -> Any:
        return self.fn()


_Pinned.__module__ = "onceflow.engine"


def test_tasks_as_helpers(load: Load) -> None:
    """Other tasks are followed to their functions; one with a version counts by the version."""

    def called(text: str, version: str | None) -> Meaning:
        module = load(text + "\ndef f(): return other()")
        module.other = _Pinned(module.other, version)
        return meaning(module)

    one, two = "def other(): return 1", "def other(): return 2"
    assert set(called(one, None).helpers) == {"weather.other()"}
    assert called(one, None) != called(two, None)
    assert called(one, "1") == called(two, "1")
    assert called(one, "1") != called(one, "2")


def test_recursive_task(load: Load) -> None:
    """A task that calls itself does not become its own helper."""
    module = load("def f(n): return n and f(n - 1)")
    plain = module.f
    module.f = _Pinned(plain)
    assert source_meaning(plain).helpers == {}


def test_methods_and_owners(load: Load) -> None:
    """What a method reaches through `self` depends on the class of `self`."""
    module = load("""
        class A:
            def f(self): return self.g()
            def g(self): return 1
        class B(A):
            def g(self): return 2
    """)
    assert source_meaning(module.A().f) != source_meaning(module.B().f)
    assert source_meaning(module.A().f) == source_meaning(module.A.f)
    assert source_meaning(module.B.f, owner=module.B) == source_meaning(module.B().f)


def test_other_methods_do_not_matter(load: Load) -> None:
    """A method that only takes and sets attributes of `self` by name depends on those, not on its whole class."""
    text = """
        class Base:
            def g(self, step): return step
        class C(Base):
            def __init__(self): self.n = 0
            def f(self, seen):
                self.n = 1
                self.n += 1
                self.n, self.m = 2, 3
                self.items = [self.k for _ in seen if self.k]
                def inner(): return self.k + self.g(1)
                del self.m
                if super().g(2):
                    return self
                return inner, lambda: self.k
            k = 1
            def other(self): return 1
    """
    before = source_meaning(load(text).C.f)
    assert before == source_meaning(load(text.replace("other(self): return 1", "other(self): return 2")).C.f)
    assert before != source_meaning(load(text.replace("k = 1", "k = 2")).C.f)


def test_classes_of_arguments(load: Load) -> None:
    """B15: beside INPUTS, the methods that an argument brings along count; without, and left out, they do not."""
    text = """
        import dataclasses
        class Base:
            def price(self, x): return x * self.rate
        @dataclasses.dataclass
        class Plan(Base):
            rate: float
        @dataclasses.dataclass
        class Plain:
            rate: float
        async def f(plan, x=0): return plan.price(x)
    """
    policies = [INPUTS + TASK_SOURCE, TASK_SOURCE, INPUTS, INPUTS - "plan" + TASK_SOURCE]

    def keys(text: str, make: Callable[[Any], Any]) -> list[str | None]:
        module = load(text)
        tasks = [task(cache_policy=policy)(module.f) for policy in policies]
        return [asyncio.run(each.cache_key(make(module), 1)) for each in tasks]

    edited = text.replace("x * self.rate", "x + self.rate")
    for make in (lambda m: m.Plan(2.0), lambda m: [m.Plan(2.0)], lambda m: {"a": m.Plan(2.0)}):
        before, after = keys(text, make), keys(edited, make)
        assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True, True]
    assert keys(text, lambda m: m.Plain(2.0)) == keys(edited, lambda m: m.Plain(2.0))


def test_self_is_no_given_class(load: Load) -> None:
    """A task that is a method depends on what it takes from `self`, although `self` is among the inputs."""
    text = """
        class C:
            async def f(self): return self.g()
            def g(self): return 1
            def other(self): return 1
    """

    def key(text: str) -> str | None:
        module = load(text)
        module.C.f = task(cache_policy=INPUTS + TASK_SOURCE)(module.C.f)
        bound: Any = module.C().f
        found: str | None = asyncio.run(bound.cache_key())
        return found

    assert key(text) == key(text.replace("other(self): return 1", "other(self): return 2"))
    assert key(text) != key(text.replace("g(self): return 1", "g(self): return 2"))


@pytest.mark.parametrize(
    "body",
    [
        "return getattr(helpers, 'LIMIT')",
        "return limit_of(helpers)",
        "h = helpers\n    return h.LIMIT",
        "return {'h': helpers}['h'].LIMIT",
    ],
    ids=["getattr", "handed on", "in a variable", "in a container"],
)
def test_modules_used_as_a_whole(load: Load, body: str) -> None:
    """B15: an own module that is handed on or kept counts with all that it says; a library's by its name."""
    text = f"import helpers\ndef limit_of(m): return m.LIMIT\ndef f():\n    {body}"
    load("LIMIT = 1", "helpers")
    before = meaning(load(text))
    load("LIMIT = 1  # a comment", "helpers")
    assert meaning(load(text)) == before
    load("LIMIT = 2", "helpers")
    after = meaning(load(text))
    assert {name for name in after.helpers if after.helpers[name] != before.helpers.get(name)} == {
        "helpers (module)"
    }
    assert meaning(load("import math\ndef f(): return getattr(math, 'pi')")).helpers == {}


def test_unkeyable_globals_count_by_type(load: Load) -> None:
    """A module-level client or logger has no content: its type counts, and it is no error."""
    text = "import logging, threading\nlog = logging.getLogger({!r})\nlock = threading.{}()\n"
    text += "def f(): log.info(lock)"
    assert meaning(load(text.format("a", "Lock"))) == meaning(load(text.format("b", "Lock")))
    assert meaning(load(text.format("a", "Lock"))) != meaning(load(text.format("a", "Event")))


def test_wraps_copies_no_memo() -> None:
    """functools.wraps copies attributes; what is remembered of a function is not taken for its wrapper's."""

    def g() -> int:
        return 1

    before = source_meaning(g)

    @functools.wraps(g)
    def f() -> int:
        return g() + 1

    assert source_meaning(f) != before


@pytest.mark.parametrize("python", PYTHONS, ids=str)
@pytest.mark.parametrize("limit", [60, pytest.param(None, marks=pytest.mark.chaos)], ids=["some", "whole"])
def test_trees_are_stable(python: Path, limit: int | None) -> None:
    """Every function of the standard library has the same digest on every Python that can parse it."""
    library = sysconfig.get_path("stdlib")
    ours = tree_digests(library, limit)
    with Elsewhere(python) as ask:
        found = ask("tree_digests(library, limit)", library=library, limit=limit)
    assert len(ours) > 500
    assert {name for name in ours if name in found and found[name] != ours[name]} == set()


def test_same_meaning_in_other_pythons(load: Load, tmp_path: Path) -> None:
    """A module's functions mean the same in every Python, also through classes, closures and constants."""
    text = textwrap.dedent("""
        import dataclasses, enum, functools, re
        LIMIT, NAMES, PATTERN = 3, {"b", "a", "c"}, re.compile("a+")
        class Kind(enum.Enum):
            A = "a"
        @dataclasses.dataclass(slots=True)
        class Point:
            x: int
            kind: Kind = Kind.A
            def far(self): return [self.x * LIMIT for _ in NAMES if self.x]
        def wrap(g):
            @functools.wraps(g)
            def inner(*args, **kwargs): return g(*args, **kwargs)
            return inner
        class Tally:
            def __init__(self, x): self.x = x
            def up(self):
                self.x += 1
                return self
            def all(self): return [self.x for _ in range(3)], lambda: self.x
            def whole(self): return len(self), f"{self}"
        class Sum(Tally):
            def up(self): return super().up()
        @wrap
        def clean(x, *, strict=True): return PATTERN.sub("", f"{x!r:>{LIMIT}}")
        async def f(x):
            total = 0
            async for each in x:
                try:
                    total += Point(each).far() + Sum(each).up().x
                except* ValueError:
                    del total
            match x:
                case {"a": [1, *rest], **others}: return rest, others
                case Point(x=1) | None: return clean(x)
            return sorted(x, key=lambda each: (each, total))
    """)
    here = meaning(load(text))
    code = "sys.path.insert(0, path) or tuple(source_meaning(__import__('weather').f))"
    for python in PYTHONS:
        with Elsewhere(python) as ask:
            assert ask(code, path=str(tmp_path)) == tuple(here), python
