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

_STORAGE_DTYPES = {
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
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"
_ALLOWED_GLOBALS = {
    _REBUILD_TENSOR,
    _REBUILD_PARAMETER,
    _ORDERED_DICT,
    *(f"torch.{name}" for name in _STORAGE_DTYPES),
}

MAX_DIMS = 8
"""Most dimensions of a tensor."""
_MAX_INSTRUCTIONS = 1_000_000  # a tensor takes about 25


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
    """A tensor in the pickle. Its numbers are not negative, but may not fit the storage.

    Shape and strides are cut after ``MAX_DIMS + 1`` numbers.
    """

    storage: StorageRecord
    offset: int  # items
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # items


def interpret(pickled: bytes) -> Any:
    """Return the object that the bytes of a pickle describe.

    For a checkpoint it is a dict of ``TensorRecord``. For any other pickle it may be None, a bool,
    number, string, tuple, list, dict, or one of this module's records.

    Raises:
        RefusedError: the pickle uses something that tensor files do not need.
        DamagedError: the pickle is malformed.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns about backslashes in names
            for instruction, argument, _ in pickletools.genops(pickled):
                if instruction.name == "STOP":
                    break
                machine.run(instruction.name, argument)
        (result,) = machine.stack  # a ValueError unless exactly one value is left
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError, MemoryError):
        raise DamagedError("it does not run to its end") from None
    if machine.metastack:  # a MARK without the instruction that removes it
        raise DamagedError("an open mark")
    return result


def type_name(value: Any) -> str:
    """Return the name of a type, or of a value's type, for messages: "tensor", "dict"."""
    its_type = value if isinstance(value, type) else type(value)
    return its_type.__name__.removesuffix("Record").strip("_").lower()


def quote(value: object) -> str:
    """Quote a text from a file for a message: escaped, on one line, of at most 80 characters.

    For a value that is not text, return the name of its type.
    """
    # Cut a long text before quoting it. More than 80 characters remain, so that "..." is added.
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
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_LENGTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and memo of a pickle, with the instructions that tensor files use.

    Values are None, bool, int, float, str, tuple, list, dict and this module's records. They are
    never called. Nested values are never hashed, compared or printed either, so deep nesting does
    no harm.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []  # the stack below each open MARK
        self.memo: dict[int, Any] = {}
        self.instruction_count = 0  # instructions so far

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction.

        Args:
            name: the instruction's name in ``pickletools``.
            argument: the value that follows the instruction in the pickle; None if it has none.

        Raises:
            RefusedError: tensor files do not need the instruction, or the pickle has too many.
            DamagedError: the operands are missing or of a wrong type.
            IndexError, KeyError: the stack is empty, or the memo lacks the index.
        """
        self.instruction_count += 1
        if self.instruction_count > _MAX_INSTRUCTIONS:
            raise RefusedError(f"has more than {_MAX_INSTRUCTIONS} instructions")
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLE_LENGTHS:
            stack.append(tuple(self.pop(_TUPLE_LENGTHS[name])))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.remember(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "INST"):
            self.push_global(argument.replace(" ", ".", 1))  # "module name" to "module.name"
            if name == "INST":  # an allowed global is refused here too: INST would call it
                raise RefusedError("uses the instruction INST")
        else:
            self.run_without_argument(name)

    def run_without_argument(self, name: str) -> None:
        """Run an instruction that needs no argument, only the stack.

        Raises:
            RefusedError: tensor files do not need the instruction.
            DamagedError: the operands are missing or of a wrong type.
            IndexError: the stack is empty, or there is no mark.
        """
        match name:
            case "PROTO" | "FRAME":
                pass  # the pickle's version and a length in bytes, which do not matter here
            case "MARK":
                self.metastack.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_to_mark()  # on its own line, since it replaces ``self.stack``
                self.stack.append(tuple(items))
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND" | "APPENDS":
                items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2) if name == "SETITEM" else self.pop_to_mark())
            case "STACK_GLOBAL":
                self.push_global(".".join(_expect(word, str) for word in self.pop(2)))
            case "BINPERSID":  # a persistent id, which names a storage
                self.stack.append(_make_storage(*self.pop(1)))
            case "REDUCE":
                function, arguments = self.pop(2)
                function_name = _expect(function, _Global).name
                self.stack.append(_rebuild(function_name, _expect(arguments, tuple)))
            case "BUILD":  # gives a state dict its ``_metadata``, the versions of its modules
                self.pop(1)  # drop the metadata
                self.top(dict)  # a check only: nothing else may have metadata
            case _:
                raise RefusedError(f"uses the instruction {name}")

    def pop(self, count: int) -> list[Any]:
        """Remove and return the last ``count`` items of the stack.

        Raises:
            DamagedError: the stack has fewer.
        """
        if len(self.stack) < count:
            raise DamagedError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        """Remove the last mark and the items above it; return the items.

        Raises:
            IndexError: there is no mark.
        """
        items = self.stack
        self.stack = self.metastack.pop()
        return items

    def top(self, kind: type) -> Any:
        """Return the last item of the stack, which must be of this type.

        Raises:
            DamagedError: the item has another type.
            IndexError: the stack is empty.
        """
        return _expect(self.stack[-1], kind)

    def remember(self, index: int) -> None:
        """Store the last item of the stack in the memo, under an index.

        Memos are numbered 0, 1, 2 and so on, so an honest index is at most the number of
        instructions so far.

        Raises:
            RefusedError: the index is higher.
            IndexError: the stack is empty.
        """
        if index > self.instruction_count:
            raise RefusedError(f"numbers its memo up to {index}")
        self.memo[index] = self.stack[-1]

    def push_global(self, name: str) -> None:
        """Push the name of a global, such as "collections.OrderedDict".

        Raises:
            RefusedError: tensor files do not need this global.
        """
        if name not in _ALLOWED_GLOBALS:
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
    """Return the value if it has exactly this type: a bool is no int, and a record no tuple.

    Raises:
        DamagedError: the value has another type.
    """
    if type(value) is not kind:
        raise DamagedError(f"a {type_name(value)} in place of a {type_name(kind)}")
    return value


def _rebuild(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the result of a call in the pickle, without calling anything.

    Args:
        name: the function: one of the three that ``torch.save`` writes.
        arguments: the function's arguments.

    Raises:
        RefusedError: ``name`` is another function, or the number of arguments is wrong.
        DamagedError: an argument has a wrong type or value.
    """
    if name == _ORDERED_DICT and not arguments:
        return {}
    if name == _REBUILD_TENSOR and len(arguments) in (6, 7):  # the last one is optional
        return _make_tensor(*arguments)
    if name == _REBUILD_PARAMETER and len(arguments) == 3:  # tensor, requires_grad, hooks
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
    """Make a tensor from the arguments of torch's ``_rebuild_tensor_v2``.

    ``requires_grad`` and ``hooks`` are ignored.

    Raises:
        RefusedError: ``metadata`` is not empty.
        DamagedError: an argument has a wrong type, or a number is negative.
    """
    if metadata:  # such as the conjugate bit: the stored values are not the tensor's own
        raise RefusedError("marks a tensor as negated, conjugated or otherwise special")
    sides = _dimensions(shape)
    item_strides = _dimensions(strides)
    return TensorRecord(_expect(storage, StorageRecord), _non_negative(offset), sides, item_strides)


def _dimensions(numbers: Any) -> tuple[int, ...]:
    """Return the sizes or strides of a tensor, but not more than ``MAX_DIMS + 1`` of them.

    The caller refuses as many. A pickle of a few bytes can name one long tuple many times, and
    every copy of it would take memory.

    Raises:
        DamagedError: a number is negative or not an int.
    """
    first_numbers = _expect(numbers, tuple)[: MAX_DIMS + 1]
    return tuple(_non_negative(number) for number in first_numbers)


def _make_storage(persistent_id: Any) -> StorageRecord:
    """Make a storage from its persistent id: ("storage", type, key, device, items).

    Raises:
        RefusedError: the id has another form, or the storage's type is unknown.
        DamagedError: a part of the id has a wrong type, or the size is negative.
    """
    if type(persistent_id) is not tuple or len(persistent_id) != 5:
        raise RefusedError("names a storage in an unknown way")
    tag, storage_type, key, device, size = persistent_id
    if type(tag) is not str or tag != "storage":
        raise RefusedError("names a storage in an unknown way")
    _expect(device, str)
    dtype = _STORAGE_DTYPES.get(_expect(storage_type, _Global).name.removeprefix("torch."))
    if dtype is None:
        raise RefusedError(f"names a storage of type {storage_type.name}")
    return StorageRecord(dtype, _expect(key, str), _non_negative(size))


def _non_negative(value: Any) -> int:
    """Return a size, stride or offset from the pickle.

    Raises:
        DamagedError: the value is negative, or not an int.
    """
    if _expect(value, int) < 0:
        raise DamagedError("a negative size, stride or offset")
    return int(value)
