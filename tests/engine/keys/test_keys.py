"""Which calls share a key, and which must not."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import (
    DEFAULT,
    FLOW_PARAMETERS,
    INPUTS,
    NONE,
    RUN_ID,
    TASK_SOURCE,
    CachePolicy,
    Engine,
    flow,
    get_run_context,
    quote,
    task,
)
from onceflow.engine._errors import UpstreamFailedError
from pydantic import BaseModel, Field, PrivateAttr, SecretStr
from stored_records import keys_in

DEV = Path(__file__).parents[3] / ".dev"

pytestmark = pytest.mark.usefixtures("engine")


def key_of(policy: CachePolicy, inputs: dict[str, Any], **extra: Any) -> Any:
    """The key outside of any run, as a policy of the user's own would ask for it."""
    return policy.compute_key(None, inputs, extra.pop("flow_parameters", None), **extra)


@task(cache_policy=INPUTS)
async def plain(a: int, b: int = 2, *, c: int = 3) -> int:
    return a + b + c


@task(cache_policy=INPUTS)
async def identity(x: object) -> object:
    return x


def test_inputs_make_the_key() -> None:
    """K1: inputs that differ in name or value have different keys, equal inputs the same one."""
    key = key_of(INPUTS, {"x": 42})
    assert key == key_of(INPUTS, {"x": 42})
    assert (
        len({key, key_of(INPUTS, {"x": 43}), key_of(INPUTS, {"y": 42}), key_of(INPUTS, {"x": 42, "y": 1})})
        == 4
    )


def test_a_name_and_value_cannot_be_mistaken_for_another_pair() -> None:
    """K1: no way of cutting names and values apart gives another call's key."""
    cuts = [
        {"a": "b=c"},
        {"a=b": "c"},
        {"a": "b", "c": ""},
        {"a": "bc"},
        {"ab": "c"},
        {"a'": "b"},
        {"a": "'b"},
    ]
    assert len({key_of(INPUTS, cut) for cut in cuts}) == len(cuts)


# fmt: off
VALUES: list[Any] = [
    True, 1, 1.0, "1", b"1", (1,), [1], {1: "x"}, {"1": "x"}, {1}, frozenset({1}), None, 0, False, "",
    0.0, -0.0, 1 + 0j, bytearray(b"1"), range(1), (), [], {}, set(),
]
# fmt: on


async def test_values_that_compare_equal_but_are_not_the_same_have_keys_of_their_own() -> None:
    """K1: `True`, `1`, `1.0`, `"1"`, `b"1"`, `(1,)`, `[1]`, `{1: x}`, `{"1": x}` all differ, also within."""
    keys = [await identity.cache_key(value) for value in VALUES]
    keys += [await identity.cache_key({"within": value}) for value in VALUES]
    assert None not in keys
    assert len(set(keys)) == 2 * len(VALUES)


def test_inputs_look_at_nothing_else() -> None:
    """K2: context, flow parameters and extra arguments leave the key of INPUTS alone."""
    assert len({key_of(INPUTS, {"x": 42}), key_of(INPUTS, {"x": 42}, flow_parameters={"z": 1}),
                key_of(INPUTS, {"x": 42}, unknown=object())}) == 1  # fmt: skip


async def test_an_excluded_input_does_not_count() -> None:
    """K3: with INPUTS - 'b' only the others count, however the call is written."""
    leaving_out = plain.with_options(cache_policy=INPUTS - "b")
    assert (
        await leaving_out.cache_key(1, 2)
        == await leaving_out.cache_key(1, b=7)
        == await leaving_out.cache_key(1)
    )
    assert await leaving_out.cache_key(2, 2) != await leaving_out.cache_key(1, 2)
    assert await leaving_out.cache_key(1, c=4) != await leaving_out.cache_key(1)


async def test_an_excluded_input_may_have_no_key() -> None:
    """K3: a client that has no key does no harm once it is left out."""

    @task(cache_policy=INPUTS - "client")
    async def ask(client: object, question: str) -> str:
        return question

    assert (
        await ask.cache_key(threading.Lock(), "q") == await ask.cache_key(threading.Lock(), "q") is not None
    )


