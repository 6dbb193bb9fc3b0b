"""Rankings as Parquet: the first items of every question, so that anyone can score them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions
from recsys_ksa.evaluate.ranking import Chunk, Scorer, chunks
from recsys_ksa.evaluate.tiles import top_k

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset

DEPTH = 200
RANKINGS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""One row a question and rank; `timestamp` is the targets' time, `rank` counts from 1."""


def write_rankings(
    path: Path,
    scorer: Scorer,
    questions: Questions,
    dataset: "Dataset",
    ownership: Ownership,
    *,
    exclude_seen: bool,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write the first `DEPTH` items of every question; return the number of rows.

    Equal scores are listed with targets last, as they are counted; what a seen filter takes away is not listed.

    Args:
        path: of the Parquet file.
        scorer: gives the scores.
        questions: what is asked.
        dataset: gives the ids.
        ownership: of its histories.
        exclude_seen: leave out what the user had, targets excepted.
        metadata: kept in the file's schema.
        device: where items are ranked.
    """
    user_ids = np.array(dataset.histories.user_ids(), dtype=object)
    item_ids = np.array(dataset.items.item_id, dtype=object)
    schema = RANKINGS.with_metadata({key.encode(): value.encode() for key, value in metadata.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for chunk in chunks(questions, dataset.num_items - 1):
            gathered = Chunk.of(chunk, ownership, device)
            scores = gathered.scores(scorer, exclude_seen=exclude_seen)
            best, index = top_k(scores[:, 1:], min(DEPTH, scores.shape[1] - 1))
            item, score = index.cpu().numpy() + 1, best.cpu().numpy()
            question = np.repeat(np.arange(len(chunk)), item.shape[1]).reshape(item.shape)
            stride = dataset.num_items
            is_target = np.isin(question * stride + item, chunk.target_question * stride + chunk.target_item)
            order = np.lexsort((item, is_target, -score), axis=1)
            item, score = np.take_along_axis(item, order, 1), np.take_along_axis(score, order, 1)
            kept = score > -np.inf
            rank = np.broadcast_to(np.arange(1, item.shape[1] + 1, dtype=np.int32), item.shape)
            columns = [
                pa.array(user_ids[chunk.user[question[kept]]], pa.string()),
                pa.array(chunk.timestamp[question[kept]]),
                pa.array(rank[kept]),
                pa.array(item_ids[item[kept]], pa.string()),
                pa.array(score[kept]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            rows += int(kept.sum())
    return rows
