"""Interpreting the pickle inside a PyTorch checkpoint without executing it.

A pickle is a program, so ``pickle`` never sees it. ``_Machine`` runs the two dozen instructions
that tensor files need. Its values are strings, numbers, tuples, lists, dicts and three inert
records. It refuses any other name, such as ``os.system``, and has no code that could call one.

A subclass of ``pickle.Unpickler`` with a restricted ``find_class`` would not be safe. Its BUILD
writes into the ``__dict__`` of any object, and a million nested tuples as a dict key overflow the C
stack, which kills the process.

Source: ``torch/_utils.py`` (``_rebuild_tensor_v2``, ``_rebuild_parameter``) and
``torch/serialization.py`` (``_save``).
"""

from __future__ import annotations

import pickletools
import warnings
from typing import Any, NamedTuple

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"
_GLOBALS = {_TENSOR, _PARAMETER, _ORDERED_DICT, *(f"torch.{name}" for name in _STORAGES)}

_MAX_INSTRUCTIONS = 4_000_000  # a tensor takes about 25


class RefusedError(Exception):
    """The pickle uses something that tensor files do not need. The text names it."""


class DamagedError(Exception):
    """The pickle is malformed. The text names the fault."""


class StorageRecord(NamedTuple):
    """A storage in the pickle."""

    dtype: str
    key: str  # name of its file in the checkpoint's data folder
    size: int  # items


class TensorRecord(NamedTuple):
    """A tensor in the pickle. Its numbers are not negative, but may not fit the storage."""

    storage: StorageRecord
    offset: int  # items
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # items


def interpret(program: bytes) -> Any:
    """Return the object that a pickle describes: a dict, a ``TensorRecord`` or a plain value.

    Raises:
        RefusedError: the pickle uses something that tensor files do not need.
        DamagedError: the pickle is malformed.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns about backslashes in names
            for instruction, argument, _ in pickletools.genops(program):
                if instruction.name == "STOP":
                    break
                machine.step(instruction.name, argument)
        (result,) = machine.stack  # a ValueError unless exactly one value is left
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError, MemoryError):
        raise DamagedError("it does not run to its end") from None
    if machine.outer:  # the result is above a mark that nothing has removed
        raise DamagedError("an open mark")
    return result


def describe(value: Any) -> str:
    """Name a type, or the type of a value, for messages."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__.removesuffix("Record").strip("_").lower()


def quote(value: object) -> str:
    """Quote text of a file, for messages: at most 80 characters, on one line, escaped.

    A value that is not text is replaced by the name of its type.
    """
    text = repr(value[:81]) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


class _Global(NamedTuple):
    """An allowed name, as text only: nothing is imported."""

    name: str


