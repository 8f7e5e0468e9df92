"""Reads the index of a checkpoint in megatron-core's format, and its objects that are no tensors, without running code
of the checkpoint.

torch reads the index, ``.metadata``, with `pickle.load`, which calls whatever a file names; a checkpoint may come from
anybody.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_solopo.errors import UserError

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},  # the folder it was written to
    "pathlib._local": {"PosixPath"},  # the same in Python 3.13
}
"""All that an index is made of, beside torch's dtypes, sizes and layouts."""

COMMON = "common_state/shard_0_1"
"""megatron-core 0.19's key of what is the same for all processes; earlier versions have a file, `COMMON_STATE_FNAME`,
which 0.19 reads too."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype | torch.layout):
            return value
        raise pickle.UnpicklingError(f"{module}.{name}")


class StoredIndex(FileSystemReader):
    """torch's reader of a checkpoint's files, with a reader of the index that makes nothing but an index.

    Attributes:
        metadata: the index.

    Raises:
        UserError: the index is missing or damaged, or names something else.
    """

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        self.source = source
        self.metadata = self.read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.source / ".metadata"
        try:
            with path.open("rb") as file:
                return _IndexUnpickler(file).load()
        except pickle.UnpicklingError as error:
            raise _unsafe(path, error) from None
        except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:
            raise UserError("file-damaged", f"{path}: not a checkpoint's index ({error}); copy it again") from None

    def common(self) -> dict[str, Any]:
        """Returns what the checkpoint holds beside tensors: Megatron-LM's arguments, the iteration, ...; only classes
        that megatron-core lists as data are made (megatron/core/safe_globals.py).

        Raises:
            UserError: it names others.
        """
        path = self.source / COMMON_STATE_FNAME
        stored: Any = None
        try:
            if path.is_file():
                stored = torch.load(path, map_location="cpu", weights_only=True)
            elif COMMON in self.metadata.state_dict_metadata:
                place = self.metadata.storage_data[MetadataIndex(COMMON)]
                path = self.source / place.relative_path
                with path.open("rb") as file:
                    file.seek(place.offset)
                    (stored,) = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except pickle.UnpicklingError as error:
            raise _unsafe(path, error) from None
        except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
            raise UserError("file-damaged", f"{path}: not readable ({error}); copy it again") from None
        return stored if isinstance(stored, dict) else {}


def _unsafe(path: Path, error: pickle.UnpicklingError) -> UserError:
    reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
    return UserError(
        "pickle-unsafe",
        f"{path}: holds more than a checkpoint's data, which could run code ({reason.strip()}); it is not read",
    )
