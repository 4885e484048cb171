"""How objects are encoded: values of the standard library, enums, dataclasses, models, own classes.

An object of the user's own class is its class's qualified name and its whole state: every attribute and slot,
those of pydantic's private and extra fields too, but not what `functools.cached_property` left behind. That
holds for dataclasses, attrs classes, models, named tuples and enums of any origin, since their state is their
fields. Of everything else that is not listed here nothing is known (it may hold a connection, a position, a
lock), so it is refused, unread.

Longer than most modules because it is one table of types, which is to be read in one place.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import fractions
import functools
import ipaddress
import operator
import pathlib
import re
import struct
import types
import typing
import uuid
import zoneinfo
from array import array
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from .encoding import Encoder, Handler, RefusedError, buffer, finds, finds_first, forget_handlers, handles
from .names import is_heap_type, is_user_class, is_user_function, module_name, qualified_name, type_name

# --- keys given by the user, before everything else

_registered: dict[type, Callable[[Any], Any]] = {}


def register(type_: type, key_of: Callable[[Any], Any]) -> None:
    """Encode values of `type_`, and of its subclasses, by type and by what `key_of(value)` returns."""
    _registered[type_] = key_of
    forget_handlers()


@finds_first
def _given_key(kind: type) -> Handler | None:
    for base in kind.__mro__:
        if base in _registered:
            return functools.partial(_by_key, _registered[base])
        if "__cache_key__" in vars(base):
            own = base.__dict__["__cache_key__"]
            return (
                Encoder.refuse
                if own is None
                else functools.partial(_by_key, lambda value: value.__cache_key__())
            )
    return None


def _by_key(key_of: Callable[[Any], Any], encode: Encoder, value: Any) -> bytes:
    key = key_of(value)
    if key is value:
        raise RefusedError(f"{type_name(type(value))} whose __cache_key__() is itself")
    return encode.state(type_name(type(value)), b"key" + encode.within(".__cache_key__()", key), {})


# --- the standard library's values: type → what one of its values holds


def _clock(value: dt.time | dt.datetime) -> bytes:
    return b"%d:%d:%d.%d/%d" % (value.hour, value.minute, value.second, value.microsecond, value.fold)


def _day(value: dt.date) -> bytes:
    return b"%d-%d-%d" % (value.year, value.month, value.day)


def _decimal(encode: Encoder, value: decimal.Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    return f"{sign} {''.join(map(str, digits))} {exponent}".encode()


def _ordered(encode: Encoder, value: Mapping[Any, Any]) -> bytes:
    return encode.sequence(b"l", list(value)) + encode.sequence(b"l", list(value.values()))


Content = Callable[[Encoder, Any], bytes]
_CONTENT: dict[type, Content] = {
    collections.OrderedDict: _ordered,
    collections.defaultdict: lambda encode, value: (
        encode.mapping(b"d", dict(dict.items(value)))
        + encode.within(".default_factory", value.default_factory)
    ),
    collections.deque: lambda encode, value: encode.sequence(b"l", list(value)) + encode(value.maxlen),
    collections.ChainMap: lambda encode, value: encode.within(".maps", value.maps),
    collections.UserDict: lambda encode, value: encode.within(".data", value.data),
    collections.UserList: lambda encode, value: encode.within(".data", value.data),
    collections.UserString: lambda encode, value: encode(value.data),
    dict: lambda encode, value: encode.mapping(b"d", dict(dict.items(value))),
    list: lambda encode, value: encode.sequence(b"l", list(list.__iter__(value))),
    tuple: lambda encode, value: encode.sequence(b"t", tuple(tuple.__iter__(value))),
    set: lambda encode, value: encode.set(b"h", list(set.__iter__(value))),
    frozenset: lambda encode, value: encode.set(b"z", list(frozenset.__iter__(value))),
    str: lambda encode, value: encode(str.__str__(value)),
    bytes: lambda encode, value: encode(bytes.__getitem__(value, slice(None))),
    bytearray: lambda encode, value: buffer(b"a", value),
    bool: lambda encode, value: encode(value),
    int: lambda encode, value: encode(int.__int__(value)),
    float: lambda encode, value: encode(float.__float__(value)),
    complex: lambda encode, value: encode(complex.__complex__(value)),
    dt.datetime: lambda encode, value: (
        _day(value) + b"T" + _clock(value) + encode.within(".tzinfo", value.tzinfo)
    ),
    dt.date: lambda encode, value: _day(value),
    dt.time: lambda encode, value: _clock(value) + encode.within(".tzinfo", value.tzinfo),
    dt.timedelta: lambda encode, value: b"%d %d %d" % (value.days, value.seconds, value.microseconds),
    dt.timezone: lambda encode, value: encode(value.utcoffset(None)) + encode(value.tzname(None)),
    decimal.Decimal: _decimal,
    fractions.Fraction: lambda encode, value: encode(value.numerator) + encode(value.denominator),
    uuid.UUID: lambda encode, value: value.bytes,
    pathlib.PurePath: lambda encode, value: encode(str(value)),
    range: lambda encode, value: encode(value.start) + encode(value.stop) + encode(value.step),
    slice: lambda encode, value: (
        encode.within(".start", value.start)
        + encode.within(".stop", value.stop)
        + encode.within(".step", value.step)
    ),
    re.Pattern: lambda encode, value: encode(value.pattern) + encode(value.flags),
    array: lambda encode, value: encode(value.typecode) + buffer(b"a", value),
    memoryview: lambda encode, value: (
        encode(value.format)
        + encode(value.shape)
        + buffer(b"a", value if value.c_contiguous else value.tobytes())
    ),
    ipaddress.IPv4Address: lambda encode, value: encode(str(value)),
    ipaddress.IPv6Address: lambda encode, value: encode(str(value)),
    ipaddress.IPv4Network: lambda encode, value: encode(str(value)),
    ipaddress.IPv6Network: lambda encode, value: encode(str(value)),
    ipaddress.IPv4Interface: lambda encode, value: encode(str(value)),
    ipaddress.IPv6Interface: lambda encode, value: encode(str(value)),
    types.SimpleNamespace: lambda encode, value: encode.state(
        "", b"", encode.counted(value, dict(vars(value)))
    ),
    types.MappingProxyType: lambda encode, value: encode.mapping(b"d", dict(value)),
    type({}.keys()): lambda encode, value: encode.set(b"h", list(value)),
    type({}.values()): lambda encode, value: encode.sequence(b"l", list(value)),
    type({}.items()): lambda encode, value: encode.mapping(b"d", dict(value)),
    # Equal names must mean equal code: what a library calls <lambda> or makes inside a function has no name.
    functools.partial: lambda encode, value: (
        encode.within(".func", value.func)
        + encode.within(".args", value.args)
        + encode.within(".keywords", value.keywords)
    ),
    struct.Struct: lambda encode, value: encode(value.format),
    operator.itemgetter: lambda encode, value: encode(value.__reduce__()[1]),
    operator.attrgetter: lambda encode, value: encode(value.__reduce__()[1]),
    operator.methodcaller: lambda encode, value: encode(_methodcaller(value)),
}


def _methodcaller(value: Any) -> tuple[Any, ...]:
    maker, args = value.__reduce__()[:2]  # a partial where there are keywords
    return (maker.args, maker.keywords, args) if isinstance(maker, functools.partial) else args


@finds
def _zone(kind: type) -> Handler | None:
    if issubclass(kind, zoneinfo.ZoneInfo):
        return lambda encode, value: (
            encode.refuse(value)
            if value.key is None
            else encode.state(type_name(kind), encode(value.key), {})
        )
    if issubclass(kind, dt.tzinfo) and module_name(kind).startswith(("pytz", "dateutil.tz")):
        if "local" in kind.__name__:  # means another zone on another machine
            return Encoder.refuse
        # pytz: a zone, and which of its offsets this instance stands for. dateutil: all of it is in the repr.
        return lambda encode, value: encode.state(
            type_name(kind), encode(getattr(value, "zone", None)) + encode(repr(value)), {}
        )
    return None


# --- code


def _by_name(encode: Encoder, value: Any) -> bytes:
    return encode.named(b"@", qualified_name(value))


@handles(types.FunctionType)
def _function(encode: Encoder, value: types.FunctionType) -> bytes:
    # Equal names mean equal code only where a library gives them at its top level.
    importable = "<" not in value.__qualname__ and not value.__closure__
    return _by_name(encode, value) if importable and not is_user_function(value) else encode.on_code(value)


@handles(types.MethodType)
def _method(encode: Encoder, value: types.MethodType) -> bytes:
    return encode.node("method", (".__func__", value.__func__), (".__self__", value.__self__))


@handles(types.BuiltinFunctionType, types.MethodWrapperType)
def _builtin(encode: Encoder, value: types.BuiltinFunctionType) -> bytes:
    if value.__self__ is None or isinstance(value.__self__, types.ModuleType):
        return _by_name(encode, value)
    return encode.node("method", ("", value.__name__), (".__self__", value.__self__))


@handles(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)
def _descriptor(encode: Encoder, value: types.MethodDescriptorType) -> bytes:
    return encode.node("descriptor", ("", value.__name__), (".__objclass__", value.__objclass__))


@handles(staticmethod, classmethod)
def _unbound(encode: Encoder, value: Any) -> bytes:
    return encode.node(type(value).__name__, (".__func__", value.__func__))


@handles(types.ModuleType)
def _module(encode: Encoder, value: types.ModuleType) -> bytes:
    return encode.named(b"m", value.__name__)


@handles(type(functools.lru_cache(lambda: None)))
def _cached_function(encode: Encoder, value: Any) -> bytes:
    return encode.node("lru_cache", (".__wrapped__", value.__wrapped__))


@finds
def _class(kind: type) -> Handler | None:
    if issubclass(kind, type):
        return lambda encode, value: (
            encode.on_code(value) if is_user_class(value) else _by_name(encode, value)
        )
    return None


@finds
def _annotation(kind: type) -> Handler | None:
    if module_name(kind) not in ("types", "typing") or kind in (types.GeneratorType, types.CodeType):
        return None
    generic = getattr(typing, "_BaseGenericAlias", types.GenericAlias)
    if hasattr(kind, "__args__") or issubclass(kind, (types.GenericAlias, generic)):
        return lambda encode, value: encode.node(
            "annotation",
            ("", getattr(value, "_name", None) or "Union"),
            (".__origin__", getattr(value, "__origin__", None)),
            (".__args__", getattr(value, "__args__", ())),
            (".__metadata__", getattr(value, "__metadata__", ())),
        )
    if issubclass(kind, typing.TypeVar | typing.ParamSpec | typing._SpecialForm | typing.NewType):
        return lambda encode, value: encode.named(
            b"@", f"{module_name(value)}.{getattr(value, '__name__', value)}"
        )
    return None


# --- objects by their state


@finds
def _enum(kind: type) -> Handler | None:
    if not issubclass(kind, enum.Enum):
        return None
    name, own = type_name(kind), is_user_class(kind)

    def encode_member(encode: Encoder, value: Any) -> bytes:
        if own:
            encode.met(kind)
        return encode.node("enum " + name, ("._name_", value._name_), (".value", value._value_))

    return encode_member


@finds
def _exception(kind: type) -> Handler | None:
    if not issubclass(kind, BaseException):
        return None
    native = next(base for base in kind.__mro__ if not is_heap_type(base))
    attributes = _attributes_of(kind, native)
    reduce: Any = native.__reduce__

    def encode_exception(encode: Encoder, value: BaseException) -> bytes:
        # The native reduction, and not an own one: OSError keeps its file name out of `args`.
        args = reduce(value)[1]
        return encode.state(type_name(kind), encode.within(".args", args), attributes(value))

    return encode_exception


@finds
def _onceflow(kind: type) -> Handler | None:
    """Tasks and flows are code. Futures, states, clients of storages are nothing that could be compared."""
    if module_name(kind).partition(".")[0] != __name__.partition(".")[0]:
        return None
    return lambda encode, value: (
        encode.on_code(value) if callable(getattr(value, "__wrapped__", None)) else encode.refuse(value)
    )


@finds
def _pydantic(kind: type) -> Handler | None:
    name = type_name(kind)
    for base in kind.__mro__:
        module = module_name(base)
        if module == "pydantic.main" and base.__name__ == "BaseModel":
            return _model(kind, base)
        if module == "pydantic.types" and "get_secret_value" in vars(base):
            return lambda encode, value: encode.state(name, encode(value.get_secret_value()), {})
        if module in ("pydantic_core._pydantic_core", "pydantic.networks") and base.__name__.endswith("Url"):
            return lambda encode, value: encode.state(name, encode(str(value)), {})
    return None


def _model(kind: type, base: type) -> Handler:
    attributes, own = _attributes_of(kind, base), is_user_class(kind)

    def encode_model(encode: Encoder, value: Any) -> bytes:
        if own:
            encode.met(kind)
        private, extra = value.__pydantic_private__, value.__pydantic_extra__
        state = encode.counted(value, {**attributes(value), **(private or {})})
        return encode.state(type_name(kind), encode.within("", extra), state)

    return encode_model


@finds
def _namespace(kind: type) -> Handler | None:
    """The options of a script: argparse is not imported for their sake."""
    if kind.__name__ != "Namespace" or module_name(kind) != "argparse":
        return None
    return lambda encode, value: encode.state(type_name(kind), b"", encode.counted(value, dict(vars(value))))


@finds
def _plain(kind: type) -> Handler | None:
    """Named tuples, dataclasses, attrs classes, subclasses of builtin values, and objects of own classes."""
    base = next((base for base in kind.__mro__ if base in _CONTENT), object)
    content = _CONTENT.get(base)
    name, attributes = type_name(kind), _attributes_of(kind, base)
    own = is_user_class(kind)
    if not _is_transparent(kind, base):
        return functools.partial(_by_own_pickling, attributes) if _is_own(kind, base) else None
    fields = kind.__dict__.get("_fields") if base is tuple else None

    def encode_plain(encode: Encoder, value: Any) -> bytes:
        if own:
            encode.met(kind)
        if fields is not None and len(fields) == tuple.__len__(value):
            return encode.state(
                name,
                b"fields",
                {**attributes(value), **dict(zip(fields, tuple.__iter__(value), strict=True))},
            )
        counted = encode.counted(value, attributes(value))
        return encode.state(name, content(encode, value) if content else b"", counted)

    return encode_plain


def _by_own_pickling(attributes: Callable[[Any], dict[str, Any]], encode: Encoder, value: Any) -> bytes:
    """An object that says itself what to keep of it. What code is bound to counts as it is all the same."""
    if not encode.lenient:
        return encode.refuse(value)
    encode.met(type(value))
    return encode.state(type_name(type(value)), b"", encode.counted(value, attributes(value)))


def _is_own(kind: type, base: type) -> bool:
    """Whether user code alone made a class, and one whose objects hold no position."""
    neutral = ("typing", "abc", "collections.abc", "_collections_abc", "contextlib")
    return (
        base is object
        and is_user_class(kind)
        and all(
            is_user_class(each) or module_name(each) in neutral for each in kind.__mro__ if each is not object
        )
        and not any(hasattr(kind, name) for name in ("__next__", "__anext__", "__await__"))
    )


def _is_transparent(kind: type, base: type) -> bool:
    """Whether attributes and builtin content are all that there is to an object of this type."""
    if kind is base:
        return base is not object
    above = [each for each in kind.__mro__ if each not in base.__mro__]
    if any(not is_heap_type(each) for each in above):
        return False
    if base is not object or is_dataclass(kind) or hasattr(kind, "__attrs_attrs__"):
        return True
    return _is_own(kind, base) and all(
        getattr(kind, name) is getattr(object, name)
        for name in ("__getstate__", "__reduce__", "__reduce_ex__")
    )


def _attributes_of(kind: type, base: type) -> Callable[[Any], dict[str, Any]]:
    """A function that gives the attributes and slots of an object, without those of `base` itself."""
    above = [each for each in kind.__mro__ if each not in base.__mro__]
    cached = {
        name
        for each in above
        for name, member in vars(each).items()
        if isinstance(member, functools.cached_property) or name == "_attrs_cached_hash"
    }
    slots = [
        (name, member)
        for each in reversed(above)
        if "__slots__" in vars(each)
        for name, member in vars(each).items()
        if isinstance(member, types.MemberDescriptorType) and name not in cached
    ]
    has_dict = kind.__dictoffset__ != 0

    def attributes(value: Any) -> dict[str, Any]:
        found = dict(object.__getattribute__(value, "__dict__")) if has_dict else {}
        for name in cached.intersection(found):
            del found[name]
        for name, member in slots:
            try:
                found[name] = member.__get__(value)
            except AttributeError:  # never set, or deleted
                pass
        return found

    return attributes
