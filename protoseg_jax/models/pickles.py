"""Pickles of plain values and of what a table knows; nothing else is imported or called.

`pickle.Unpickler`, even where one chooses what it finds, sets attributes of what it was given,
makes room for any memo index, and hashes tuples so deep that C's stack ends. Here are just the
opcodes of PyTorch's files (protocol 2, by Python 2 or 3); `pickletools` reads and describes them.
"""

import collections
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


def load(
    stream: io.BytesIO,
    table: Mapping[str, Any],
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """What the pickle at a stream's position holds; the stream is left behind its end.

    Args:
      stream: the pickle, and what follows.
      table: by "module name" what stands for a global. Functions in it, and nothing else, are
        called where the pickle says so.
      persistent_load: what stands for an object that is stored elsewhere, by its identity.

    Raises:
      Foreign: it names another global.
      ValueError: it is broken, or no pickle of this kind.
    """
    try:
        return _run(stream, table, persistent_load)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its pickle is broken") from error


def update(target: dict, items: Iterable[tuple[Any, Any]]) -> None:
    """Set items of a dict.

    Raises:
      ValueError: a key is none that is surely hashed, and without collisions by intent.
    """
    for key, value in items:
        if not (type(key) is str or type(key) is int and abs(key) < 2**63):
            raise ValueError("a key in it is neither a name nor a number")
        target[key] = value


def _run(stream: io.BytesIO, table: Mapping[str, Any], persistent_load: Callable | None) -> Any:
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
                _of_type(stack[-1], list).extend(items)
            case "APPENDS":
                items, stack = stack, outer.pop()
                _of_type(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                update(_of_type(stack[-1], dict, collections.OrderedDict), [(key, value)])
            case "SETITEMS":
                items, stack = stack, outer.pop()
                pairs = zip(items[::2], items[1::2], strict=True)
                update(_of_type(stack[-1], dict, collections.OrderedDict), pairs)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in table:
                    raise Foreign(argument.replace(" ", "."))
                stack.append(table[argument])
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                given = _counted(given, arguments)
                stack.append(_of_type(function, types.FunctionType)(*_of_type(arguments, tuple)))
            case "BUILD":  # attributes, like `_metadata`, which nothing needs
                stack.pop()
                _of_type(stack[-1], collections.OrderedDict)
            case "BINPERSID" if persistent_load is not None:
                given = _counted(given, stack[-1])
                stack.append(persistent_load(stack.pop()))
            case name:
                raise ValueError(f"its pickle has {name}, which a state dict's has not")
    raise ValueError("its pickle has no end")


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
