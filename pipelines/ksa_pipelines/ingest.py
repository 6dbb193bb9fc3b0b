"""A log, brought into gathered buckets: mapped, checked, audited, without duplicates, with a count for each drop."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import chain
from operator import add
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ksa_pipelines.bucket import Gathered, GatherTask, gather, item_counts, keep_items, neighbours
from ksa_pipelines.catalogue import Counted
from ksa_pipelines.checks import refuse_nothing_left
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.engine import Engine, LocalEngine
from ksa_pipelines.known import KnownNames
from ksa_pipelines.memory import Memory
from ksa_pipelines.names import NameCollector, Names, audit_ranks
from ksa_pipelines.report import Report, listed
from ksa_pipelines.sources import find_files, source_files
from ksa_pipelines.spill import Chunk, Spilled, SpillTask, refuse_mixed_columns, spill
from ksa_pipelines.stored import Stored
from ksa_pipelines.ties import TiedPairs
from ksa_pipelines.vocab import ItemCounts, refuse_many_event_types
from recsys_ksa.data.manifest import Forgotten, SourceLog
from recsys_ksa.errors import SchemaError


@dataclass(frozen=True)
class Resources:
    """What the work may use."""

    engine: Engine = field(default_factory=LocalEngine)
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class Ingested:
    """A log in gathered buckets."""

    gathered: tuple[Gathered, ...]
    source: SourceLog
    tied: TiedPairs
    names: dict[str, Names]
    """Of the number columns `item` and, where the log has types, `event_type`."""
    item_index: NDArray[np.int32]
    """The number that the data set has for each item, by code; 0 where it does not know the item."""
    has_event_id: bool

    @property
    def has_event_type(self) -> bool:
        """Whether the log has event types."""
        return "event_type" in self.names

    @property
    def last_timestamp(self) -> int:
        """Of the log's events."""
        return max((gathered.last_timestamp for gathered in self.gathered), default=0)

    def counted(self) -> Counted:
        """Return the log's items and event types."""
        items = self.item_counts().total(self.names["item"].values, self.item_index)
        return Counted(items, self._event_types() if self.has_event_type else None)

    def item_counts(self) -> ItemCounts:
        """Return events and first time of each item, by code."""
        counts = ItemCounts(self.names["item"].count)
        for gathered in self.gathered:
            counts.add(item_counts(gathered.folder))
        return counts

    def _event_types(self) -> dict[str | None, int]:
        """Return the events of each type that has any, None for those without."""
        types = [None, *self.names["event_type"].values]
        counts = np.zeros(len(types), dtype=np.int64)
        for gathered in self.gathered:
            counts += 0 if gathered.event_types is None else gathered.event_types
        return {name: int(count) for name, count in zip(types, counts) if count}


def ingest(
    log: str,
    config: PrepareConfig,
    folder: Path,
    resources: Resources,
    report: Report,
    *,
    known: KnownNames | None = None,
    forgotten: Forgotten | None = None,
    number: int = 0,
    first_arrival: int = 0,
) -> Ingested:
    """Spill and gather a log into `folder`.

    Args:
        log: what the user called it.
        config: mapping and checks; its filters are left to `apply_filters`.
        folder: to work in.
        resources: where the work runs and what it may take.
        report: is told what each step did.
        known: the names of the data set the log is appended to.
        forgotten: users that are rejected.
        number, first_arrival: of the log among those of the data set.

    Raises:
        SchemaError: a column is missing, of a wrong type, or the times cannot be Unix seconds.
        DataError: a file is missing or broken, nothing is left, or a bucket does not fit the memory.
    """
    files_format, files = find_files(log, config.read)
    folder.mkdir(parents=True, exist_ok=True)
    workers = resources.engine.workers
    chunk_rows = resources.memory.chunk_rows(workers)
    tasks = [
        SpillTask(file, files_format, position, log, config, forgotten, chunk_rows, folder)
        for position, file in enumerate(files)
    ]
    spilled, collectors = list[Spilled](), dict[str, NameCollector]()
    for file in resources.engine.map(spill, tasks):
        spilled.append(file)
        for chunk in file.chunks:
            for column in chunk.num_names:
                if column not in collectors:
                    collectors[column] = NameCollector(column, folder)
                collectors[column].add(chunk)
    refuse_mixed_columns(spilled, [Path(file).name for file in files], log)
    if known is not None:
        _refuse_other_columns(known, spilled[0], log)
    rejected = _summed(file.rejected for file in spilled)
    num_rows = sum(file.num_rows for file in spilled)
    report(f"read {num_rows:,} rows{listed('rejected', rejected)}")
    refuse_nothing_left(num_rows - sum(rejected.values()), log, rejected)
    bucket_rows = np.sum([file.bucket_rows for file in spilled], axis=0)
    resources.memory.refuse_large_buckets(bucket_rows, workers, resources.engine.processes, log)

    chunks = _with_arrivals(spilled, first_arrival)
    names = {column: collector.names() for column, collector in collectors.items()}
    if "event_type" in names:
        refuse_many_event_types(names["event_type"].count)
    ranks = folder / "audit_ranks"
    audit_ranks(names["item"].values).tofile(ranks)
    item_index, met, stored = np.zeros(names["item"].count, dtype=np.int32), None, Stored(())
    if known is not None:
        (met, item_index), stored = known.in_codes_of(names, folder), known.stored
    most = resources.memory.bucket_events(workers)
    gather_tasks = [
        GatherTask(buckets, most, folder, chunks, names, ranks, stored.of(buckets), met)
        for buckets in neighbours(bucket_rows, most)
    ]
    parts = list(chain.from_iterable(resources.engine.map(gather, gather_tasks)))
    for path in folder.glob("chunk-*"):
        path.unlink()
    duplicates = _summed(part.duplicates for part in parts)
    num_events = sum(part.num_events for part in parts)
    report(f"{num_events:,} distinct events{listed('dropped', duplicates)}")
    source = SourceLog(
        number=number,
        files=source_files(files),
        first_arrival=first_arrival,
        num_rows=num_rows,
        rejected=rejected,
        duplicates=duplicates,
        filtered={},
    )
    tied = reduce(add, (part.tied for part in parts))
    kept = tuple(part for part in parts if part.num_events)
    columns = spilled[0].columns
    return Ingested(kept, source, tied, names, item_index, "event_id" in columns)


