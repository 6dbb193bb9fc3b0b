"""User states as bytes and back: what a cold record holds of one. Imports torch.

Kept are the summaries (all events' rows in a full layer), the own items and what is small; the events' rows of summary
layers are not, for a replay rebuilds them exactly. Segments that never change again are named by their content.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ksa_serving.int8_rows import pack_rows, row_bytes, unpack_rows
from ksa_serving.messages import Parity
from ksa_serving.models import StateParts
from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import StateError
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.seen import SeenItems
from recsys_ksa.model.state import LayerState, Memory, SharedRows, UserState, first_visible_chunk
from recsys_ksa.recommender import Recommender


class _About(msgspec.Struct, frozen=True, array_like=True):
    """A cold state but for its segments. Tensors are raw little-endian bytes; shapes follow from the network."""

    num_events: int
    dtype: str
    last_key: tuple[int, bytes] | None
    history_hash: bytes
    num_unknown: int
    fingerprint: str
    segments: list[list[bytes]]
    """For each layer the names of its kept segments: summaries, or all events in a full layer."""
    tails: list[bytes]
    seen: tuple[bytes, bytes, bytes, bytes]
    session_place: int = 0


class StateBytes:
    """Turns one network's states into bytes and back. Safe to share between threads.

    Args:
        parity: `exact` keeps rows as they are, `int8` rounds them (`int8_rows.py`).
    """

    def __init__(self, recommender: Recommender, parity: Parity = "exact"):
        self._parity: Parity = parity
        self._network = recommender.network
        self._config = recommender.network.config
        self._fingerprint = recommender.fingerprint
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def segment_names(self, state: UserState) -> list[bytes]:
        """Return the names of the segments a cold record holds."""
        return [self._name(part) for layer in state.memory.layers for part in _kept(layer).segments]

    def dump(self, state: UserState) -> StateParts:
        """Return a state as bytes without the events' rows of its summary layers."""
        kept = [_kept(layer) for layer in state.memory.layers]
        seen = state.seen
        about = _About(
            num_events=state.num_events,
            dtype=self._dtype,
            last_key=state.last_key,
            history_hash=state.history_hash,
            num_unknown=state.num_unknown,
            fingerprint=state.fingerprint,
            segments=[[self._name(part) for part in rows.segments] for rows in kept],
            tails=[self._packed(rows.tail) for rows in kept],
            seen=(seen.item_index.tobytes(), seen.count.tobytes(), seen.first.tobytes(), seen.last.tobytes()),
            session_place=state.session_place,
        )
        parts = {self._name(part): part for rows in kept for part in rows.segments}
        return StateParts(msgspec.msgpack.encode(about), _LazyBytes(parts, self._packed))

    def load(self, parts: StateParts) -> UserState:
        """Return the cold state of `dump`'s bytes.

        Raises:
            StateError: they are damaged, or of another network or dtype.
        """
        about = self._about(parts.about)
        memory = Memory(about.num_events, tuple(self._layers(about, parts)), torch.zeros(0))
        return UserState(
            memory,
            about.last_key,
            _own_items(about.seen),
            about.num_unknown,
            about.history_hash,
            about.fingerprint,
            about.session_place,
        )

    def _about(self, content: bytes) -> _About:
        try:
            about = msgspec.msgpack.decode(content, type=_About)
        except msgspec.DecodeError as error:
            raise StateError(f"state: expected a dumped state, got: {error}.") from error
        if (about.fingerprint, about.dtype) != (self._fingerprint, self._dtype):
            raise StateError("state: expected one of this network and dtype, got another's.")
        kinds = self._config.layer_kinds
        if not len(about.segments) == len(about.tails) == len(kinds):
            raise StateError(f"state: expected {len(kinds)} layers, got {len(about.segments)}.")
        return about

    def _layers(self, about: _About, parts: StateParts) -> list[LayerState]:
        layers: list[LayerState] = []
        nothing = SharedRows((), self._tensor(b""))
        for kind, names, tail in zip(self._config.layer_kinds, about.segments, about.tails):
            rows = SharedRows(tuple(self._tensor(parts.segments[name], name) for name in names), self._tensor(tail))
            expected = about.num_events if kind == "full" else num_summary_rows(self._config, about.num_events)
            if rows.num_rows != expected:
                raise StateError(f"state: expected {expected} rows in a {kind} layer, got {rows.num_rows}.")
            layers.append(LayerState(kind, rows, nothing) if kind == "full" else LayerState(kind, nothing, rows))
        return layers

    @property
    def _dtype(self) -> str:
        return str(self._network.state_dtype) if self._parity == "exact" else self._parity

    def _packed(self, rows: Tensor) -> bytes:
        return _bytes(rows) if self._parity == "exact" else pack_rows(rows)

    def _name(self, segment: Tensor) -> bytes:
        """Return a segment's name; segments never change, so it is computed once each."""
        name = self._names.get(segment)
        if name is None:
            name = hashlib.sha256(self._packed(segment)).digest()[:16]
            self._names[segment] = name
        return name

    def _tensor(self, content: bytes, name: bytes | None = None) -> Tensor:
        heads, width, dtype = self._config.num_kv_heads, self._config.head_dim, self._network.state_dtype
        row = 2 * heads * width * dtype.itemsize if self._parity == "exact" else row_bytes(heads, width)
        if len(content) % row:
            raise StateError(f"state: expected rows of {row} bytes, got {len(content)} bytes.")
        if self._parity == "int8":
            tensor = unpack_rows(content, heads, width, dtype)
        else:
            flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.zeros(0, dtype=dtype)
            tensor = flat.view(-1, 2, heads, width)
        tensor = tensor.to(self._network.start.device)
        if name is not None:
            self._names[tensor] = name
        return tensor


def num_summary_rows(config: ModelConfig, num_events: int) -> int:
    """Return how many summaries a summary layer keeps after `num_events` events."""
    gone = first_visible_chunk(config, num_events)
    return max(0, num_events // config.chunk_size - gone) * num_summaries(config)


class _LazyBytes(dict[bytes, Any]):
    """Segments whose bytes are made when asked for: most are on disk already."""

    def __init__(self, segments: dict[bytes, Tensor], packed: Callable[[Tensor], bytes]):
        super().__init__(segments)
        self._packed = packed

    def __getitem__(self, name: bytes) -> bytes:
        return self._packed(super().__getitem__(name))


def _own_items(columns: tuple[bytes, bytes, bytes, bytes]) -> SeenItems:
    item, count, first, last = columns
    return SeenItems(
        np.frombuffer(item, np.int32).copy(),  # bytes cannot be written, which torch warns of
        np.frombuffer(count, np.int32).copy(),
        np.frombuffer(first, np.int64).copy(),
        np.frombuffer(last, np.int64).copy(),
    )


def _kept(layer: LayerState) -> SharedRows:
    return layer.events if layer.kind == "full" else layer.summaries


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
