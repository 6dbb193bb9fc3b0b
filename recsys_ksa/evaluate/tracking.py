"""The only file that imports MLflow: one evaluation becomes one MLflow run. Works offline, in sqlite.

Metric names keep MLflow's alphabet: `ndcg@10` of slice `all` is `ksa.target.all.ndcg_10`.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from recsys_ksa.bundle import BUNDLE_FILE, is_bundle_part
from recsys_ksa.errors import MissingPackageError, RunError, UsageError
from recsys_ksa.evaluate.plots import read_curves

if TYPE_CHECKING:
    from recsys_ksa.bundle import BundleManifest
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.evaluate.evaluation import Evaluation, NamedRun

FOLDER = "mlruns"
BUNDLE_FOLDER = "bundle"
DEFAULT_URI = f"sqlite:///{FOLDER}/mlflow.db"
EXPERIMENT = "recsys-ksa"
_SQLITE = "sqlite:///"
_BATCH = 900
"""Metrics sent at once; MLflow takes 1,000."""


class Store:
    """An MLflow tracking store, ready to record."""

    def __init__(self, client: Any, uri: str, experiment: str) -> None:
        self.client, self.uri, self.experiment = client, uri, experiment

    def record(
        self,
        evaluation: "Evaluation",
        dataset: "Dataset",
        runs: Sequence["NamedRun"],
        curves: Path,
        artefacts: Sequence[Path],
    ) -> str:
        """Record parameters, figures, training curves and files as one run; return where it is and how to look."""
        from mlflow.entities import Metric, Param

        main = runs[0].run
        with _quiet():
            run = self.client.create_run(self.experiment, run_name=f"{main.info.name} {evaluation.protocol}")
            number = run.info.run_id
            params = [Param(key, value) for key, value in _params(evaluation, dataset, runs).items()]
            self.client.log_batch(number, params=params)
            metrics = [
                Metric(_metric_name(row.model, row.request_time, row.slice, row.metric), row.value, 0, 0)
                for row in evaluation.rows
            ]
            for point in read_curves(curves):
                step = int(point.pop("step", 0))
                metrics += [Metric(f"training.{_safe(name)}", value, 0, step) for name, value in point.items()]
            for start in range(0, len(metrics), _BATCH):
                self.client.log_batch(number, metrics=metrics[start : start + _BATCH])
        return self._finish(number, artefacts)

    def record_files(self, name: str, params: dict[str, str], artefacts: Sequence[Path]) -> str:
        """Record files as one run; return where it is and how to look."""
        from mlflow.entities import Param

        with _quiet():
            number = self.client.create_run(self.experiment, run_name=name).info.run_id
            self.client.log_batch(number, params=[Param(key, value[:500]) for key, value in params.items()])
        return self._finish(number, artefacts)

    def record_bundle(self, bundle: Path, manifest: "BundleManifest", digest: str) -> str:
        """Record a bundle's files as one run; return its number."""
        from mlflow.entities import Param

        params = {"release_hash": manifest.release_hash, "bundle_manifest": digest}
        with _quiet():
            number: str = self.client.create_run(self.experiment, run_name=f"bundle {bundle.name}").info.run_id
            self.client.log_batch(number, params=[Param(key, value) for key, value in params.items()])
            self.client.log_artifacts(number, str(bundle), BUNDLE_FOLDER)
            self.client.set_terminated(number)
        return number

    def fetch_bundle(self, number: str, folder: Path, max_bytes: int) -> None:
        """Download a run's bundle into a new folder, file by file. Nothing of it is opened.

        Raises:
            RunError: there is none, it has names that no bundle has, or more bytes than allowed.
        """
        from mlflow.exceptions import MlflowException

        try:
            with _quiet():
                files = [*self._files(number, BUNDLE_FOLDER)]
                names = [path.removeprefix(f"{BUNDLE_FOLDER}/") for path, _ in files]
                if unknown := [name for name in names if not is_bundle_part(name)]:
                    raise RunError(f"MLflow run {number}: expected the files of a bundle, got {unknown[0]!r}.")
                if BUNDLE_FILE not in names:
                    raise RunError(f"MLflow run {number}: expected a bundle that `ksa publish` recorded, got none.")
                if (total := sum(size for _, size in files)) > max_bytes:
                    raise RunError(
                        f"MLflow run {number}: expected at most {max_bytes} bytes, got {total}. See --max-bytes."
                    )
                os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one a file
                for name in tqdm(names, desc="fetching", disable=None):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryDirectory(
                        dir=folder
                    ) as apart:  # where in it a file lies depends on the store
                        arrived = self.client.download_artifacts(number, f"{BUNDLE_FOLDER}/{name}", apart)
                        shutil.copyfile(arrived, target)
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"MLflow run {number}: expected its bundle, got: {reason}") from error

    def _files(self, number: str, folder: str) -> Iterator[tuple[str, int]]:
        """Yield path and size of all files of a run below a folder."""
        for found in self.client.list_artifacts(number, folder):
            if found.is_dir:
                yield from self._files(number, found.path)
            else:
                yield found.path, found.file_size or 0

    def _finish(self, number: str, artefacts: Sequence[Path]) -> str:
        with _quiet():
            for path in artefacts:
                self.client.log_artifact(number, str(path))
            self.client.set_terminated(number)
        return f"MLflow run {number} in {self.uri}; look with `mlflow ui --backend-store-uri {self.uri}`"


