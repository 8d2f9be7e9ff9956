"""Files of saved caches: a state of tensors, plain values and known classes, as one safetensors file without pickle.

The bytes of each storage are in the file once. A description in JSON says which tensors are views of them, and what
holds these tensors; so what shared memory, or was one object, does so again. Objects are made of their fields:
dataclasses and named tuples by their constructor, others by their attributes. Classes are those of the rooms below and
those that were given to `register`; nothing of a file is ever executed. What a reader makes by itself (codecs, which
follow from options) is named in the file and not saved.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.codecs.basis_file import read_file
from rotatek_cache.codecs.interface import KeyCodec
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.report import SavedBytes

FORMAT = "rotatek-cache-1"  # to be counted up when what is saved is read in another way
WHAT = "saved cache"
ROOMS = ("cache", "codecs", "core", "options", "token_pruning")
PLAIN = (bool, int, float, str)
ZLIB_LEVEL = 6

Resolve = Callable[[Any, torch.device], Tensor]
C = TypeVar("C", bound=type)

_REGISTERED: dict[str, type] = {}


def register(kind: C) -> C:
    """Let objects of a class from elsewhere be saved and loaded, such as a token method of one's own; a decorator."""
    _REGISTERED[_name(kind)] = kind
    return kind


@dataclasses.dataclass
class _Storage:
    """A storage to be written: a tensor that reads it, and the descriptions of all that do."""

    tensor: Tensor
    views: list[list[Any]] = dataclasses.field(default_factory=list)

    def packed(self) -> Tensor:
        """Return its bytes on the CPU, uint8 ``[n]``; where one tensor reads a part of them, only that part."""
        storage = self.tensor.untyped_storage()
        if len(self.views) == 1 and self.tensor.nbytes < storage.nbytes():
            alone = self.tensor.contiguous()
            self.views[0][-2:] = list(alone.stride()), 0
            storage = alone.clone().untyped_storage() if alone is self.tensor else alone.untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=self.tensor.device).set_(storage).cpu()


class _Writer:
    """Describes values, and gathers the storages behind their tensors."""

    def __init__(self, references: Mapping[int, Any], given: Mapping[int, str]) -> None:
        self.references, self.given = references, given
        self.storages: dict[tuple[torch.device, int], _Storage] = {}
        self.numbers: dict[int, int] = {}
        self.held: list[Any] = []  # so that no identity is given to another object meanwhile

    def describe(self, value: Any) -> Any:
        if value is None or type(value) in PLAIN:
            return value
        if isinstance(value, torch.dtype):
            return ["dtype", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", str(value)]
        if type(value) in (list, tuple, torch.Size):
            return ["list" if type(value) is list else "tuple", *map(self.describe, value)]
        if type(value) is dict:
            return ["dict", *([self.describe(key), self.describe(item)] for key, item in value.items())]
        if id(value) in self.given:
            return ["given", self.given[id(value)]]
        if id(value) in self.numbers:
            return ["same", self.numbers[id(value)]]
        number = self.numbers[id(value)] = len(self.numbers)
        self.held.append(value)
        if isinstance(value, Tensor):
            return self._tensor(value, number)
        name = _name(type(value))
        _known(name)  # raises where it could not be loaded
        return ["object", number, name, {key: self.describe(item) for key, item in _fields(value).items()}]

    def _tensor(self, value: Tensor, number: int) -> list[Any]:
        if value.layout is not torch.strided or value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"a cache with a {type(value).__name__} {value.layout} on {value.device} cannot be saved")
        value = value.detach()
        pointer = value.untyped_storage().data_ptr()
        dtype = str(value.dtype).removeprefix("torch.")
        view = ["tensor", number, None, dtype, list(value.shape), list(value.stride()), value.storage_offset()]
        if pointer in self.references:
            view[2] = ["reference", str(value.device), self.describe(self.references[pointer])]
            return view
        storage = self.storages.setdefault((value.device, pointer), _Storage(value))
        view[2] = list(self.storages).index((value.device, pointer))
        storage.views.append(view)
        return view


def parts_given(name: str, layer: Any) -> dict[str, Any]:
    """Name the parts of a layer that whoever reads a file makes anew: its codecs, and the positions of its cache."""
    found = {}
    for attribute, value in vars(layer).items():
        for place, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, KeyCodec | Sealer | VisualPositions):
                found[f"{name}.{attribute}.{place}"] = part
    return found


