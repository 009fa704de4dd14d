"""Named tensors, some spread over processes, as one safetensors file for each process and an index of the pieces.

torch.distributed.checkpoint plans who writes and who reads what; so any number of processes, under any strategy, reads
what any other has written. Its own files hold pickles; ours hold numbers and JSON.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from llm.checkpoint import disk
from llm.checkpoint.disk import Entry

INDEX = "index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where it is in the whole, and where its bytes are."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int  # byte of the file


@dataclass(frozen=True)
class Whole:
    """A tensor as it was on all processes together."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Phases(NamedTuple):
    """What is done around the writing of tensors.

    room  on the first process before anything is written, with the bytes that will be
    seal  on the first process when all files are written, with what a manifest says of them
    tidy  on every process when one has failed
    """

    room: Callable[[int], None]
    seal: Callable[[dict[str, Entry]], None]
    tidy: Callable[[], None]


def save(
    tensors: Mapping[str, Tensor],
    folder: Path,
    phases: Phases,
    group: dist.ProcessGroup | None = None,
    *,
    background: bool = False,
) -> Future[None]:
    """Write `tensors` into `folder`, which is made; collective over `group` if there are several processes.

    Args:
        background: return when the tensors are copied to the host; the rest is done by a thread, and what is returned
            is done when that is.

    Raises:
        OSError: on every process, if one could not write; from the result, if in the background.
    """
    writer = _Writer(folder, phases)
    done: Future[None] = Future()

    def end(error: BaseException | None) -> None:
        if error is None:
            done.set_result(None)
        else:
            phases.tidy()
            done.set_exception(_cause(error) if isinstance(error, dcp.api.CheckpointException) else error)

    settings: dict[str, Any] = {"storage_writer": writer, "process_group": group, "no_dist": not _several()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        if background:
            started = dcp.async_save(dict(tensors), **settings)
            assert isinstance(started, Future)
            started.add_done_callback(lambda finished: end(finished.exception()))
            return done
        try:
            dcp.save(dict(tensors), **settings)
        except dcp.api.CheckpointException as failed:  # a BaseException
            end(failed)
        else:
            end(None)
    done.result()
    return done


def load_into(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `tensors`, some of which may be spread over processes, with what `folder` has under their names.

    Each process reads what it needs, and none waits for another.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(cast(dict[str, Any], dict(tensors)), storage_reader=_Reader(folder), no_dist=True)


def read(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, on the CPU and, where they lie in one piece, mapped from the
    file (copied on write)."""
    files: dict[str, Tensor] = {}
    found = {}
    for name, whole in index(folder).items():
        if not name.startswith(prefix):
            continue
        pieces = [_mapped(folder, piece, whole.dtype, files) for piece in whole.pieces]
        if len(pieces) == 1:
            found[name] = pieces[0]
            continue
        found[name] = torch.empty(whole.shape, dtype=whole.dtype)
        for piece, values in zip(whole.pieces, pieces, strict=True):
            place = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.shape, strict=True))
            found[name][place] = values
    return found


def index(folder: Path) -> dict[str, Whole]:
    """What tensors there are, and where."""
    content = json.loads((folder / INDEX).read_text())
    return {
        name: Whole(
            _NAMES[entry["dtype"]],
            tuple(entry["shape"]),
            tuple(
                Piece(tuple(piece["offsets"]), tuple(piece["shape"]), piece["file"], piece["start"])
                for piece in entry["pieces"]
            ),
        )
        for name, entry in content.items()
    }


class _Writer(StorageWriter):
    """Files of one save. The results that processes send the first one hold what a manifest says of their files."""

    def __init__(self, folder: Path, phases: Phases) -> None:
        self.folder, self.phases = folder, phases

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first process, before any writes."""
        chunks = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
        self.phases.room(sum(math.prod(data.chunk.sizes) * data.properties.dtype.itemsize for data in chunks))
        disk.make(self.folder)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(self._written(plan, planner))
        return done

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        if not plan.items:
            return []
        items = []
        for item in plan.items:
            assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is no tensor"
            assert item.tensor_data is not None
            items.append((item, tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype))
        items.sort(key=lambda entry: -entry[2].itemsize)  # each begins at a multiple of its own size
        header, starts = _header([(_piece_name(item.index), shape, dtype) for item, shape, dtype in items])

        def chunks() -> Iterator[bytes | memoryview]:
            yield header
            for item, _, _ in items:
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor)
                yield _bytes_of(value)

        rank = dist.get_rank() if _several() else 0
        file = f"tensors-{rank:05d}.safetensors"
        entry = disk.write(self.folder / file, chunks())
        return [
            WriteResult(item.index, math.prod(shape) * dtype.itemsize, (file, start, entry))
            for (item, shape, dtype), start in zip(items, starts, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first process, after all have written."""
        written = {result.index: result.storage_data for group in results for result in group}
        wholes: dict[str, Any] = {}
        for name, kind in metadata.state_dict_metadata.items():
            assert isinstance(kind, TensorStorageMetadata)
            pieces = []
            for chunk in kind.chunks:
                file, start, _ = written[MetadataIndex(name, chunk.offsets)]
                pieces.append(asdict(Piece(tuple(chunk.offsets), tuple(chunk.sizes), file, start)))
            wholes[name] = {"dtype": _DTYPES[kind.properties.dtype], "shape": list(kind.size), "pieces": pieces}
        entries = {file: entry for file, _, entry in written.values()}
        entries[INDEX] = disk.write(self.folder / INDEX, [(json.dumps(wholes, indent=1) + "\n").encode()])
        self.phases.seal(entries)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(StorageReader):
    """Pieces of files, as the plan wants them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[Piece, torch.dtype]] = {}
        for name, whole in index(self.folder).items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in whole.pieces]
            tensors[name] = TensorStorageMetadata(TensorProperties(whole.dtype), torch.Size(whole.shape), chunks)
            places |= {MetadataIndex(name, piece.offsets): (piece, whole.dtype) for piece in whole.pieces}
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.places: dict[MetadataIndex, tuple[Piece, torch.dtype]] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        files: dict[str, Tensor] = {}
        for item in plan.items:
            piece, dtype = self.places[item.storage_index]
            values = _mapped(self.folder, piece, dtype, files)
            for axis, (at, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                values = values.narrow(axis, at, size)
            target = planner.resolve_tensor(item).detach()
            target.copy_(values)
            planner.commit_tensor(item, target)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _piece_name(piece: MetadataIndex) -> str:
    at = tuple(piece.offset or ())
    return f"{piece.fqn}@{','.join(map(str, at))}" if any(at) else piece.fqn


def _header(entries: list[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file, and at which byte of the file each tensor begins."""
    described, starts, at = {}, [], 0
    for name, shape, dtype in entries:
        size = math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts.append(at)
        at += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


def _bytes_of(value: Tensor) -> memoryview:
    flat = value.detach().to("cpu").contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _mapped(folder: Path, piece: Piece, dtype: torch.dtype, files: dict[str, Tensor]) -> Tensor:
    """The values of a piece; `files` keeps the maps of files."""
    if piece.file not in files:
        path = folder / piece.file
        files[piece.file] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    size = math.prod(piece.shape) * dtype.itemsize
    return files[piece.file][piece.start : piece.start + size].view(dtype).view(piece.shape)


def _cause(failed: dcp.api.CheckpointException) -> Exception:
    """Of the processes that failed, what the first says."""
    rank, (error, _) = min(failed.failures.items())
    if isinstance(error, OSError):
        return OSError(error.errno, f"rank {rank}: {error.strerror}", error.filename)
    return error if isinstance(error, Exception) else RuntimeError(f"rank {rank}: {error!r}")
