"""Merging the parts of many increments into one a bucket, and dropping earlier versions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ksa_pipelines.change import changing
from ksa_pipelines.report import Report
from ksa_pipelines.split import Split
from ksa_pipelines.write import PART_OPTIONS, hash_files, row_groups
from recsys_ksa.data.manifest import Manifest
from recsys_ksa.data.parts import blocks, checked_parts, open_parts, part_name, parts_by_bucket, with_global_split
from recsys_ksa.data.rows import Overview, open_rows
from recsys_ksa.errors import DataError
from recsys_ksa.progress import progress


def compact(dataset: Path, report: Report) -> Manifest:
    """Merge each bucket's parts into one, remove earlier versions, and return the manifest of the new one.

    The content hash stays; a data set of one part a bucket only loses its earlier versions.

    Raises:
        DataError: it is no data set, damaged, or being changed by another process.
    """
    with changing(dataset) as change:
        before = change.before
        checked_parts(dataset, before)
        files = dict(before.files)
        merged_buckets = {bucket: names for bucket, names in parts_by_bucket(files).items() if len(names) > 1}
        for bucket, names in progress(merged_buckets.items(), "merging", unit="bucket"):
            target = dataset / part_name(change.version, bucket)
            merge_parts(dataset, names, target, before.split)
            files = {name: digest for name, digest in files.items() if name not in names}
            files |= hash_files(dataset, [target])
        overview = Overview.of(open_rows(dataset, files), before.split)
        if (overview.content_hash, overview.split_hash) != (before.content_hash, before.split_hash):
            raise DataError(
                f"{dataset}: expected content hash {before.content_hash[:12]}..., merging its parts gives "
                f"{overview.content_hash[:12]}.... Prepare the data set again."
            )
        after = before.model_copy(update={"version": change.version, "files": dict(sorted(files.items()))})
        change.publish(after, keep_earlier=False)
    report(f"{dataset}: version {after.version}, merged the parts of {len(merged_buckets)} buckets")
    return after


def merge_parts(
    dataset: Path,
    names: Sequence[str],
    target: Path,
    split: Split,
    keep: Callable[[pa.Table], pa.Table] = lambda block: block,
) -> int:
    """Write the newest rows of a bucket's parts into one part, in bounded memory; return how many users it has.

    Args:
        dataset: the data set.
        names: the bucket's parts, oldest first.
        target: the Parquet file to write; not written where no user is left.
        split: the cuts of protocol `global`.
        keep: returns the rows of a block that stay.
    """
    parts = open_parts(dataset, names)
    num_users, writer = 0, None
    try:
        for block in blocks(parts):
            block = keep(with_global_split(block, split))
            if block.num_rows:
                writer = writer or pq.ParquetWriter(str(target), block.schema, **PART_OPTIONS)
                for group in row_groups(block):
                    writer.write_table(group, row_group_size=group.num_rows)
                num_users += block.num_rows
    finally:
        if writer is not None:
            writer.close()
    return num_users
