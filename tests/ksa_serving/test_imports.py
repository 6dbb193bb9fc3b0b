import subprocess
import sys

SERVICE_MODULES = [
    "app",
    "auth",
    "batcher",
    "client",
    "client_commands",
    "cold_store",
    "consume_command",
    "consumption",
    "command",
    "event_log",
    "guards",
    "kafka_source",
    "lmdb_engine",
    "load",
    "metrics",
    "models",
    "redis_engine",
    "release",
    "releases",
    "replay_command",
    "server",
    "shard_mover",
    "shards_command",
    "service",
    "state_store",
    "testing",
    "user_states",
    "user_view",
]


def test_the_service_imports_without_polars_mlflow_faiss_and_without_torch():
    code = f"""
import sys
for name in ("polars", "mlflow", "faiss", "torch", "torchrec", "ksa_pipelines"):
    sys.modules[name] = None
import importlib
for name in {SERVICE_MODULES}:
    importlib.import_module("ksa_serving." + name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_without_an_index_is_served_without_polars_mlflow_and_faiss(tiny_run):
    code = f"""
import sys
for name in ("polars", "mlflow", "faiss", "ksa_pipelines"):
    sys.modules[name] = None
from ksa_serving.release import load_release
from pathlib import Path
release = load_release(Path({str(tiny_run)!r}))
recommender = release.model.recommender
state = recommender.append(recommender.new_state(), ["i1"], [1600000000])
assert len(recommender.recommend(state, k=3)) == 3
print(release.index_source)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "memory" in done.stdout


def test_the_verb_imports_no_model_and_no_web_server():
    code = """
import sys
import ksa_serving.command
assert not {"torch", "uvicorn", "litestar", "apsw", "msgspec", "numpy"} & sys.modules.keys(), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