def write(
    path: str | os.PathLike[str],
    state: Any,
    references: Mapping[int, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    compress: bool,
) -> SavedBytes:
    """Write a state to a file, whole or not at all.

    Args:
        path: of the file, which is replaced if it exists.
        state: made of None, bool, int, float, str, lists, tuples, dicts, dtypes, devices, tensors and objects.
        references: what stands in the file for storages that are not in it, by their address; made as `state` is.
        given: objects that are not in the file, by the names under which `SavedFile.given` is to hold them.
        compress: whether bytes are compressed without loss, by zlib.

    Returns:
        The bytes of the file, and of the storages in it.

    Raises:
        TypeError: an object's class is neither of this package's rooms nor registered.
        ValueError: states that codecs have stored were not finite.
        FileNotFoundError: there is no folder for the file.
    """
    from safetensors.torch import save_file  # noqa: PLC0415 (a cache that is not saved needs torch alone)

    for part in (given or {}).values():
        if isinstance(part, KeyCodec):
            part.check_finite(wait=True)
        elif isinstance(part, Sealer):
            part.check(wait=True)
    names: dict[int, str] = {}
    for name, part in (given or {}).items():
        names.setdefault(id(part), name)  # a reader may not have made later ones when it needs this
    writer = _Writer(references or {}, names)
    description = writer.describe(state)
    tensors, kept = {}, []
    in_memory = 0
    for number, storage in enumerate(writer.storages.values()):
        data = storage.packed()
        in_memory += data.nbytes
        packed, plane = _compressed(data, storage.tensor.itemsize) if compress else (data, 0)
        kept.append({"bytes": data.nbytes, "device": str(storage.tensor.device), "plane": plane})
        tensors[str(number)] = packed
    text = json.dumps({"storages": kept, "state": description}, separators=(",", ":"))
    metadata = {"format": FORMAT, "state": text, "checksum": _checksum(text, list(tensors.values()))}
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path: there is no folder '{target.parent}' for the file '{target.name}': make it first"
        )
    if target.is_dir():
        raise IsADirectoryError(f"path: '{target}' is a folder: name a file in it")
    handle, part = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, part, metadata)
        Path(part).chmod(0o666 & ~_umask())
        Path(part).replace(target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return SavedBytes(str(target), target.stat().st_size, in_memory, compressed=compress)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _compressed(data: Tensor, itemsize: int) -> tuple[Tensor, int]:
    """Compress bytes, the n-th of all numbers together, if that makes them fewer; returns the itemsize, else 0."""
    if data.nbytes == 0 or data.nbytes % itemsize:
        return data, 0
    planes = data.view(-1, itemsize).T.contiguous()
    packed = zlib.compress(planes.numpy().data, ZLIB_LEVEL)
    if len(packed) >= data.nbytes:
        return data, 0
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8), itemsize


def _inflated(packed: Tensor, size: int, itemsize: int) -> Tensor:
    stream = zlib.decompressobj()
    data = stream.decompress(packed.numpy().data, size)  # and not more, whatever a file says
    planes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return planes.view(itemsize, -1).T.contiguous().flatten()


