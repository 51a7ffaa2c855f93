"""Read files of `torch.save` that hold objects of other classes beside tensors, such as settings,
schedulers and whole networks, without importing or running anything of those classes.
"""

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ssl_xcit.errors import UserError

SAVE_WHOLE = (
    "save whole ones: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
)


class Foreign(dict[Any, Any]):
    """Stand-in for an object of a class that a file names: its attributes, as a dictionary."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key

    def __init__(self, *_: object, **__: object):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)


class ForeignDict:
    """Stand-in for a subclass of dict; torch fills plain ones only."""

    def __new__(cls, *_: object, **__: object) -> Any:
        """A plain dictionary."""
        return OrderedDict()


class ForeignPart:
    """Stand-in for a class or value that is read from a class by `getattr`."""

    def __new__(cls, *_: object) -> Any:
        """The class of all stand-ins."""
        return Foreign


class ForeignList(list[Any]):
    """Stand-in for a subclass of list."""

    def __init__(self, *_: object, **__: object):
        super().__init__()

    def __setstate__(self, state: object) -> None: ...


def read_pickled(path: Path) -> Any:
    """A file of `torch.save`; objects that are neither tensors nor plain data become `Foreign`."""
    kinds: dict[str, type] = {"builtins.getattr": ForeignPart}  # whose objects are not `Foreign`
    while True:
        try:
            # Published training files carry their command line as a Namespace: values alone.
            with torch.serialization.safe_globals([argparse.Namespace, *stand_ins(path, kinds)]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            match = re.search(
                rf"Can only (SETITEM|append).* <class '{__name__}\.(.+)'>", str(error)
            )
            if not match or match[2] in kinds:
                raise
            kinds[match[2]] = ForeignDict if match[1] == "SETITEM" else ForeignList


def stand_ins(path: Path, kinds: Mapping[str, type]) -> list[tuple[type, str]]:
    """A class that only keeps values for each class of a file that `weights_only` refuses, with the
    name that it stands for.

    Raises:
        UserError: tensors are in parts, as FSDP's ShardedTensor.
    """
    if not zipfile.is_zipfile(path):
        return []
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint
    if any(name.startswith("torch.distributed.tensor.") for name in unknown(path)):
        import_module("torch.distributed.tensor")  # which makes them known
    known = "argparse.Namespace"
    names = [name for name in unknown(path) if name != known]
    if any(name.endswith(".ShardedTensor") for name in names):
        raise UserError(f"{path}: parts of tensors (ShardedTensor); {SAVE_WHOLE}")
    classes = [(type(name, (kinds.get(name, Foreign),), {}), name) for name in names]
    return [*classes, (Foreign, "a part of another")]