class Meters:
    def __init__(self, value: float, label: str) -> None:
        self.value = value
        self.label = label


class Feet(Meters):
    pass


async def test_a_registered_stabiliser_decides_for_its_type() -> None:
    """K4: values that stabilise alike share a key; those of other types are unaffected."""
    CachePolicy.register(Meters, lambda meters: meters.value)
    before = await identity.cache_key(3.0)
    assert await identity.cache_key(Meters(3.0, "a")) == await identity.cache_key(Meters(3.0, "b"))
    assert await identity.cache_key([Meters(3.0, "a")]) == await identity.cache_key([Meters(3.0, "b")])
    assert await identity.cache_key(Meters(3.0, "a")) != await identity.cache_key(Meters(4.0, "a"))
    assert await identity.cache_key(3.0) == before != await identity.cache_key(Meters(3.0, "a"))


async def test_a_type_with_its_own_key() -> None:
    """K4: `__cache_key__` says what of an object counts."""

    class Connection:
        def __init__(self, host: str) -> None:
            self.host, self.lock = host, threading.Lock()

        def __cache_key__(self) -> str:
            return self.host

    key = await identity.cache_key(Connection("a"))
    assert key is not None
    assert key == await identity.cache_key(Connection("a")) != await identity.cache_key(Connection("b"))
    assert key != await identity.cache_key("a")


async def test_inputs_of_a_task_without_arguments_have_no_key(engine: Engine) -> None:
    """K5: INPUTS alone gives a task without arguments no key, for all such tasks would share it."""

    @task(cache_policy=INPUTS)
    async def nothing() -> int:
        return 1

    assert await nothing.cache_key() is None
    assert [(await nothing.run_to_state()).name for _ in range(2)] == ["Completed", "Completed"]
    assert await keys_in(engine.storage) == []
    assert await nothing.with_options(cache_policy=INPUTS + TASK_SOURCE).cache_key() is not None
    assert await identity.with_options(cache_policy=INPUTS - "x").cache_key(1) is None


def variant(body: str, **names: Any) -> Callable[..., Any]:
    """An async function `f` of the given text, as a file of that text would define it."""
    space = {"__name__": "variant", **names}
    exec(compile(f"async def f(x):\n    {body}\n", "<variant>", "exec"), space)
    return space["f"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("policy", [TASK_SOURCE, INPUTS + TASK_SOURCE])
async def test_the_code_makes_the_key(policy: CachePolicy) -> None:
    """K6: another function text is another key."""

    def first() -> Any:
        async def f(x: int) -> int:
            return x + 1

        return task(cache_policy=policy)(f)

    def second() -> Any:
        async def f(x: int) -> int:
            return x + 2

        return task(cache_policy=policy)(f)

    assert await first().cache_key(1) == await first().cache_key(1) is not None
    assert await first().cache_key(1) != await second().cache_key(1)


async def test_meaning_counts_and_looks_do_not() -> None:
    """B15: comments, formatting, docstrings and decorator options leave the key alone."""

    def bare() -> Any:
        @task(cache_policy=TASK_SOURCE)
        async def f(x: int) -> int:
            return x * 2

        return f

    def dressed() -> Any:
        @task(cache_policy=TASK_SOURCE, retries=3, tags=["a"], name="other")
        async def f(
            x: int,
        ) -> int:
            """Doubles."""
            # twice
            return (  # formatted otherwise
                x * 2
            )

        return f

    assert await bare().cache_key(1) == await dressed().cache_key(1) is not None


def scaled_by(factor: int) -> Any:
    @task(cache_policy=INPUTS + TASK_SOURCE)
    async def scale(x: int) -> int:
        return x * factor

    return scale


async def test_closures_of_equal_text_do_not_share() -> None:
    """B15: two closures whose cells differ do not serve each other's results."""
    assert await scaled_by(2)(10) == 20
    assert await scaled_by(3)(10) == 30
    assert (await scaled_by(2).run_to_state(10)).name == "Cached"


RATE = 2


def helper(x: int) -> int:
    return x * RATE


@task(cache_policy=INPUTS + TASK_SOURCE)
async def with_helper(x: int) -> int:
    return helper(x)


def other_helper(x: int) -> int:
    return x * RATE + 1


async def test_changed_constants_and_helpers_make_it_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """B15: a module constant that a helper reads, and the helper itself, belong to the code."""
    assert await with_helper(10) == 20
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "RATE", 3)
        assert await with_helper(10) == 30
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "helper", other_helper)
        assert await with_helper(10) == 21
    assert (await with_helper.run_to_state(10)).name == "Cached"
    alone = with_helper.with_options(cache_policy=INPUTS + TASK_SOURCE.configure(follow_helpers=False))
    key = await alone.cache_key(10)
    monkeypatch.setitem(globals(), "RATE", 4)
    assert await alone.cache_key(10) == key


