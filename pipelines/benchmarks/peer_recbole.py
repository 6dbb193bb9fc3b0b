"""RecBole, as it ships: its atomic file (text) into its data set, up to the first batch for SASRec. Run by peers.py."""

import sys

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import init_seed


def main(folder: str) -> None:
    """Load `folder`/log/log.inter with the library's defaults for sequential models."""
    settings = {
        "data_path": folder,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
        "use_gpu": False,
    }
    sys.argv = sys.argv[:1]  # it reads the command line, too
    config = Config(model="SASRec", dataset="log", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    batch = next(iter(train))
    print(f"{dataset.inter_num} events; the first batch has {len(batch)} rows")


if __name__ == "__main__":
    main(sys.argv[1])
