"""The whole way from a log to a prepared data set, read top to bottom."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ksa_pipelines.catalogue import extend_catalogue, write_catalogue
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.ingest import Resources, apply_filters, ingest
from ksa_pipelines.part import write_parts
from ksa_pipelines.quarantine import gather_quarantine, quarantine_name
from ksa_pipelines.report import Report
from ksa_pipelines.split import global_cuts
from ksa_pipelines.ties import choose_tie, describe_ties
from ksa_pipelines.users import extend_users, write_users
from ksa_pipelines.write import WORK, atomic_directory, hash_files, refuse_existing
from recsys_ksa import __version__
from recsys_ksa.data.cache import write_cache
from recsys_ksa.data.manifest import Counts, Manifest
from recsys_ksa.data.rows import Overview, open_rows
from recsys_ksa.schema import FORMAT_VERSION


def prepare(
    log: str,
    target: Path,
    config: PrepareConfig,
    items: str | None,
    report: Report,
    resources: Resources = Resources(),  # noqa: B008  frozen
    users: str | None = None,
) -> Manifest:
    """Prepare a log into the data set `target` and return its manifest.

    Args:
        log: a file, a folder, a pattern or an address; see `sources.find_files`.
        target: the data set to write; must not exist.
        items: the items file, or None.
        report: is told what each step did.
        resources: where the work runs and what it may take.
        users: the table of users, or None.

    Raises:
        SchemaError: a column is missing, of a wrong type, or the times cannot be Unix seconds.
        DataError: a file is broken, nothing is left of the log, a bucket does not fit, or `target` exists.
    """
    refuse_existing(target)
    with atomic_directory(target) as directory:
        work = directory / WORK
        ingested = ingest(log, config, work, resources, report)
        audit = ingested.tied.audit()
        tie = choose_tie(audit, config.tie)
        report(describe_ties(audit, tie))
        ingested = apply_filters(ingested, config, resources.engine, log, report)

        counted = ingested.counted()
        catalogue = extend_catalogue(None, counted, items, config, report)
        split = global_cuts(config.split, config.clock, ingested.last_timestamp)
        nobody = [0] * config.num_buckets
        numbered, files = write_parts(ingested, catalogue, tie.kind, split, directory, 0, resources.engine, nobody)
        report(f"ordered {sum(numbered):,} histories")
        write_catalogue(catalogue, directory, 0)
        gather_quarantine(work, directory / quarantine_name(0))
        rows = open_rows(directory, files)
        overview = Overview.of(rows, split)
        with ThreadPoolExecutor(1) as pool:
            removed = pool.submit(shutil.rmtree, work)
            write_cache(directory, rows, overview, 0)
            removed.result()
        user_table = extend_users(rows, None, directory, users, config.users, report)
        write_users(user_table, directory, 0)
        others = [path for path in directory.rglob("*.parquet") if path.relative_to(directory).as_posix() not in files]
        files |= hash_files(directory, others)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            code_version=__version__,
            content_hash=overview.content_hash,
            split_hash=overview.split_hash,
            clock=config.clock,
            tie=tie.kind,
            tie_chosen_by=tie.chosen_by,
            tie_audit=audit,
            num_buckets=config.num_buckets,
            has_event_type=ingested.has_event_type,
            has_event_id=ingested.has_event_id,
            has_value=config.columns.value is not None,
            has_title="title" in catalogue.items.columns,
            side_features=config.items.side_features,
            multi_features=config.items.multi_features,
            vectors=tuple(config.items.vectors),
            counts=Counts.of(overview.lengths, catalogue.num_items),
            split=split,
            logs=(ingested.source,),
            items_files=catalogue.items_files,
            items_described=catalogue.items_described,
            user_features=config.users.kinds,
            users_files=user_table.files,
            users_described=user_table.rows.height,
            config=config.model_dump(mode="json"),
            numbered_users=numbered,
            files=dict(sorted(files.items())),
        )
        manifest.save(directory)
    report(f"wrote {target}: {len(manifest.files)} files, content hash {manifest.content_hash[:12]}")
    return manifest