_PUSH_ARGUMENT = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
}
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Stack and memo of a pickle, with the instructions that tensor files use.

    It calls only its own methods. Values are None, bool, int, float, str, tuple, list, dict and the
    records above. They are never hashed (keys must be strings), compared or printed, so deep
    nesting does no harm.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.count = 0  # instructions so far

    def step(self, name: str, argument: Any) -> None:
        """Run one instruction, named as in ``pickletools``.

        Raises:
            RefusedError: tensor files do not need the instruction, or there are too many.
            DamagedError: the operands are missing or of a wrong type.
        """
        self.count += 1
        if self.count > _MAX_INSTRUCTIONS:
            raise RefusedError(f"has more than {_MAX_INSTRUCTIONS} instructions")
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name])
        elif name in _TUPLES:
            stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.remember(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "INST"):
            self.push_global(argument.replace(" ", ".", 1))  # "module name" to "module.name"
            if name == "INST":  # refused too, if the name itself was not
                raise RefusedError("uses the instruction INST")
        else:
            self.structure(name)

    def structure(self, name: str) -> None:
        """Run an instruction whose operands are on the stack.

        Raises:
            RefusedError: tensor files do not need the instruction.
            DamagedError: the operands are missing or of a wrong type.
        """
        match name:
            case "PROTO" | "FRAME":
                pass  # version and length, which do not matter here
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.to_mark()  # before the append, since it replaces ``stack``
                self.stack.append(tuple(items))
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND" | "APPENDS":
                items = self.pop(1) if name == "APPEND" else self.to_mark()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2) if name == "SETITEM" else self.to_mark())
            case "STACK_GLOBAL":
                self.push_global(".".join(_expect(word, str) for word in self.pop(2)))
            case "BINPERSID":  # a persistent id, which names a storage
                self.stack.append(_make_storage(*self.pop(1)))
            case "REDUCE":
                function, arguments = self.pop(2)
                self.stack.append(_call(_expect(function, _Global).name, _expect(arguments, tuple)))
            case "BUILD":  # drop a state dict's _metadata, the versions of its modules
                self.pop(1)
                self.top(dict)
            case _:
                raise RefusedError(f"uses the instruction {name}")

    def pop(self, count: int) -> list[Any]:
        """Remove and return the last ``count`` items of the stack; DamagedError if it has fewer."""
        if len(self.stack) < count:
            raise DamagedError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def to_mark(self) -> list[Any]:
        """Remove and return the items above the last mark, and remove the mark."""
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def top(self, kind: type) -> Any:
        """Return the last item of the stack; DamagedError if it is not of this type."""
        return _expect(self.stack[-1], kind)

    def remember(self, index: int) -> None:
        """Store the last item in the memo.

        Memos are numbered from 0 on, so an index above the number of instructions is refused.

        Raises:
            RefusedError: the index is too high.
        """
        if index > self.count:
            raise RefusedError(f"numbers its memo up to {index}")
        self.memo[index] = self.stack[-1]

    def push_global(self, name: str) -> None:
        """Push a name if it is allowed; otherwise raise RefusedError."""
        if name not in _GLOBALS:
            escaped = quote(name)[1:-1]  # without its quotation marks
            raise RefusedError(f"asks for {escaped}")
        self.stack.append(_Global(name))

    def set_items(self, items: list[Any]) -> None:
        """Add alternating keys and values to the dict on top of the stack.

        Raises:
            DamagedError: a key has no value, is no string, or is in the dict already.
        """
        target = self.top(dict)
        if len(items) % 2:
            raise DamagedError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _expect(key, str) in target:
                raise DamagedError(f"the name {quote(key)} twice")
            target[key] = value


def _expect(value: Any, kind: type) -> Any:
    """Return a value of exactly this type: a bool is not an int, a record is not a tuple.

    Raises:
        DamagedError: the value has another type.
    """
    if type(value) is not kind:
        raise DamagedError(f"a {describe(value)} in place of a {describe(kind)}")
    return value


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the result of REDUCE for the three functions that ``torch.save`` writes.

    Raises:
        RefusedError: another function, or another number of arguments.
    """
    if name == _ORDERED_DICT and not arguments:
        return {}
    if name == _TENSOR and len(arguments) in (6, 7):
        return _make_tensor(*arguments)
    if name == _PARAMETER and len(arguments) == 3:  # tensor, requires_grad, hooks
        return _expect(arguments[0], TensorRecord)
    raise RefusedError(f"calls {name} with {len(arguments)} arguments")


def _make_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> TensorRecord:
    """Make a tensor from ``_rebuild_tensor_v2``'s arguments; ignore requires_grad and hooks.

    Raises:
        RefusedError: ``metadata`` is not empty.
        DamagedError: an argument has a wrong type, or a number is negative.
    """
    if metadata:  # conjugate and negative bits: the stored values differ from the tensor's
        raise RefusedError("marks a tensor as negated, conjugated or otherwise special")
    sizes = [_natural(item) for item in _expect(shape, tuple)]
    steps = [_natural(item) for item in _expect(strides, tuple)]
    return TensorRecord(
        _expect(storage, StorageRecord), _natural(offset), tuple(sizes), tuple(steps)
    )


def _make_storage(identity: Any) -> StorageRecord:
    """Make a storage from its persistent id: ("storage", type, key, device, items).

    Raises:
        RefusedError: the id has another form, or the type is unknown.
        DamagedError: a part of the id has a wrong type, or the size is negative.
    """
    if type(identity) is not tuple or len(identity) != 5:
        raise RefusedError("names a storage in an unknown way")
    tag, kind, key, location, size = identity
    if type(tag) is not str or tag != "storage":
        raise RefusedError("names a storage in an unknown way")
    _expect(location, str)
    dtype = _STORAGES.get(_expect(kind, _Global).name.removeprefix("torch."))
    if dtype is None:
        raise RefusedError(f"names a storage of type {kind.name}")
    return StorageRecord(dtype, _expect(key, str), _natural(size))


def _natural(value: Any) -> int:
    if _expect(value, int) < 0:
        raise DamagedError("a negative size, stride or offset")
    return int(value)
