"""The Ray actor of a worker's process: it holds a model and a job, and computes part after part."""

import dataclasses
import os
import socket
from contextlib import ExitStack
from typing import Any, final

import torch

from trackstar.errors import IndexMismatchError, ModelError, StoreError, TrackstarError
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Manifest, Place
from trackstar.workers.index_model import different_fields, model_of_manifest
from trackstar.workers.protocol import GradientWork, IndexWork, Setup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientJob:
    """What a worker needs to compute gradients.

    Attributes:
        source: Path or hub name that every node loads the model from.
        revision: The hub's revision, or None.
        gguf_file: The file of GGUF weights, or None.
        setup: Opened on the model before the first part.
        work: Computes a part's result.
    """

    source: str
    revision: str | None
    gguf_file: str | None
    setup: Setup
    work: GradientWork


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanJob:
    """What a worker needs to scan an index.

    Attributes:
        path: The index's folder; the same on every node.
        manifest: The index's manifest.
        work: Computes the result of some of its shards.
    """

    path: Place
    manifest: Manifest
    work: IndexWork


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartResult:
    """Result of one part.

    Attributes:
        result: The result.
        advanced: Number of examples completed.
        notes: Lines for the user.
    """

    result: Any
    advanced: int
    notes: tuple[str, ...]


@final
class Worker:
    """One process of the cluster.

    Args:
        threads: Number of CPU threads.
        gpus: Number of GPUs that the cluster has given to this process, or a fraction of one. One holds
            the model, and the model is spread over several.
    """

    def __init__(self, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        # Ray hides other workers' GPUs, so that the first that this process sees is its own.
        self._place: dict[str, Any] = {"device": "cuda" if gpus else "cpu"} if gpus <= 1 else {"device_map": "auto"}
        self._model: LanguageModel | None = None
        self._model_key: tuple[object, ...] = ()
        self._job: GradientJob | ScanJob | None = None
        self._opened: Any = None
        self._exit_stack = ExitStack()
        self._notes: list[str] = []

    def prepare(self, job: GradientJob | ScanJob) -> str:
        """Load what the job needs, and return the worker's name.

        Raises:
            TrackstarError: The model or index is missing or is another one; the message names the node.
        """
        name = f"{socket.gethostname()}/{os.getpid()}"
        try:
            self._exit_stack.close()
            self._opened = None
            if isinstance(job, GradientJob):
                opened = job.setup.opened(self._loaded(job), self._notes.append)
                self._opened = self._exit_stack.enter_context(opened)
            else:
                self._opened = self._index(job)
        except TrackstarError as error:
            raise type(error)(f"on node {socket.gethostname()}: {error}") from None
        self._job = job
        return name

    def compute(self, part: Any) -> PartResult:
        """Compute one part of the job that the worker is prepared for."""
        job = self._job
        advanced = 0

        def advance(examples: int) -> None:
            nonlocal advanced
            advanced += examples

        assert job is not None, "prepared"
        assert self._opened is not None, "prepared"
        if isinstance(job, GradientJob):
            result = job.work(self._opened, part, advance)
        else:
            index = self._opened.part(part)
            result = job.work(index)
            advance(index.rows)
        notes = tuple(self._notes)
        self._notes.clear()
        return PartResult(result=result, advanced=advanced, notes=notes)

    def _loaded(self, job: GradientJob) -> LanguageModel:
        """The job's model, loaded unless the worker has it already."""
        manifest, source = job.setup.manifest, job.source
        digest = manifest.model.digest
        configuration = tuple(sorted((manifest.model.configuration or {}).items()))
        key = (digest, configuration, manifest.model.dtype, manifest.model.parameters, manifest.layer_blocks)
        if self._model is None or self._model_key != key:
            self._model = None  # free its memory before the next is loaded
            try:
                entry = dataclasses.replace(
                    manifest.model, source=source, revision=job.revision, gguf_file=job.gguf_file
                )
                model = model_of_manifest(dataclasses.replace(manifest, model=entry), source, **self._place)
            except ModelError as error:
                raise ModelError(
                    f"{error}; expected the model at the same path on all of the cluster's nodes"
                ) from None
            found = model.digest()
            if found != digest:
                raise IndexMismatchError(
                    f"{source}: the model's digest is {found}, expected {digest}; give all nodes the same model"
                )
            for field, expected, other in different_fields(manifest.model, model):
                raise IndexMismatchError(
                    f"{source}: {field} is {other}, expected {expected}; give all nodes the same model"
                )
            self._model, self._model_key = model, key
        return self._model

    def _index(self, job: ScanJob) -> Index:
        """The job's index."""
        try:
            index = Index.open(job.path)
        except StoreError as error:
            raise type(error)(f"{error}; expected the index at the same path on all of the cluster's nodes") from None
        if index.manifest != job.manifest:
            raise IndexMismatchError(
                f"{job.path}: is another index than on the calling node; give all nodes the same index"
            )
        return index