def open_store(uri: str | None) -> Store:
    """Open the tracking store; a sqlite file is made where it is missing, its artefacts beside it.

    Args:
        uri: an MLflow tracking URI; None: `DEFAULT_URI`.

    Raises:
        MissingPackageError: mlflow is not installed.
        UsageError: mlflow cannot use the URI.
    """
    uri = DEFAULT_URI if uri is None else uri
    try:
        with _quiet():
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise MissingPackageError(
            f"tracking: expected the package mlflow, got: {error}. "
            'Install it with `pip install "recsys-ksa[evaluate]"`, or pass --tracking none.'
        ) from error
    location = None
    if uri.startswith(_SQLITE):
        folder = Path(uri.removeprefix(_SQLITE)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        location = (folder / "artifacts").as_uri()
    try:
        with _quiet():
            client = MlflowClient(tracking_uri=uri)
            known = client.get_experiment_by_name(EXPERIMENT)
            experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, location)
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--tracking: expected an MLflow tracking URI or none, got {uri!r}: {reason}") from error
    return Store(client, uri, experiment)


def _params(evaluation: "Evaluation", dataset: "Dataset", runs: Sequence["NamedRun"]) -> dict[str, str]:
    main = runs[0].run
    params = {
        "protocol": evaluation.protocol,
        "request_times": ", ".join(evaluation.variants),
        "exclude_seen": str(evaluation.exclude_seen).lower(),
        "max_length": "all" if evaluation.max_length is None else str(evaluation.max_length),
        "num_users": str(evaluation.num_users),
        "num_questions": str(evaluation.num_questions),
        "data_hash": dataset.manifest.content_hash,
        "split_hash": dataset.manifest.split_hash,
        "tie": dataset.manifest.tie,
        "clock": dataset.manifest.clock,
        "release_hash": main.info.release_hash,
        "training_span": main.info.training_span,
        "code_version": main.info.code_version,
        "compared": ", ".join(f"{named.name}: {named.run.info.name}" for named in runs[1:]) or "none",
    }
    for section, values in main.config.model_dump(mode="json").items():
        if isinstance(values, dict):
            params |= {f"{section}.{key}": str(value)[:500] for key, value in values.items()}
        else:
            params[section] = str(values)
    return params


def _metric_name(model: str, request_time: str | None, part: str, metric: str) -> str:
    return ".".join(_safe(word) for word in (model, request_time, part, metric) if word is not None)


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's dependencies warn of each other's deprecations; none of it is the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