async def test_a_version_pins_the_code() -> None:
    """K6: `version=` counts in place of the code."""
    one = task(
        variant("return x"),
    ).with_options(cache_policy=TASK_SOURCE, version="1")
    other = task(variant("return x + 1")).with_options(cache_policy=TASK_SOURCE, version="1")
    assert await one.cache_key(1) == await other.cache_key(1) is not None
    assert await one.with_options(version="2").cache_key(1) != await one.cache_key(1)


async def test_a_function_without_text_is_keyed_by_its_code() -> None:
    """K6: a function whose text is nowhere to be read is still told apart by what it does."""
    one, other = (
        task(variant(body)).with_options(cache_policy=TASK_SOURCE) for body in ("return x", "return -x")
    )
    assert await one.cache_key(1) is not None
    assert await one.cache_key(1) != await other.cache_key(1)


class Adder:
    def __init__(self, n: int) -> None:
        self.n = n

    async def __call__(self, x: int) -> int:
        return x + self.n


async def test_a_callable_object_has_a_key() -> None:
    """K8: a callable object is keyed by its code and what it holds."""
    one, other = (task(Adder(n)).with_options(cache_policy=INPUTS + TASK_SOURCE) for n in (1, 2))
    assert await one(1) == 2
    assert (await one.run_to_state(1)).name == "Cached"
    assert await other(1) == 3


async def test_default_sees_inputs_code_and_run() -> None:
    """K9, K10, K11: DEFAULT has another key for other inputs, other code and another flow run."""

    @flow
    async def keys() -> list[str | None]:
        first = identity.with_options(cache_policy=DEFAULT)
        second = task(cache_policy=DEFAULT)(variant("return [x]"))
        return [
            await first.cache_key(1),
            await first.cache_key(1),
            await first.cache_key(2),
            await second.cache_key(1),
        ]

    once, again = await keys(), await keys()
    assert once[0] == once[1]
    assert None not in once
    assert len({*once, *again}) == 6


async def test_without_a_flow_the_run_itself_makes_the_key() -> None:
    """K10: outside a flow RUN_ID is the task run's own id, so that nothing is shared."""
    alone = identity.with_options(cache_policy=DEFAULT)
    assert await alone.cache_key(1) != await alone.cache_key(1)
    assert [(await alone.run_to_state(1)).name for _ in range(2)] == ["Completed", "Completed"]


async def test_run_id_is_the_flow_runs_for_all_tasks_in_it() -> None:
    """K10: with RUN_ID alone a task runs once in a flow run, its nested callers included."""

    @task(cache_policy=RUN_ID)
    async def inner() -> int:
        return random.getrandbits(60)

    @task
    async def outer() -> int:
        return await inner()

    @flow
    async def twice() -> tuple[int, int]:
        return await inner(), await outer()

    one, other = await twice(), await twice()
    assert one[0] == one[1] != other[0] == other[1]


