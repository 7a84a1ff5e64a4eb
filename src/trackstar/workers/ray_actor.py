"""What runs in a worker's process: it holds the model and what it was told about the work, and does part after part."""

import dataclasses
import os
import socket
from contextlib import ExitStack
from typing import Any, final

import torch

from trackstar.errors import IndexMismatchError, ModelError, StoreError, TrackstarError
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Manifest, Place
from trackstar.workers.made_with import model_of_manifest
from trackstar.workers.protocol import GradientWork, IndexWork, Setup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientOrder:
    """What a worker must know to compute gradients.

    Attributes:
        source: Where the model is loaded from: the same place on every node.
        revision: Of a hub's model.
        gguf_file: Of GGUF weights.
        setup: What parts are done with.
        work: What is done with a part.
    """

    source: str
    revision: str | None
    gguf_file: str | None
    setup: Setup
    work: GradientWork


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanOrder:
    """What a worker must know to go through an index.

    Attributes:
        path: The index's folder; the same on every node.
        manifest: What the index is.
        work: What is done with some of its shards.
    """

    path: Place
    manifest: Manifest
    work: IndexWork


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Done:
    """What a part gave.

    Attributes:
        result: It.
        advanced: How many examples that was.
        notes: What its user should know.
    """

    result: Any
    advanced: int
    notes: tuple[str, ...]


@final
class Worker:
    """One process of the cluster.

    Args:
        threads: CPU threads to compute with.
        device: Where to compute.
    """

    def __init__(self, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._device = device
        self._model: LanguageModel | None = None
        self._model_is: tuple[object, ...] = ()
        self._order: GradientOrder | ScanOrder | None = None
        self._opened: Any = None
        self._open = ExitStack()
        self._notes: list[str] = []

    def prepare(self, order: GradientOrder | ScanOrder) -> str:
        """Get ready for parts of this order; gives the worker's name.

        Raises:
            TrackstarError: The model or index is not there, or is another; the message names the node.
        """
        name = f"{socket.gethostname()}/{os.getpid()}"
        try:
            self._open.close()
            self._opened = None
            if isinstance(order, GradientOrder):
                opened = order.setup.opened(self._loaded(order), self._notes.append)
                self._opened = self._open.enter_context(opened)
            else:
                self._opened = self._index(order)
        except TrackstarError as error:
            raise type(error)(f"on node {socket.gethostname()}: {error}") from None
        self._order = order
        return name

    def do(self, part: Any) -> Done:
        """Do one part of the order that the worker is prepared for."""
        order = self._order
        advanced = 0

        def advance(examples: int) -> None:
            nonlocal advanced
            advanced += examples

        assert order is not None, "prepared"
        assert self._opened is not None, "prepared"
        if isinstance(order, GradientOrder):
            result = order.work(self._opened, part, advance)
        else:
            index = self._opened.part(part)
            result = order.work(index)
            advance(index.rows)
        notes = tuple(self._notes)
        self._notes.clear()
        return Done(result=result, advanced=advanced, notes=notes)

    def _loaded(self, order: GradientOrder) -> LanguageModel:
        manifest, source = order.setup.manifest, order.source
        digest = manifest.model.digest
        wanted = (digest, manifest.model.dtype, manifest.layer_blocks)
        if self._model is None or self._model_is != wanted:
            self._model = None  # before another takes its place
            try:
                place = dataclasses.replace(
                    manifest.model, source=source, revision=order.revision, gguf_file=order.gguf_file
                )
                model = model_of_manifest(dataclasses.replace(manifest, model=place), source, device=self._device)
            except ModelError as error:
                raise ModelError(f"{error}; a cluster's nodes all read the model from the same place") from None
            found = model.digest()
            if found != digest:
                raise IndexMismatchError(
                    f"{source}: the model's digest is {found}, expected {digest}; give all nodes the same"
                )
            self._model, self._model_is = model, wanted
        return self._model

    def _index(self, order: ScanOrder) -> Index:
        try:
            index = Index.open(order.path)
        except StoreError as error:
            raise type(error)(f"{error}; a cluster's nodes all read the index from the same place") from None
        if index.manifest != order.manifest:
            raise IndexMismatchError(f"{order.path}: is another index than the one asked; give all nodes the same")
        return index
