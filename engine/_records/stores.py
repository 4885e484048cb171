"""The storages and serializers of an engine: one for each path, URL or name that its runs name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...storage import LocalStorage, Storage, storage_from_url
from ...storage._values.serializers import Serializer, serializer_by_name
from .._settings import Settings
from .record import Place, storage_key

if TYPE_CHECKING:
    from .._keys.policies import CachePolicy
    from .._runs.run import FlowRun, TaskRun

StorageLike = Storage | str | os.PathLike[str]
SerializerLike = Serializer | str


class Stores:
    """The part of an engine that knows where results lie. What it made itself is in `_own`, and closed with it."""

    settings: Settings
    storage: Storage
    key_storage: Storage | None
    serializer: Serializer

    def __init__(self) -> None:
        self._own: dict[str, Storage] = {}
        self._serializers: dict[str, Serializer] = {}
        self._met: dict[str, Storage] = {}

    def storage_for(self, spec: StorageLike) -> Storage:
        """The storage that a path or URL means: one for each, made when first asked for, closed with the engine."""
        if isinstance(spec, Storage):
            return spec
        name = os.fspath(spec)
        if name not in self._own:
            storage = storage_from_url(spec)
            if isinstance(storage, LocalStorage) and "durability=" not in name:
                storage = LocalStorage(
                    storage.path, durability="power" if self.settings.durability == "power" else "process"
                )
            self._own[name] = storage
        return self._own[name]

    def meet(self, storage: Storage) -> Storage:
        self._met.setdefault(storage.url, storage)
        return storage

    def _storage_at(self, url: str) -> Storage:
        """The storage of a URL that a transaction's intent names: one that is in use here, else a new one."""
        for storage in (self.storage, self.key_storage, *self._own.values(), *self._met.values()):
            if storage is not None and storage.url == url:
                return storage
        return self.storage_for(url)

    def serializer_for(self, spec: SerializerLike) -> Serializer:
        if isinstance(spec, Serializer):
            return spec
        if spec not in self._serializers:
            self._serializers[spec] = serializer_by_name(spec)
        return self._serializers[spec]

    def place_for(self, run: TaskRun | FlowRun, policy: CachePolicy | None) -> Place:
        """Where the run's record lies: the task decides, else its flow, else the engine."""
        definition = run.task or run.flow
        assert definition is not None
        above = run.flow_run.flow if run.task is not None and run.flow_run is not None else None
        storage = definition.result_storage or (above and above.result_storage)
        serializer = definition.result_serializer or (above and above.result_serializer)
        keys = policy.key_storage if policy is not None else None
        location = None
        if definition.result_storage_key is not None and policy is not None:
            location = storage_key(definition.result_storage_key, run)
        return Place(
            self.meet(self.storage_for(storage)) if storage else self.storage,
            self.meet(self.storage_for(keys)) if keys is not None else self.key_storage,
            self.serializer_for(serializer) if serializer else self.serializer,
            location,
        )
