"""A table of users (`--users`) into users.parquet and its vocabularies.

Who has no event in the data set is left out. The first row that describes a user counts, in this file or an earlier
one; categories keep their numbers and new ones come after, by the rule of `vocab.number_categories`.

users.parquet   user_index, ascending; as `recsys_ksa.schema.user_column` names them, <name>_index (int32),
                <name>_indices (list<int32>), <name>_value (float64, NaN where unknown)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.catalogue import with_category_index
from ksa_pipelines.columns import Schema, column_type, id_column, text_column
from ksa_pipelines.config import UsersConfig
from ksa_pipelines.item_features import categories_column, with_category_indices
from ksa_pipelines.report import Report
from ksa_pipelines.sources import find_files, reading, scan_all, source_files
from ksa_pipelines.vocab import count_categories, number_categories
from ksa_pipelines.write import write_table
from recsys_ksa.data.manifest import Manifest, SourceFile, check_file, versioned
from recsys_ksa.data.rows import Rows, numbered_users, open_rows
from recsys_ksa.errors import SchemaError
from recsys_ksa.features.users import UserKind
from recsys_ksa.schema import VOCABULARY, user_column, user_vocabulary


@dataclass(frozen=True)
class UserTable:
    """What a data set knows of its users."""

    rows: pl.DataFrame
    """users.parquet."""
    vocab: dict[str, pl.DataFrame]
    """vocab/<name>.parquet, by name."""
    files: tuple[SourceFile, ...] = ()

    def written_as(self) -> list[str]:
        """Return the names of its files, as the manifest has them; none where nothing is known of users."""
        return ["users.parquet", *(f"vocab/{name}.parquet" for name in self.vocab)] if self.rows.width > 1 else []


def extend_users(
    rows: Sequence[Rows],
    before: Manifest | None,
    dataset: Path,
    users: str | None,
    config: UsersConfig,
    report: Report,
) -> UserTable:
    """Return the table with what a file tells of the users of a version.

    Args:
        rows: of the version.
        before: of the version before; None for a first log.
        dataset: its folder.
        users: the file, or None.
        config: its columns, as of the first log.
        report: is told how many it describes.

    Raises:
        SchemaError: features are asked for and there is no file, or a file and no feature; a column is missing or of
            another type.
        DataError: the file is missing or broken.
    """
    if (users is None and before is None and config.kinds) or (users is not None and not config.kinds):
        raise SchemaError(
            f"users: expected a table of users (--users) and the names of its features ([users] in the prepare file), "
            f"got {users or 'no table'} and {', '.join(config.kinds) or 'no feature'}. Give both or neither."
        )
    known = _empty(config.kinds) if before is None else read_users(dataset, before)
    if users is None:
        return known
    files_format, files = find_files(users)
    with reading(users):
        raw = scan_all(files_format, files)
        given = _mapped(raw, config, dict(raw.collect_schema()), users)
        given = given.join(pl.LazyFrame(numbered_users(rows)), on="user_id").drop("user_id")
        new = given.join(known.rows.lazy(), on="user_index", how="anti").sort("user_index").collect()
    vocab: dict[str, pl.DataFrame] = {}
    for name, kind in config.kinds.items():
        if kind != "number":
            own = user_vocabulary(name)
            values = new[name].explode() if kind == "list" else new[name]
            vocab[own] = number_categories(count_categories(values), known.vocab[own])
            if kind == "list":
                new = with_category_indices(new, name, vocab[own], "user_index")
            else:
                new = with_category_index(new, name, vocab[own])
    table = pl.concat([known.rows, new.select(known.rows.columns)]).sort("user_index")
    report(f"the table of users describes {new.height:,} users more, {table.height:,} in all")
    return UserTable(table, vocab, known.files + source_files(files))


def read_users(dataset: Path, manifest: Manifest) -> UserTable:
    """Return the table of a version.

    Raises:
        DataError: a file is missing or altered.
    """

    def table(name: str) -> pl.DataFrame:
        return pl.read_parquet(check_file(dataset, manifest, manifest.table_file(name)))

    if not manifest.user_features:
        return _empty({})
    vocab = {name: table(f"vocab/{name}.parquet").sort("index") for name in _vocabularies(manifest.user_features)}
    return UserTable(table("users.parquet"), vocab, manifest.users_files)


def without_others(table: UserTable, numbered: pa.Table) -> UserTable:
    """Return the table of these users alone, without the names of categories that nobody has any more."""
    rows = table.rows.join(pl.DataFrame(numbered), on="user_index", how="semi")
    vocab = {}
    for name, frame in table.vocab.items():
        there = [column for kind in ("category", "list") if (column := user_column(name[5:], kind)) in rows.columns]
        index = rows[there[0]].explode() if rows[there[0]].dtype == pl.List else rows[there[0]]
        met = np.bincount(index.fill_null(0).to_numpy(), minlength=frame.height)
        count = pl.Series("count", met.astype(np.int64))
        vocab[name] = frame.with_columns(count, pl.when(count > 0).then("value").alias("value"))
    return UserTable(rows, vocab, table.files)


def write_users(table: UserTable, dataset: Path, version: int) -> list[Path]:
    """Write users.parquet and the vocabularies of a version; return the files."""
    paths = [dataset / versioned(name, version) for name in table.written_as()]
    if paths:
        write_table(_arrow(table.rows), paths[0])
        for path, frame in zip(paths[1:], table.vocab.values(), strict=True):
            write_table(to_arrow(frame).cast(VOCABULARY), path)
    return paths


def told_again(dataset: Path, manifest: Manifest) -> pl.DataFrame:
    """Return the table as a file that `extend_users` would read: user_id and the features' values."""
    table = read_users(dataset, manifest)
    found = table.rows.join(pl.DataFrame(numbered_users(open_rows(dataset, manifest.files))), on="user_index")
    columns = [pl.col("user_id")]
    for name, kind in manifest.user_features.items():
        column = pl.col(user_column(name, kind))
        if kind != "number":
            values = table.vocab[user_vocabulary(name)]["value"]
            texts = pl.element().replace_strict(range(len(values)), values, return_dtype=pl.String)
            column = column.list.eval(texts) if kind == "list" else pl.lit(values).gather(column)
        columns.append(column.alias(name))
    return found.select(columns)