async def test_flow_parameters_make_the_key() -> None:
    """K12: with FLOW_PARAMETERS another parameter runs the task again; in one flow run it is Cached."""
    ran: list[int] = []

    @task(cache_policy=FLOW_PARAMETERS)
    async def work(x: int) -> int:
        ran.append(x)
        return x

    @flow
    async def parent(day: int) -> list[str]:
        return [(await work.run_to_state(1)).name, (await work.run_to_state(2)).name]

    assert await parent(1) == ["Completed", "Cached"]
    assert await parent(2) == ["Completed", "Cached"]
    assert await parent(1) == ["Cached", "Cached"]
    assert ran == [1, 1]


async def test_flow_parameters_outside_a_flow_say_absent() -> None:
    """K12: without a flow FLOW_PARAMETERS alone has no key, and in a sum it differs from not being there."""
    assert await identity.with_options(cache_policy=FLOW_PARAMETERS).cache_key(1) is None
    with_it = await identity.with_options(cache_policy=INPUTS + FLOW_PARAMETERS).cache_key(1)
    assert with_it is not None
    assert with_it != await identity.cache_key(1)


async def test_none_has_no_key() -> None:
    """K13: NONE never gives a key."""
    assert key_of(NONE, {"x": 1}) is None
    assert await identity.with_options(cache_policy=NONE, persist_result=True).cache_key(1) is None


def test_a_bare_policy_is_not_implemented() -> None:
    """K14: the base class refuses, and says what to override."""
    with pytest.raises(NotImplementedError, match="compute_key"):
        key_of(CachePolicy(), {})


async def test_a_key_function_gets_context_and_inputs() -> None:
    """K15: a key function is given the run (task, ids) and the bound inputs, futures resolved."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def by_everything(context: Any, parameters: dict[str, Any]) -> str:
        seen.append((context, parameters))
        return "key"

    @task
    async def one() -> int:
        return 1

    @task(cache_key_fn=by_everything)
    async def work(x: object, y: list[object], z: int = 3) -> str:
        run = get_run_context()
        return run.id

    @flow
    async def parent() -> tuple[str, str]:
        return get_run_context().id, await work(one.submit(), y=[one.submit()])

    flow_id, task_id = await parent()
    [(context, parameters)] = seen
    assert parameters == {"x": 1, "y": [1], "z": 3}
    assert (context.task.name, context.task_run.id, context.flow_run.id) == ("work", task_id, flow_id)
    assert (context.task_run.flow_run_id, context.task_run_id) == (flow_id, task_id)


async def test_asking_for_the_key_of_a_call_with_futures() -> None:
    """K15: cache_key() and invalidate() see the values of futures, alone and in containers, as the call does."""

    @task
    async def one() -> int:
        return 1

    @task
    async def none() -> int:
        raise LookupError

    @flow
    async def parent() -> None:
        key = await identity.cache_key(1)
        assert await identity.cache_key(one.submit()) == await identity.cache_key(quote(1)) == key is not None
        assert await identity.cache_key([one.submit()]) == await identity.cache_key([1])
        await identity(1)
        assert await identity.invalidate(one.submit())
        assert not await identity.invalidate(1)
        with pytest.raises(UpstreamFailedError):
            await identity.cache_key(none.submit())

    await parent()


async def test_a_key_function_cannot_change_the_call() -> None:
    """K15: what a key function does to its dictionary does not reach the body."""

    def greedy(context: object, parameters: dict[str, Any]) -> str:
        parameters.clear()
        return "greedy"

    assert await identity.with_options(cache_key_fn=greedy)(5) == 5


async def test_the_way_a_call_is_written_does_not_matter() -> None:
    """K16: positional, keyword and default arguments share a key."""
    keys = {await plain.cache_key(1), await plain.cache_key(1, 2), await plain.cache_key(b=2, a=1),
            await plain.cache_key(1, c=3), await plain.cache_key(a=1, c=3, b=2)}  # fmt: skip
    assert len(keys) == 1
    assert None not in keys


async def test_variable_arguments_are_inputs() -> None:
    """K16: *args and **kwargs count, and cannot be mistaken for each other."""

    @task(cache_policy=INPUTS)
    async def loose(*args: object, **kwargs: object) -> None:
        pass

    keys = [await loose.cache_key(1, 2), await loose.cache_key((1, 2)), await loose.cache_key(a=1, b=2),
            await loose.cache_key({"a": 1, "b": 2}), await loose.cache_key(1, 2, a=1)]  # fmt: skip
    assert len(set(keys)) == 5
    assert await loose.cache_key(b=2, a=1) == keys[2]


@dataclass
class Account:
    owner: str

    @task(cache_policy=INPUTS)
    async def greet(self, word: str) -> str:
        return f"{word} {self.owner}"

    @task(cache_policy=INPUTS)
    @classmethod
    async def kind(cls, word: str) -> str:
        return f"{word} {cls.__name__}"

    @task(cache_policy=INPUTS)
    @staticmethod
    async def plain(word: str) -> str:
        return word


class SavingsAccount(Account):
    pass


async def test_self_is_an_input() -> None:
    """K17: two instances do not share, equal ones do; classes count likewise."""
    kinds: list[Any] = [Account, SavingsAccount]
    assert [await Account(owner).greet("hi") for owner in ("a", "b")] == ["hi a", "hi b"]
    assert (await Account("a").greet.run_to_state("hi")).name == "Cached"
    assert [await each.kind("x") for each in kinds] == ["x Account", "x SavingsAccount"]
    of_instance: Any = Account("a")
    assert await of_instance.plain.cache_key("w") == await Account.plain.cache_key("w") is not None


async def test_a_key_of_the_run_id_reuses_within_the_run() -> None:
    """K19: a key function that returns the flow run's id serves the first value to every call of that run."""

    @task(cache_key_fn=lambda context, parameters: context.flow_run.id)
    async def work(x: int) -> int:
        return x

    @flow
    async def parent(first: int) -> list[tuple[str, int]]:
        states = [await work.run_to_state(first), await work.run_to_state(99)]
        return [(state.name, state.result()) for state in states]

    assert await parent(1) == [("Completed", 1), ("Cached", 1)]
    assert await parent(2) == [("Completed", 2), ("Cached", 2)]


