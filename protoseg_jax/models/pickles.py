"""Pickles of plain values and of what a table knows; nothing else is imported or called.

What a table does not know is refused or, where that is asked for, `Inert`: checkpoints keep much
beside their tensors (a run's settings, its optimizer), whose classes nobody needs.

`pickle.Unpickler`, even where one chooses what it finds, sets attributes of what it was given,
makes room for any memo index, and hashes tuples so deep that C's stack ends. Here are just the
opcodes of PyTorch's files (protocol 2, by Python 2 or 3); `pickletools` reads and describes them.
"""

import collections
import dataclasses
import io
import pickletools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_LONGEST = 2**20  # opcodes, and items of what is called with; a tensor takes about 30
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Foreign(ValueError):
    """A pickle names what is not in the table, which is the message, like `os.system`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inert:
    """What stands for a global that is not in the table, and for whatever would be made of it.

    It keeps nothing that it is given and does nothing; as a key it is hashed by its identity.

    Attributes:
      name: the global's, like `os.system`.
    """

    name: str


def load(
    stream: io.BytesIO,
    table: Mapping[str, Any],
    persistent_load: Callable[[Any], Any] | None = None,
    inert: bool = False,
) -> Any:
    """What the pickle at a stream's position holds; the stream is left behind its end.

    Args:
      stream: the pickle, and what follows.
      table: by "module name" what stands for a global. Functions in it, and nothing else, are
        called where the pickle says so.
      persistent_load: what stands for an object that is stored elsewhere, by its identity.
      inert: whether an `Inert` stands for every other global, and for each call that is given one,
        instead of an exception. Where it must not be is for the caller to look.

    Raises:
      Foreign: it names another global, and `inert` is false.
      ValueError: it is broken, or no pickle of this kind.
    """
    try:
        return _run(stream, table, persistent_load, inert)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its pickle is broken") from error


def update(target: dict, items: Iterable[tuple[Any, Any]]) -> None:
    """Set items of a dict; `Inert` stands for a key that is none which is surely hashed, and
    without collisions by intent."""
    for key, value in items:
        safe = type(key) in (str, bool, type(None), Inert)
        if not (safe or type(key) is int and abs(key) < 2**63):
            key = Inert("a key that is neither a name nor a number")
        target[key] = value


def _run(
    stream: io.BytesIO, table: Mapping[str, Any], persistent_load: Callable | None, inert: bool
) -> Any:
    stack, outer, memo, given = [], [], {}, 0  # outer: the stacks below each mark
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count == _LONGEST:
            raise ValueError("its pickle is longer than a state dict's")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" as name:
                stack.append(_CONSTANTS[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "SHORT_BINSTRING":  # a string of Python 2
                stack.append(argument.encode("latin1").decode("utf8"))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                items = [stack.pop() for _ in range(_TUPLES[name])]
                stack.append(tuple(items[::-1]))
            case "APPEND":
                items = [stack.pop()]
                _extend(stack[-1], items)
            case "APPENDS":
                items, stack = stack, outer.pop()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [(key, value)])
            case "SETITEMS":
                items, stack = stack, outer.pop()
                _set(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                name = argument.replace(" ", ".")
                if argument not in table and not inert:
                    raise Foreign(name)
                stack.append(table[argument] if argument in table else Inert(name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                given = _counted(given, arguments)
                stack.append(_called(function, arguments))
            case "NEWOBJ":  # a class and what its instance is made of; none is in a table
                stack.pop()
                _of_type(stack[-1], Inert)
            case "BUILD":  # attributes, like `_metadata`, which nothing needs
                stack.pop()
                _of_type(stack[-1], collections.OrderedDict, Inert)
            case "BINPERSID" if persistent_load is not None:
                given = _counted(given, stack[-1])
                identity = stack.pop()
                stack.append(_first_inert(identity) or persistent_load(identity))
            case name:
                raise ValueError(f"its pickle has {name}, which a state dict's has not")
    raise ValueError("its pickle has no end")


def _called(function: Any, arguments: Any) -> Any:
    """What a call gives; of or with what is inert, that."""
    if type(function) is Inert:
        return function
    arguments = _of_type(arguments, tuple)
    return _first_inert(arguments) or _of_type(function, types.FunctionType)(*arguments)


def _first_inert(values: Any) -> Inert | None:
    items = values if type(values) is tuple else ()
    return next((item for item in items if type(item) is Inert), None)


def _extend(target: Any, items: list) -> None:
    if type(target) is not Inert:
        _of_type(target, list).extend(items)


def _set(target: Any, items: Iterable[tuple[Any, Any]]) -> None:
    if type(target) is not Inert:
        update(_of_type(target, dict, collections.OrderedDict), items)


def _counted(given: int, arguments: Any) -> int:
    """How many items have been given, with those of a tuple and of what it holds: by the memo a few
    bytes may give a long list again and again."""
    if type(arguments) is tuple:
        held = [a for a in arguments if type(a) in (tuple, list, dict, collections.OrderedDict)]
        given += len(arguments) + sum(map(len, held))
    if given > _LONGEST:
        raise ValueError("its pickle repeats itself more than a state dict's")
    return given


def _of_type(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError
    return value