def _vocabularies(kinds: dict[str, UserKind]) -> list[str]:
    return [user_vocabulary(name) for name, kind in kinds.items() if kind != "number"]


def _empty(kinds: dict[str, UserKind]) -> UserTable:
    types = {"category": pl.Int32, "list": pl.List(pl.Int32), "number": pl.Float64}
    columns = {user_column(name, kind): types[kind] for name, kind in kinds.items()}
    nothing = number_categories(count_categories(pl.Series([], dtype=pl.String)))
    return UserTable(
        pl.DataFrame(schema={"user_index": pl.Int64} | columns), dict.fromkeys(_vocabularies(kinds), nothing)
    )


def _mapped(frame: pl.LazyFrame, config: UsersConfig, schema: Schema, source: str) -> pl.LazyFrame:
    """The file -> user_id and each feature: text, list of texts, or number. Empty texts are null."""
    columns = [id_column(schema, config.user_id, source).alias("user_id")]
    columns += [text_column(schema, name, source).alias(name) for name in config.features]
    for name in config.multi_features:
        columns.append(categories_column(schema, name, config.multi_separator, source).alias(name))
    columns += [_number_column(schema, name, source) for name in config.numbers]
    return frame.select(columns).drop_nulls("user_id").unique("user_id", keep="first", maintain_order=True)


def _number_column(schema: Schema, name: str, source: str) -> pl.Expr:
    kind = column_type(schema, name, source)
    if not (kind.is_numeric() or kind in (pl.String, pl.Null)):
        raise SchemaError(f"{source}: column {name!r}: expected numbers, got {kind}. Cast the column.")
    number = pl.col(name).cast(pl.Float64, strict=False).fill_null(float("nan"))
    return number.alias(user_column(name, "number"))


def _arrow(rows: pl.DataFrame) -> pa.Table:
    kinds = {pl.Int32: pa.int32(), pl.Int64: pa.int64(), pl.Float64: pa.float64()}
    fields = [
        pa.field(name, kinds.get(kind, pa.list_(pa.int32())), nullable=False) for name, kind in rows.schema.items()
    ]
    return to_arrow(rows).cast(pa.schema(fields))
