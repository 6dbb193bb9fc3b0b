"""What `ksa prepare` is told: column mapping, clock, ties, filters, split. Written as TOML."""

import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from recsys_ksa.config_files import Strict, load_config, parse_config
from recsys_ksa.data.manifest import Clock
from recsys_ksa.errors import ConfigError
from recsys_ksa.features.users import UserKind
from recsys_ksa.order import TieKind
from recsys_ksa.schema import NUM_BUCKETS, user_vocabulary

FAR_FUTURE = 4_102_444_800
"""2100-01-01 in Unix seconds."""


Format = Literal["parquet", "csv", "ndjson", "ipc", "delta", "iceberg"]
TimeUnit = Literal["s", "ms", "us", "ns"]


class ReadConfig(Strict):
    """How the log's files are read, where their names do not tell."""

    format: Format | None = None
    """Unset: by the file's name; a folder with `_delta_log` or Iceberg metadata is a table."""
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    """Of CSV. Unset: a comma, or a tab for .tsv and .data."""
    header: tuple[str, ...] | None = None
    """Of CSV: names of the columns of files that have no header line."""
    quoted: bool = True
    """Of CSV: whether a quote opens a text that may hold separators."""
    time_unit: TimeUnit = "s"
    """Of timestamps that are integers."""
    time_format: str | None = None
    """Of timestamps that are text, such as `%m/%d/%Y %H:%M`. Unset: integers, or `2020-01-01 12:00:00`."""


class ColumnsConfig(Strict):
    """Names of the log's columns. What is not set has the design's name."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    event_type: str | None = None
    """Unset: `event_type` where the log has it. Empty: left out."""
    event_id: str | None = None
    """Unset: `event_id` where the log has it. Empty: left out."""
    value: str | None = Field(default=None, min_length=1)
    """What an event was worth, such as a rating or a price: a column of numbers. Unset: events have no value."""


class ItemsConfig(Strict):
    """Names of the items file's columns (`--items`)."""

    item_id: str = "item_id"
    title: str | None = None
    """Unset: `title` where the file has it. Empty: left out."""
    side_features: tuple[str, ...] = ()
    """Columns that become categorical vocabularies; their names are kept."""
    multi_features: tuple[str, ...] = ()
    """Columns of several categories an item: lists, or texts split at `multi_separator`; they have vocabularies too."""
    multi_separator: str = Field(default="|", min_length=1)
    """Between the categories of a text."""
    vectors: dict[str, tuple[str, ...]] = {}
    """Vectors by name, all of one length: a column of lists of numbers, or columns of one number each."""

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """Features whose categories are numbered."""
        return self.side_features + self.multi_features

    @model_validator(mode="after")
    def _names_for_files(self) -> Self:
        names = [*self.side_features, *self.multi_features, *self.vectors]
        for name in names:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in ("event_type", "title", "item_id"):
                raise ValueError(f"expected names of letters, digits and _ that are not taken, got {name!r}")
        if len(set(names)) != len(names):
            raise ValueError("expected each name once")
        if empty := [name for name, columns in self.vectors.items() if not columns]:
            raise ValueError(f"vectors: expected the columns of {empty[0]!r}, got none")
        return self


class UsersConfig(Strict):
    """Names of the columns of a table of users (`--users`); a feature is called as its column."""

    user_id: str = "user_id"
    features: tuple[str, ...] = ()
    """Columns that become categorical vocabularies."""
    multi_features: tuple[str, ...] = ()
    """Columns of several categories a user: lists, or texts split at `multi_separator`; they have vocabularies too."""
    multi_separator: str = Field(default="|", min_length=1)
    """Between the categories of a text."""
    numbers: tuple[str, ...] = ()
    """Columns of numbers; a run puts them into buckets (`model.user_edges`)."""

    @property
    def kinds(self) -> dict[str, UserKind]:
        """What each feature is."""
        names: dict[UserKind, tuple[str, ...]]
        names = {"category": self.features, "list": self.multi_features, "number": self.numbers}
        return {name: kind for kind, own in names.items() for name in own}

    @model_validator(mode="after")
    def _names_for_files(self) -> Self:
        names = [*self.features, *self.multi_features, *self.numbers]
        for name in names:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in ("user_id", "user_index"):
                raise ValueError(f"expected names of letters, digits and _ that are not taken, got {name!r}")
        if len(set(names)) != len(names):
            raise ValueError("expected each name once")
        return self


class SplitConfig(Strict):
    """The cut of protocol `global`, counted back from the log's last event."""

    test_days: PositiveFloat = 28
    """Days of test."""
    validation_days: PositiveFloat = 14
    """Days of validation before those."""


class PrepareConfig(Strict):
    """The whole of a prepare file."""

    clock: Clock = "unix"
    """`unix`: Unix seconds. `relative`: seconds from an unknown start. `ordinal`: an order only."""
    tie: TieKind | None = None
    """What orders equal timestamps; unset: the event id, else arrival, else a hash where the audit says so."""
    min_item_count: NonNegativeInt = 0
    """Items with fewer events are dropped, with their events."""
    min_user_events: NonNegativeInt = 0
    """Then users with fewer events are dropped."""
    k_core: NonNegativeInt = 0
    """Then items and users with fewer events are dropped, in turns, until every one left has so many."""
    max_timestamp: PositiveInt = FAR_FUTURE
    """Unix seconds; later events are rejected as far future."""
    num_buckets: int = Field(NUM_BUCKETS, ge=1, le=4096)
    """Buckets of users, one part each; fixed at the first prepare."""
    read: ReadConfig = ReadConfig()
    columns: ColumnsConfig = ColumnsConfig()
    items: ItemsConfig = ItemsConfig()
    users: UsersConfig = UsersConfig()
    split: SplitConfig = SplitConfig()

    @property
    def filters(self) -> bool:
        """Whether events are dropped for what the whole log holds; such a data set takes no increments."""
        return max(self.min_item_count, self.min_user_events, self.k_core) > 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [self.columns.user_id, self.columns.item_id, self.columns.timestamp]
        if len(set(names)) != len(names):
            raise ValueError(f"columns: user_id, item_id and timestamp must be three columns, got {names}")
        if taken := {user_vocabulary(name) for name in self.users.kinds} & {*self.items.vocabularies}:
            raise ValueError(f"items: {taken.pop()!r} is the vocabulary of a feature of users; rename the column")
        return self


def presets() -> list[str]:
    """Return the names of the ready mappings for public logs."""
    folder = resources.files("ksa_pipelines") / "presets"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def resolve_config(preset: str | None, path: Path | None, said: dict[str, Any]) -> PrepareConfig:
    """Return the preset, overridden by the prepare file, overridden by what the command line said.

    Raises:
        ConfigError: no such preset, or a value that is none.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise ConfigError(f"--preset: expected one of {', '.join(presets())}, got {preset!r}.")
        with resources.as_file(resources.files("ksa_pipelines") / "presets" / f"{preset}.toml") as file:
            values = load_config(PrepareConfig, file).model_dump(exclude_unset=True)
    if path is not None:
        for name, value in load_config(PrepareConfig, path).model_dump(exclude_unset=True).items():
            values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    return parse_config(PrepareConfig, values | said, "ksa prepare")
