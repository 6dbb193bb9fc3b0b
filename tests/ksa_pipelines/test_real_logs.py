"""Public logs beside the project: the counts and audits that their descriptions state."""

from pathlib import Path

import pytest

from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.prepare import prepare
from recsys_ksa.commands.demo_data import demo_log
from recsys_ksa.config import load_config
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import MissingPackageError

pytestmark = pytest.mark.realdata
CONFIGS = Path(__file__).parents[2] / "configs" / "prepare"


def prepared_from(config: PrepareConfig, log: Path, items: Path | None, target: Path) -> Dataset:
    prepare(str(log), target, config, str(items) if items else None, lambda line: None)
    return open_dataset(target)


@pytest.mark.parametrize(
    ("name", "users", "items", "rows", "longest"),
    [
        ("ml-1m", 6_040, 3_706, 1_000_209, 2_314),
        ("gowalla-1k", 1_000, 24_209, 157_251, 1_624),
        ("foursquare-nyc", 1_083, 5_135, 147_938, 2_515),
        ("online-retail", 4_372, 3_684, 406_829, 7_983),
        ("amazon-beauty", 22_363, 12_101, 198_502, 204),
        ("ml-1m-sasrec", 6_040, 3_416, 999_611, 2_277),
    ],
)
def test_counts_are_those_of_the_description(real_data, tmp_path, name, users, items, rows, longest):
    catalogue = real_data / name / "items.parquet"
    config = load_config(PrepareConfig, CONFIGS / f"{name}.toml")

    dataset = prepared_from(
        config,
        real_data / name / "interactions.parquet",
        catalogue if catalogue.exists() else None,
        tmp_path / "ds",
    )

    counts, (source,) = dataset.manifest.counts, dataset.manifest.logs
    assert (counts.users, counts.items, source.num_rows) == (users, items, rows)
    assert source.rejected == {}
    assert counts.events == rows - sum(source.duplicates.values())
    assert counts.longest_history <= longest


def test_ml_1m_has_ties_in_no_order(real_data, tmp_path):
    dataset = prepared_from(PrepareConfig(), real_data / "ml-1m" / "interactions.parquet", None, tmp_path / "ds")
    audit = dataset.manifest.tie_audit
    assert round(audit.gap_0_share, 2) == 0.53
    assert audit.next_id_greater is not None
    assert round(audit.next_id_greater, 4) == 0.4995
    assert dataset.manifest.tie == "arrival"
    assert dataset.manifest.split["global"]["log_end"] == 1_046_454_590


@pytest.mark.parametrize("name", ["complete-journey", "ml-latest-small"])
def test_logs_with_sorted_ties_get_hash_order(real_data, tmp_path, name):
    dataset = prepared_from(PrepareConfig(), real_data / name / "interactions.parquet", None, tmp_path / "ds")
    audit = dataset.manifest.tie_audit
    assert dataset.manifest.tie == "hash"
    assert dataset.manifest.tie_chosen_by == "audit"
    assert audit.next_id_greater is not None
    assert audit.next_id_greater > 0.999
    if name == "complete-journey":
        assert round(audit.gap_0_share, 2) == 0.89
        assert round(audit.tied_target_share, 3) == 0.845


def test_the_demo_log_is_found_mapped_and_put_in_hash_order(tmp_path):
    try:
        transactions, products = demo_log()
    except MissingPackageError as error:
        pytest.skip(str(error))

    config = load_config(PrepareConfig, CONFIGS / "complete-journey.toml")
    dataset = prepared_from(config, transactions, products, tmp_path / "ds")

    manifest = dataset.manifest
    assert (manifest.logs[0].num_rows, manifest.counts.users) == (1_469_307, 1_956)
    assert manifest.tie == "hash"
    assert dataset.items.count[1:].min() >= 1
    assert manifest.counts.shortest_history >= 100
    assert dataset.histories.timestamp.min() >= 1_483_228_800  # 2017-01-01, read as UTC
    assert manifest.side_features == ("manufacturer_id", "department", "brand", "product_category", "product_type")
