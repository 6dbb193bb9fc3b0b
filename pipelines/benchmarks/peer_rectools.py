"""RecTools, as it ships: Parquet into its data set, up to the first batch for SASRec. Run by peers.py."""

import sys
from pathlib import Path

import pandas as pd
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def main(log: Path) -> None:
    """Load a folder of Parquet parts with the library's defaults."""
    rows = pd.concat([pd.read_parquet(file) for file in sorted(log.glob("*.parquet"))], ignore_index=True)
    rows = rows[["user_id", "item_id", "timestamp"]].rename(columns={"timestamp": Columns.Datetime})
    rows[Columns.User], rows[Columns.Item] = rows.pop("user_id"), rows.pop("item_id")
    rows[Columns.Weight] = 1.0
    rows[Columns.Datetime] = pd.to_datetime(rows[Columns.Datetime], unit="s")
    dataset = Dataset.construct(rows)
    preparator = SASRecModel().data_preparator
    preparator.process_dataset_train(dataset)
    batch = next(iter(preparator.get_dataloader_train()))
    print(f"{len(dataset.interactions.df)} events; the first batch has {len(batch['x'])} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