def _checksum(text: str, tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


class SavedFile:
    """A saved cache as it is read from a file whose checksum is right.

    Args:
        path: of the file.
        device: where tensors go; None: where they were.

    Attributes:
        given: objects that are not in the file, by name.
        resolve: makes a tensor that is not in the file of what stands for it.

    Raises:
        ValueError: the file is truncated, edited, foreign or of another version.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str | None) -> None:
        self.path = path
        self.device = None if device is None else torch.device(device)
        tensors, metadata = read_file(path, FORMAT, WHAT)
        found = [tensors.get(str(number)) for number in range(len(tensors))]
        text = metadata.get("state", "")
        stored = [part for part in found if part is not None and part.dtype == torch.uint8 and part.ndim == 1]
        if len(stored) < len(found) or metadata.get("checksum") != _checksum(text, stored):
            raise ValueError(f"{WHAT} {path} was changed after it was written: its checksum is another; save it anew")
        described = json.loads(text)
        self.description = described["state"]
        self.objects: dict[int, Any] = {}
        self.resolve: Resolve | None = None
        self.given: dict[str, Any] = {}
        self.packed = list(zip(stored, described["storages"], strict=True))
        self.storages: dict[tuple[int, torch.device], Tensor] = {}
        self.on_host = False  # whether what is made now goes to the CPU in any case
        for place in sorted({facts["device"] for facts in described["storages"]}):
            self._place(place)  # raises where it is not there

    def _storage(self, number: int) -> Tensor:
        """Return the bytes of a storage where it goes, uint8 ``[n]``; one for each place."""
        packed, facts = self.packed[number]
        place, size = self._place(facts["device"]), facts["bytes"]
        if (number, place) not in self.storages:
            data = _inflated(packed, size, facts["plane"]) if facts["plane"] else packed
            if data.nbytes != size:
                raise ValueError(f"a storage has {data.nbytes} bytes that should have {size}")
            # Copied also on the CPU: what was read is one piece of memory, the file's.
            self.storages[number, place] = data.clone() if place.type == "cpu" else data.to(place)
        return self.storages[number, place]

    def _place(self, device: str) -> torch.device:
        if self.on_host:
            return torch.device("cpu")
        place = torch.device(device) if self.device is None else self.device
        try:
            torch.empty(0, dtype=torch.uint8, device=place)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{WHAT} {self.path} belongs on {place}, which cannot be used here ({str(error).splitlines()[0]}): say "
                'where it is to go, as in device="cpu"'
            ) from None
        return place

    def parts(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the descriptions of the parts of a state, a dict with these keys, in their order.

        A part may refer to what is in those before it, which have to be made first.
        """
        found = self.description[1:] if isinstance(self.description, list) else []
        if [pair[0] for pair in found] != list(names):
            raise ValueError(f"{WHAT} {self.path} has other parts than this version knows: make it anew")
        return dict(found)

    def part(self, description: Any, *, on_host: bool = False) -> Any:
        """Make what a description stands for; a ValueError where this version has nothing like it.

        Args:
            description: a part of the file's.
            on_host: whether its tensors go to the CPU, whatever the device.
        """
        self.on_host = on_host
        try:
            return self._made(description)
        except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{WHAT} {self.path} holds what this version of rotatek_cache cannot read: {error}; make it anew"
            ) from error

    def _made(self, description: Any) -> Any:
        if not isinstance(description, list):
            return description
        kind, *rest = description
        match kind:
            case "list":
                return [self._made(part) for part in rest]
            case "tuple":
                return tuple(self._made(part) for part in rest)
            case "dict":
                return {self._made(key): self._made(part) for key, part in rest}
            case "dtype":
                return _dtype(*rest)
            case "device":
                return self._place(*rest)
            case "given":
                return self.given[rest[0]]
            case "same":
                return self.objects[rest[0]]
            case "tensor":
                number, *view = rest
                made = self._tensor(*view)
            case "object":
                number, name, fields = rest
                made = _made_of(_known(name), {key: self._made(part) for key, part in fields.items()})
            case _:
                raise ValueError(f"{kind!r} is nothing that a state is made of")
        self.objects[number] = made
        return made

    def _tensor(self, storage: int | list[Any], dtype: str, shape: list[int], stride: list[int], offset: int) -> Tensor:
        if isinstance(storage, list):
            if self.resolve is None:
                raise ValueError("it refers to tensors that are not in the file")
            _, device, how = storage
            flat = self.resolve(self._made(how), self._place(device))
        else:
            data, number_type = self._storage(storage), _dtype(dtype)
            flat = data[: data.nbytes // number_type.itemsize * number_type.itemsize].view(number_type)
        return flat.as_strided(shape, stride, offset)  # raises where that is more than the storage has


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return found


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _known(name: str) -> type:
    """Find the class of a name; a TypeError where it is not one that may be saved."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, cls = name.partition(":")
    package, _, rest = module.partition(".")
    if package == __name__.partition(".")[0] and rest.partition(".")[0] in ROOMS:
        found = getattr(importlib.import_module(module), cls, None)
        if isinstance(found, type) and found.__module__ == module:
            return found
    raise TypeError(
        f"{name} is no class that a saved cache may hold: a class of one's own has to be given to "
        "rotatek_cache.cache.saving.register, before saving and before loading"
    )


def _constructor_fields(kind: type) -> tuple[str, ...] | None:
    """Name the fields that a dataclass or a named tuple is made of; None for other classes."""
    if dataclasses.is_dataclass(kind):
        return tuple(spec.name for spec in dataclasses.fields(kind) if spec.init and spec.metadata.get("saved", True))
    return getattr(kind, "_fields", None)


def _fields(value: Any) -> dict[str, Any]:
    names = _constructor_fields(type(value))
    return dict(vars(value)) if names is None else {name: getattr(value, name) for name in names}


def _made_of(kind: type, fields: dict[str, Any]) -> Any:
    names = _constructor_fields(kind)
    if names is not None:
        expect_fields(kind, fields, names)
        return kind(**fields)
    made: Any = object.__new__(kind)
    if _name(kind) not in _REGISTERED and not any(
        spec.default is spec.empty for spec in inspect.signature(kind).parameters.values()
    ):
        made = kind()
        expect_fields(kind, fields, vars(made))
    vars(made).update(fields)
    return made


def restore(held: Any, state: dict[str, Any]) -> None:
    """Give an object the attributes that were saved of another."""
    expect_fields(type(held), state, vars(held))
    vars(held).update(state)


def expect_fields(kind: type, found: Iterable[str], names: Iterable[str]) -> None:
    """Raise a ValueError unless what was saved of an object are the fields that this version's class has."""
    if set(found) != set(names):
        raise ValueError(f"{kind.__name__} has the fields {sorted(names)}, was saved with {sorted(found)}")
