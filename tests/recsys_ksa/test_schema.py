import subprocess
import sys

import pyarrow as pa
import pytest

from recsys_ksa.schema import EVENTS, ITEMS, SPLIT_COLUMNS, VOCABULARY, histories_schema


@pytest.mark.parametrize("has_event_type", [False, True])
@pytest.mark.parametrize("has_event_id", [False, True])
def test_histories_have_the_optional_lists_only_where_the_log_has_them(has_event_type, has_event_id):
    schema = histories_schema(has_event_type=has_event_type, has_event_id=has_event_id)
    assert ("event_type" in schema.names) == has_event_type
    assert ("event_id" in schema.names) == has_event_id
    assert schema.names[:2] == ["user_id", "user_index"]
    assert tuple(schema.names[-4:]) == SPLIT_COLUMNS
    assert schema.field("item_index").type.value_type == pa.int32()
    assert schema.field("timestamp").type.value_type == pa.int64()


def test_indices_are_never_null():
    assert not any(schema.field(name).nullable for schema, name in ((ITEMS, "item_index"), (VOCABULARY, "index")))
    assert [field.name for field in EVENTS if not field.nullable] == ["user_id", "item_id", "timestamp"]


def test_order_schema_and_features_load_without_torch_and_polars():
    code = (
        "import sys\n"
        "for name in ('torch', 'polars', 'mlflow', 'faiss'): sys.modules[name] = None\n"
        "import recsys_ksa.order, recsys_ksa.schema, recsys_ksa.features, recsys_ksa.data.dataset, recsys_ksa.testing\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
