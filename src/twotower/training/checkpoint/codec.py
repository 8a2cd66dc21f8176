"""Encoding and decoding of a training state as JSON and named tensors, the content of a checkpoint, without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.training.checkpoint.parts import StoredTensor, TensorShard


class StateEncoder:
    """An encoder that replaces the tensors of a state with their names, and collects them.

    A tensor with two names, as with tied weights, is collected once.

    Args:
        copies: also copy tensors that are already on the CPU, so that training can continue while they are written.
        of_parts: copy only sharded tensors; rank 0 writes the rest.

    Attributes:
        whole: tensors by name, on the CPU; no two of them share memory.
        parts: parts of sharded tables by name, on the CPU.
    """

    def __init__(self, *, copies: bool, of_parts: bool = False) -> None:
        self.copies, self.of_parts = copies, of_parts
        self.whole: dict[str, Tensor] = {}
        self.parts: dict[str, TensorShard] = {}
        self._named: dict[tuple[Any, ...], str] = {}
        self._used: set[int] = set()

    def encode(self, value: Any, name: str) -> Any:
        """Encode dicts, lists, tuples, numbers, strings, paths and tensors as JSON values.

        Raises:
            TypeError: neither JSON nor safetensors can represent a value.
        """
        if isinstance(value, TensorShard):
            name = self._named.setdefault((id(value),), name)  # by id, because empty parts may share an address
            if name not in self.parts:
                self.parts[name] = replace(value, tensor=_on_cpu(value.tensor, copy=self.copies))
            dtype = str(value.tensor.dtype).removeprefix("torch.")
            return {"part": {"name": name, "shape": value.shape, "dtype": dtype, "table": value.table}}
        if isinstance(value, Tensor):
            name = self._named.setdefault(_identity(value), name) if value.numel() else name
            if name not in self.whole:
                self._take(value, name)
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key, name), self.encode(one, f"{name}.{key}")] for key, one in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.encode(one, f"{name}.{place}") for place, one in enumerate(value)]}
        if isinstance(value, Path):
            return str(value)
        if value is None or isinstance(value, str | bool | int | float):
            return value
        raise TypeError(f"{name}: a {type(value).__name__} cannot be saved in a checkpoint without pickle")

    def _take(self, value: Tensor, name: str) -> None:
        own = _on_cpu(value, copy=self.copies and not self.of_parts)
        place = own.untyped_storage().data_ptr()
        # safetensors rejects tensors that overlap in memory.
        self.whole[name] = own.clone() if place and place in self._used else own
        self._used.add(place)


def decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    """Rebuild the state that `StateEncoder.encode` encoded; paths remain strings."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "part":
        return tensors[content["name"]]
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in content}
    items = [decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def parts_in(value: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the sharded tensors in an encoded state, by name."""
    if isinstance(value, dict) and "part" in value:
        part = value["part"]
        yield part["name"], StoredTensor(part["shape"], getattr(torch, part["dtype"]), part.get("table"))
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from parts_in(inner)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _on_cpu(tensor: Tensor, *, copy: bool) -> Tensor:
    """Return the tensor on the CPU; with `copy`, in separate memory. A tensor from a device is copied only once."""
    own = tensor.detach().cpu().contiguous()
    is_same = own.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return own.clone() if copy and is_same else own
