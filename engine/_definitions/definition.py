"""What tasks and flows share: a function with options, resolved once, at declaration."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar

from ...storage._values.serializers import serializer_by_name
from .._concurrency.limits import Gate
from .._errors import ConfigurationError
from .._keys import policies
from .._keys.policies import CacheKeyFnPolicy, CachePolicy, NonePolicy
from .._runs.machine import Retry, retry_rule
from .._runs.run import FlowRun, TaskRun
from .keycache import KnownKeys
from .options import Hook, check_delays, check_known, check_retries, hooks_of, seconds_of

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Definition(Generic[P, R]):
    """A function with its options. Made by `@task` and `@flow`; never changed but by adding hooks."""

    kind: ClassVar[str]
    _options: ClassVar[type]

    def __init__(self, fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
        check_known(self.kind.split()[0].lower(), options, self._options)
        self.fn = fn
        self.__wrapped__ = fn
        self._stated = {name: value for name, value in options.items() if value is not None}
        said = self._stated.get
        self.name: str = said("name") or _name_of(fn)
        self.__name__ = self.name
        self.__qualname__ = getattr(fn, "__qualname__", self.name)
        self.__module__ = getattr(fn, "__module__", None) or type(fn).__module__
        self.__doc__ = inspect.getdoc(fn)
        self.description: str | None = said("description") or self.__doc__
        self.version: str | int | None = said("version")
        self.tags = self._checked_tags(said("tags", ()))
        if self.tags:
            self._stated["tags"] = self.tags  # the caller's own collection may change
        self.signature = _signature_of(fn)
        self._bind = _binder(self.signature)
        check_retries(self.kind, self.name, self._stated)
        self.retries: int | None = said("retries")
        self.retry_delay_seconds = said("retry_delay_seconds")
        self.retry_jitter_factor: float | None = said("retry_jitter_factor")
        self.retry_condition_fn: Callable[..., Any] | None = said("retry_condition_fn")
        self._check_callable("retry_condition_fn", self.retry_condition_fn)
        self.timeout_seconds = seconds_of(said("timeout_seconds"))
        self.log_prints: bool | None = said("log_prints")
        self.is_bare = self.timeout_seconds is None and self.log_prints is None
        """Whether no option stands between a run and its body."""
        self.hooks: dict[str, list[Hook]] = hooks_of(self._stated)
        self._settle_caching()
        self.known = KnownKeys(self)
        self._rule: Retry | None = None
        if self.retries is not None and (self.retries == 0 or self.retry_delay_seconds is not None):
            self._rule = self._rule_from(self.retries, self.retry_delay_seconds)

    def _check_callable(self, option: str, value: Any) -> None:
        if value is not None and not callable(value):
            raise TypeError(f"{option} of {self.name!r} takes a callable, not {value!r}.")

    def _checked_tags(self, tags: Any) -> frozenset[str]:
        if isinstance(tags, Iterable) and not isinstance(tags, str):
            checked = frozenset(tags)
            if all(isinstance(tag, str) for tag in checked):
                return checked
        raise TypeError(f"tags of {self.name!r} takes a list of texts, such as ['database'], not {tags!r}.")

    # --- caching

    def _settle_caching(self) -> None:
        """Resolve the options that decide whether, where and under which key results persist."""
        said = self._stated.get
        self.cache_expiration: timedelta | None = said("cache_expiration")
        self.refresh_cache: bool | None = said("refresh_cache")
        self.result_storage = said("result_storage")
        self.result_serializer = said("result_serializer")
        if self.result_serializer is not None:
            serializer_by_name(self.result_serializer)  # a wrong name is an error here, not in a run's log
        self.result_storage_key: str | None = said("result_storage_key")
        self.cache_key_fn: Callable[..., Any] | None = said("cache_key_fn")
        self._check_callable("cache_key_fn", self.cache_key_fn)
        policy: CachePolicy | None = said("cache_policy")
        if policy is not None and not isinstance(policy, CachePolicy):
            raise TypeError(
                f"cache_policy of {self.name!r} takes a CachePolicy such as INPUTS, not {policy!r}."
            )
        persist: bool | None = said("persist_result")
        if persist is False:
            if policy is not None and not isinstance(policy, NonePolicy):
                _warn(f"{self.name!r} has persist_result=False, so its cache_policy {policy!r} is ignored.")
            self._set_policy(False, policies.NONE, stated=True)
            return
        if self.cache_key_fn is not None:
            if policy is not None:
                _warn(f"{self.name!r} has both a cache_key_fn and a cache_policy; the function wins.")
            by_function = CacheKeyFnPolicy(self.cache_key_fn)
            for option in ("key_storage", "isolation_level", "lock_manager", "lock_timeout"):
                setattr(by_function, option, getattr(policy, option, None))
            policy = by_function
        stated = policy is not None
        implied = (stated and not isinstance(policy, NonePolicy)) or any(
            option in self._stated for option in ("result_storage", "result_serializer", "result_storage_key")
        )
        if policy is None and self.result_storage_key is None:
            policy = self._default_policy()
        self._set_policy(True if implied and persist is None else persist, policy, stated)

    def _set_policy(self, persist: bool | None, policy: CachePolicy | None, stated: bool) -> None:
        self.persist = persist
        self.cache_policy = policy
        self.is_policy_stated = stated

    def _default_policy(self) -> CachePolicy | None:
        raise NotImplementedError

    @property
    def persist_result(self) -> bool | None:
        """Whether results persist; None where that is left to the flow and the settings."""
        return self.persist

    owner: type | None = None
    """The class of the object that a method is bound to: what `self.…` in its code means."""

    # --- running

    body: Callable[[Any], Awaitable[R]]
    """Runs the function once, for a run of this definition."""
    is_timed_whole = True
    """Whether the timeout is for the body as a whole, and not for each value that it yields."""
    is_limited = False
    """Whether there is a limit of the definition's own on how many runs execute, or begin."""

    def gate(self, run: TaskRun | FlowRun) -> Gate | None:
        """The limits that a run has to pass before its body runs."""
        return None

    # --- retries

    def _rule_from(self, retries: int, delays: Any) -> Retry:
        if callable(delays):
            delays = delays(retries)
            check_delays(self.kind, self.name, delays)
        return retry_rule(retries, delays, self.retry_jitter_factor, self.retry_condition_fn is not None)

    def rule_for(self, run: TaskRun | FlowRun) -> Retry | None:
        """When a run tries again: as stated here, else as the settings say; None for never."""
        if self._rule is not None:
            return self._rule
        retries, delays = self._default_retries(run)
        if self.retries is not None:
            retries = self.retries
        return self._rule_from(retries, delays) if retries else None

    def _default_retries(self, run: TaskRun | FlowRun) -> tuple[int, Any]:
        raise NotImplementedError

    # --- hooks

    def _add_hook(self, event: str, hook: F) -> F:
        if not callable(hook):
            raise TypeError(f"{event} takes a callable, but {hook!r} cannot be called.")
        self.hooks.setdefault(event, []).append(hook)
        self._stated[event] = self.hooks[event]
        return hook

    def on_running(self, hook: F) -> F:
        """Call `hook(task_or_flow, run, state)` at the start of every attempt."""
        return self._add_hook("on_running", hook)

    def on_completion(self, hook: F) -> F:
        """Call `hook(task_or_flow, run, state)` when a run completes, Cached included."""
        return self._add_hook("on_completion", hook)

    def on_failure(self, hook: F) -> F:
        """Call `hook(task_or_flow, run, state)` when a run has failed for good."""
        return self._add_hook("on_failure", hook)

    def on_commit(self, hook: F) -> F:
        """Call `hook(transaction)` when a run's record was committed."""
        return self._add_hook("on_commit", hook)

    def on_rollback(self, hook: F) -> F:
        """Call `hook(transaction)` when the transaction that a run belongs to is rolled back."""
        return self._add_hook("on_rollback", hook)

    # --- options and arguments

    def _merged(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The stated options with others over them; a key function and a policy displace each other."""
        merged = {**self._stated, **options}
        for option, other in (("cache_policy", "cache_key_fn"), ("cache_key_fn", "cache_policy")):
            if options.get(option) is not None and other not in options:
                merged.pop(other, None)
        states_key = options.get("cache_policy") is not None or options.get("cache_key_fn") is not None
        if states_key and "persist_result" not in options and merged.get("persist_result") is False:
            merged.pop("persist_result")
        for event in self.hooks:
            if event not in options:
                merged[event] = list(self.hooks[event])
        return merged

    def _with(self, options: Mapping[str, Any]) -> Self:
        return type(self)(self.fn, self._merged(options))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by parameter name, defaults applied.

        Raises:
            TypeError: They do not fit the signature.
        """
        return self._bind(args, kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=7)


def _name_of(fn: Callable[..., Any]) -> str:
    if isinstance(fn, functools.partial):
        return _name_of(fn.func)
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return "lambda" if name == "<lambda>" else str(name)


def unwrapped(fn: Any) -> Any:
    """The function inside of partials."""
    return unwrapped(fn.func) if isinstance(fn, functools.partial) else fn


def is_async(fn: Any) -> bool:
    """Whether calling it gives a coroutine: an async function, or an object with an async `__call__`."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(unwrapped(fn), "__call__", None)  # noqa: B004 - see above
    )


def _signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a callable; any, where it says nothing of them, as `int` and `max` do not."""
    try:
        return inspect.signature(fn)
    except ValueError:
        kinds = {"args": inspect.Parameter.VAR_POSITIONAL, "kwargs": inspect.Parameter.VAR_KEYWORD}
        return inspect.Signature([inspect.Parameter(name, kind) for name, kind in kinds.items()])


def _binder(signature: inspect.Signature) -> Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]:
    """A function that binds arguments: a plain dict merge where the signature allows, else inspect's own way."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    parameters = list(signature.parameters.values())
    names = tuple(signature.parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    known = frozenset(names)

    def slowly(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def quickly(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = len(args)
        if (
            given <= len(names)
            and kwargs.keys() <= known
            and not (kwargs and kwargs.keys() & set(names[:given]))
        ):
            bound = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            if len(bound) == len(names):
                return {name: bound[name] for name in names}
        return slowly(args, kwargs)  # raises the error that the user expects

    return quickly if all(p.kind in plain for p in parameters) else slowly


def check_no_wait_for(kind: str, name: str, signature: inspect.Signature) -> None:
    """`wait_for` belongs to the engine."""
    if "wait_for" in signature.parameters:
        raise ConfigurationError(
            f"{kind} {name!r} has a parameter wait_for, which the engine keeps for itself.",
            "Name it otherwise.",
        )