def apply_filters(ingested: Ingested, config: PrepareConfig, engine: Engine, log: str, report: Report) -> Ingested:
    """Drop rare items, then users with few events left, as the prepare file asks.

    Raises:
        DataError: nothing is left.
    """
    if not config.filters:
        return ingested
    source, filtered = ingested.source, dict[str, int]()
    if config.min_item_count > 1 or config.min_user_events > 1:
        ingested, rare, short = _filter(ingested, config.min_item_count, config.min_user_events, engine)
        filtered[f"of items with fewer than {config.min_item_count}"] = rare
        filtered[f"of users with then fewer than {config.min_user_events}"] = short
    outside, dropped = 0, config.k_core > 1
    while dropped and ingested.gathered:
        ingested, rare, short = _filter(ingested, config.k_core, config.k_core, engine)
        dropped = rare + short
        outside += dropped
    filtered[f"outside the {config.k_core}-core"] = outside
    filtered = {name: count for name, count in filtered.items() if count}
    num_events = sum(gathered.num_events for gathered in ingested.gathered)
    if filtered:
        report(f"{num_events:,} events kept{listed('dropped', filtered)}")
    refuse_nothing_left(num_events, log, source.rejected | source.duplicates | filtered)
    return replace(ingested, source=source.model_copy(update={"filtered": filtered}))


def _filter(ingested: Ingested, min_item: int, min_user: int, engine: Engine) -> tuple[Ingested, int, int]:
    """Drop rare items, then users with few events left; return what is left and the events dropped by each."""
    frequent = ingested.item_counts().count >= min_item if min_item > 1 else None
    num_items = ingested.names["item"].count
    function = partial(keep_items, kept=frequent, min_user_events=min_user, num_items=num_items)
    results = list(engine.map(function, ingested.gathered))
    kept = tuple(each for each, *_ in results if each is not None)
    return replace(ingested, gathered=kept), sum(rare for _, rare, _ in results), sum(short for *_, short in results)


def _refuse_other_columns(known: KnownNames, spilled: Spilled, log: str) -> None:
    there = {name for name in ("event_type", "event_id", "value") if name in spilled.columns}
    if there != known.columns:
        raise SchemaError(
            f"{log}: expected the optional columns of the data set ({', '.join(sorted(known.columns)) or 'none'}), got "
            f"{', '.join(sorted(there)) or 'none'}. Map or leave out columns in the prepare file ([columns])."
        )


def _with_arrivals(spilled: Sequence[Spilled], first_arrival: int) -> tuple[Chunk, ...]:
    """Return the chunks, each with the arrival number of its file's first row."""
    chunks = []
    for file in spilled:
        chunks += [replace(chunk, first_arrival=first_arrival) for chunk in file.chunks]
        first_arrival += file.num_rows
    return tuple(chunks)


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))