def count_up() -> Iterator[int]:
    yield from range(3)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (threading.Lock, "lock"),
        (count_up, "generator"),
        (object, "object"),
        (lambda: map(str, [1]), "map"),
        (lambda: [count_up()], "generator"),
    ],
)
async def test_an_input_without_a_key_is_not_cached(
    engine: Engine, caplog: pytest.LogCaptureFixture, make: Callable[[], object], kind: str
) -> None:
    """K20: the task completes, nothing is stored, and one message names argument and remedies."""
    with caplog.at_level(logging.WARNING, "onceflow"):
        state = await identity.run_to_state(make())
    assert state.name == "Completed"
    assert await keys_in(engine.storage) == []
    [record] = caplog.records
    message = record.getMessage()
    for part in ("x", kind, "INPUTS - 'x'", "__cache_key__", "NONE"):
        assert part in message


async def test_a_generator_argument_is_not_consumed() -> None:
    """B1: the body sees every item of a generator that was passed to a cached task."""

    @task(cache_policy=INPUTS)
    async def total(numbers: Iterator[int], also: list[Iterator[int]]) -> int:
        return sum(numbers) + sum(also[0])

    assert await total(count_up(), [count_up()]) == 6
    assert await total(iter([1, 2]), [map(int, "12")]) == 6


async def test_a_part_without_a_key_means_no_key(engine: Engine) -> None:
    """K21: when one part of a compound cannot be computed, no call is served from the rest."""
    compound = identity.with_options(cache_policy=INPUTS + TASK_SOURCE + RUN_ID)
    streams = [iter([1]), iter([2])]

    @flow
    async def both() -> list[object]:
        return [list(await compound(stream)) for stream in streams]  # type: ignore[call-overload]

    assert await both() == [[1], [2]]
    assert await keys_in(engine.storage) == []


