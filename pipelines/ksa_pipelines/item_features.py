"""What an items file says of an item beside one category: several categories, and vectors of numbers.

items.parquet   <name>_indices   list<int32>, rows of vocab/<name>.parquet; empty where none is known
                <name>_vector    fixed_size_list<float>, zeros where none is known
"""

import polars as pl

from ksa_pipelines.columns import Schema, column_type, text_column
from ksa_pipelines.config import ItemsConfig
from recsys_ksa.errors import SchemaError
from recsys_ksa.schema import indices_column, vector_column

_NUMBERS = pl.Float32


def feature_columns(config: ItemsConfig, schema: Schema, source: str) -> list[pl.Expr]:
    """Return the columns of lists and vectors by their feature's name: list[str], list[f32]; null where unknown.

    Raises:
        SchemaError: a column is missing, or holds neither.
    """
    lists = [
        categories_column(schema, name, config.multi_separator, source).alias(name) for name in config.multi_features
    ]
    vectors = [_vector(schema, columns, source).alias(name) for name, columns in config.vectors.items()]
    return lists + vectors


def with_category_indices(
    items: pl.DataFrame, name: str, vocabulary: pl.DataFrame, key: str = "item_id"
) -> pl.DataFrame:
    """Return the items with the column `<name>_indices` in place of `<name>`: each category once, ascending.

    Rows are told apart by the column `key`.
    """
    codes = vocabulary.drop_nulls("value").select(pl.col("value").alias(name), "index")
    each = items.select(key, name).explode(name).join(codes, on=name)
    column = indices_column(name)
    found = each.group_by(key).agg(pl.col("index").cast(pl.Int32).unique().sort().alias(column))
    joined = items.drop(name).join(found, on=key, how="left", maintain_order="left")
    return joined.with_columns(pl.col(column).fill_null([]))


def with_vector(items: pl.DataFrame, name: str, length: int, source: str | None) -> pl.DataFrame:
    """Return the items with the column `<name>_vector` in place of `<name>`.

    Raises:
        SchemaError: a vector of another length, or one with a number that is not finite.
    """
    given = items[name].drop_nulls()
    lengths = set(given.list.len().unique()) - {length}
    if lengths or not bool(given.explode().is_finite().fill_null(value=False).all()):
        wrong = f"of {min(lengths)}" if lengths else "with a null, NaN or infinity"
        raise SchemaError(
            f"{source}: items.vectors {name!r}: expected vectors of {length} finite numbers, got one {wrong}. "
            "Mend the items file."
        )
    vector = pl.col(name).fill_null([0.0] * length).list.to_array(length).alias(vector_column(name))
    return items.with_columns(vector).drop(name)


def vector_length(name: str, items: pl.DataFrame, source: str | None) -> int:
    """Return the length of a file's vectors, that of the first there is.

    Raises:
        SchemaError: there is none.
    """
    lengths = items[name].drop_nulls().list.len() if name in items.columns else pl.Series([], dtype=pl.UInt32)
    if lengths.is_empty() or not lengths[0]:
        raise SchemaError(f"{source}: items.vectors {name!r}: expected some item with a vector, found none.")
    return int(lengths[0])


def unknown_row(multi: tuple[str, ...], vectors: dict[str, int]) -> pl.DataFrame:
    """Return what row 0 has of these: no categories, zeros."""
    lists = [pl.Series(indices_column(name), [[]], dtype=pl.List(pl.Int32)) for name in multi]
    zeros = [
        pl.Series(vector_column(name), [[0.0] * length], dtype=pl.Array(_NUMBERS, length))
        for name, length in vectors.items()
    ]
    return pl.DataFrame(lists + zeros)


def categories_column(schema: Schema, name: str, separator: str, source: str) -> pl.Expr:
    """Return a column of lists of texts, or of texts split at the separator, without empty ones; null stays null.

    Raises:
        SchemaError: it is missing, or holds neither.
    """
    kind = column_type(schema, name, source)
    if isinstance(kind, pl.List | pl.Array):
        inner = kind.inner
        if not (inner in (pl.String, pl.Categorical, pl.Enum) or inner.is_integer()):
            raise SchemaError(f"{source}: column {name!r}: expected lists of strings or integers, got {kind}.")
        texts = pl.col(name).cast(pl.List(pl.String))
    else:
        texts = text_column(schema, name, source).str.split(separator)
    return texts.list.eval(pl.element().str.strip_chars()).list.eval(pl.element().filter(pl.element() != ""))


def _vector(schema: Schema, columns: tuple[str, ...], source: str) -> pl.Expr:
    kinds = [column_type(schema, name, source) for name in columns]
    if len(columns) == 1 and isinstance(kinds[0], pl.List | pl.Array):
        return pl.col(columns[0]).cast(pl.List(_NUMBERS))
    for name, kind in zip(columns, kinds):
        if not (kind.is_numeric() or kind == pl.String):
            raise SchemaError(f"{source}: column {name!r}: expected numbers, or one column of lists, got {kind}.")
    numbers = [pl.col(name).cast(_NUMBERS, strict=False) for name in columns]
    return pl.when(pl.all_horizontal(number.is_not_null() for number in numbers)).then(pl.concat_list(numbers))
