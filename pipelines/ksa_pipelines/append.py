"""A new log on top of a data set, at the cost of what it touches: one delta part for each touched bucket.

A delta part holds the whole rows of the users that the log touches, late events in their place by the one order.
Known users, items and categories keep their numbers; new ones come after. Appending the manifest's logs one after
the other to nothing gives the same content hash and vocabularies again.
"""

from pathlib import Path

from ksa_pipelines.catalogue import extend_catalogue, read_catalogue, write_catalogue
from ksa_pipelines.change import changing
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.ingest import Resources, ingest
from ksa_pipelines.known import KnownNames
from ksa_pipelines.part import write_parts
from ksa_pipelines.quarantine import gather_quarantine, quarantine_name
from ksa_pipelines.report import Report
from ksa_pipelines.split import global_cuts
from ksa_pipelines.stored import Stored
from ksa_pipelines.users import extend_users, write_users
from ksa_pipelines.write import hash_files
from recsys_ksa import __version__
from recsys_ksa.config_files import parse_config
from recsys_ksa.data.cache import checked_rows
from recsys_ksa.data.manifest import Counts, Manifest, versioned
from recsys_ksa.data.rows import Overview, open_rows
from recsys_ksa.errors import DataError


def append_log(
    dataset: Path,
    log: str,
    report: Report,
    *,
    items: str | None = None,
    users: str | None = None,
    mapping: PrepareConfig | None = None,
    resources: Resources = Resources(),  # noqa: B008  frozen
) -> Manifest:
    """Append a log to a prepared data set; return the manifest of the new version.

    Args:
        dataset: as `ksa prepare` wrote it.
        log: a file, a folder, a pattern or an address, mapped and checked as the first log was.
        report: is told what each step did.
        items: an items file that describes the log's new items, or None.
        users: a table of users, or None; who is described already stays as described.
        mapping: how the log is read and its columns are named (`[read]`, `[columns]`), where that is not as it was
            for the first log; the rest of it is ignored.
        resources: where the work runs and what it may take.

    Raises:
        SchemaError: as for `prepare`; or the log has other optional columns than the data set.
        DataError: as for `prepare`; or the data set was filtered, or is being changed by another process.
    """
    with changing(dataset) as change:
        before = change.before
        config = _config(before, dataset, mapping)
        known_catalogue = read_catalogue(dataset, before)
        stored_rows = checked_rows(dataset, before)
        stored = Stored(stored_rows)
        change.work.mkdir()
        item_ids, event_types = known_catalogue.items["item_id"], known_catalogue.event_types()
        known = KnownNames(stored, item_ids, event_types, _optional_columns(before))
        last = before.logs[-1]
        ingested = ingest(
            log,
            config,
            change.work,
            resources,
            report,
            known=known,
            forgotten=before.forgotten,
            number=len(before.logs),
            first_arrival=last.first_arrival + last.num_rows,
        )
        counted = ingested.counted()
        catalogue = extend_catalogue(known_catalogue, counted, items, config, report)
        split = global_cuts(config.split, config.clock, max(ingested.last_timestamp, _log_end(before)))
        numbered, parts = write_parts(
            ingested,
            catalogue,
            before.tie,
            split,
            dataset,
            change.version,
            resources.engine,
            before.numbered_users,
            stored,
        )
        report(f"touched {len(parts)} buckets")
        write_catalogue(catalogue, dataset, change.version)
        quarantine = dataset / quarantine_name(len(before.logs))
        gather_quarantine(change.work, quarantine)

        old_tables = {before.table_file(name) for name in before.tables}
        written = [dataset / versioned(name, change.version) for name in before.item_tables]
        written += [quarantine] if quarantine.exists() else []
        files = {name: digest for name, digest in before.files.items() if name not in old_tables} | parts
        rows = open_rows(dataset, files, stored_rows)
        overview = Overview.of(rows, split)
        user_table = extend_users(rows, before, dataset, users, config.users, report)
        written += write_users(user_table, dataset, change.version)
        files |= hash_files(dataset, written)
        after = before.model_copy(
            update={
                "code_version": __version__,
                "version": change.version,
                "tables_version": change.version,
                "content_hash": overview.content_hash,
                "split_hash": overview.split_hash,
                "counts": Counts.of(overview.lengths, catalogue.num_items),
                "split": split,
                "logs": (*before.logs, ingested.source),
                "items_files": catalogue.items_files,
                "items_described": catalogue.items_described,
                "users_files": user_table.files,
                "users_described": user_table.rows.height,
                "numbered_users": numbered,
                "files": dict(sorted(files.items())),
            }
        )
        change.publish(after, keep_earlier=True)
    report(f"{dataset}: version {after.version}, content hash {after.content_hash[:12]}")
    return after


def _config(before: Manifest, dataset: Path, mapping: PrepareConfig | None) -> PrepareConfig:
    config = parse_config(PrepareConfig, before.config, str(dataset))
    if config.filters:
        raise DataError(
            f"{dataset}: expected a data set without filters, this one has min_item_count {config.min_item_count}, "
            f"min_user_events {config.min_user_events}, k_core {config.k_core}: a later log would change what was "
            "dropped. Prepare it without them, and filter with `ksa view`."
        )
    if mapping is None:
        return config
    return config.model_copy(update={"columns": mapping.columns, "read": mapping.read})


def _optional_columns(manifest: Manifest) -> frozenset[str]:
    there = {"event_type": manifest.has_event_type, "event_id": manifest.has_event_id, "value": manifest.has_value}
    return frozenset(name for name, has in there.items() if has)


def _log_end(manifest: Manifest) -> int:
    return manifest.split["global"]["log_end"] if "global" in manifest.split else 0