class Refusing(CachePolicy):
    def compute_key(self, task_ctx: Any, inputs: Any, flow_parameters: Any, **kwargs: Any) -> str:
        raise RuntimeError("no answer")


async def test_a_policy_that_raises_means_no_key(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """K21: a policy of the user's own that raises leaves the call uncached, and the task completes."""
    refusing = identity.with_options(cache_policy=INPUTS + Refusing())
    assert [(await refusing.run_to_state(1)).name for _ in range(2)] == ["Completed", "Completed"]
    assert await keys_in(engine.storage) == []
    assert "no answer" in caplog.text


async def test_a_parameter_that_has_no_key_hides_no_other() -> None:
    """K21: flow parameters that have no key leave the task uncached, and its inputs alone do not serve."""

    @flow
    async def parent(stream: Any, x: int) -> str:
        return (await identity.with_options(cache_policy=INPUTS + FLOW_PARAMETERS).run_to_state(x)).name

    assert [await parent(iter([1]), 1), await parent(iter([2]), 1)] == ["Completed", "Completed"]


@dataclass
class Blob:
    name: str
    data: bytes


async def test_objects_with_bytes_are_hits() -> None:
    """K24: equal objects with bytes in them share a record, others do not."""
    states = [await identity.run_to_state(Blob("a", bytes(range(256)))) for _ in range(2)]
    assert [state.name for state in states] == ["Completed", "Cached"]
    assert states[0].result() == states[1].result()
    assert (await identity.run_to_state(Blob("a", b""))).name == "Completed"


async def test_tasks_share_by_inputs_and_not_by_code() -> None:
    """K25: two tasks share records under INPUTS alone, and do not under INPUTS + TASK_SOURCE."""

    async def one(x: int) -> str:
        return "one"

    async def two(x: int) -> str:
        return "two"

    by_inputs = [task(fn).with_options(cache_policy=INPUTS) for fn in (one, two)]
    by_code = [task(fn).with_options(cache_policy=INPUTS + TASK_SOURCE) for fn in (one, two)]
    assert [await each(1) for each in by_inputs] == ["one", "one"]
    assert [await each(1) for each in by_code] == ["one", "two"]


class Vault:
    def __init__(self, secret: str) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return "Vault(***)"

    def __str__(self) -> str:
        return "***"


class Model(BaseModel):
    shown: int = 1
    hidden: int = Field(default=1, exclude=True)
    _private: int = PrivateAttr(default=1)


async def test_secrets_private_fields_and_key_types_count() -> None:
    """B16: what a repr hides still makes another key."""

    def private(value: int) -> Model:
        model = Model()
        model._private = value
        return model

    pairs: list[tuple[object, object]] = [
        (Vault("a"), Vault("b")),
        (SecretStr("a"), SecretStr("b")),
        (Model(hidden=1), Model(hidden=2)),
        (private(1), private(2)),
        ({1: "x"}, {"1": "x"}),
        ({"a": {1}}, {"a": {True}}),
    ]
    for one, other in pairs:
        keys = {await identity.cache_key(one), await identity.cache_key(other)}
        assert len(keys) == 2 or keys == {None}, (one, other)


SETS = """
import asyncio
from onceflow.engine import INPUTS, task

@task(cache_policy=INPUTS)
async def f(x): pass

print(asyncio.run(f.cache_key([{"a", "b", "c", "d"}, frozenset("xyz"), {"k": {("p", 1), ("q", 2)}}])))
"""


async def test_sets_have_one_key_in_every_process() -> None:
    """B16: the hash seed of a process does not reach the key."""

    def key(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(DEV)}
        run = subprocess.run(
            [sys.executable, "-c", SETS], env=environment, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    keys = {await asyncio.to_thread(key, seed) for seed in ("1", "2", "3")}
    assert len(keys) == 1
    assert all(len(key) == 64 for key in keys)
