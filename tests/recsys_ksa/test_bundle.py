"""Bundles: the manifest tells every file; what an MLflow store hands out is used only where it is what was sent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from recsys_ksa.bundle import BUNDLE_FILE, check_bundle, is_bundle_part, write_manifest
from recsys_ksa.cli import call_verb, main
from recsys_ksa.errors import RunError
from recsys_ksa.run import WEIGHTS_FILE


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(tiny_run, folder / "run")
    call_verb("index", [str(folder / "run"), "--export", str(folder / "bundle")])
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_every_file_of_a_bundle_is_checked(bundle: Path) -> None:
    manifest = check_bundle(bundle)
    assert {"model.safetensors", "items.parquet", "run.json", "config.toml", "index/manifest.json"} <= set(
        manifest.files
    )
    assert all(map(is_bundle_part, manifest.files))
    for name in manifest.files:
        kept = (bundle / name).read_bytes()
        if kept:
            flip_a_bit(bundle / name)
            with pytest.raises(RunError, match=f"{name}: expected .* bytes with SHA-256"):
                check_bundle(bundle)
        (bundle / name).unlink()
        with pytest.raises(RunError, match=f"expected {name} as bundle.json says, got no such file"):
            check_bundle(bundle)
        (bundle / name).write_bytes(kept)
    (bundle / "index" / "more.bin").write_bytes(b"?")
    with pytest.raises(RunError, match=r"index/more\.bin: expected a file that bundle\.json names"):
        check_bundle(bundle)
    (bundle / "index" / "more.bin").unlink()
    (bundle / "vocab" / "link").symlink_to(bundle / "run.json")
    with pytest.raises(RunError, match="got a link"):
        check_bundle(bundle)


def test_a_new_index_renews_the_manifest(bundle: Path) -> None:
    call_verb("index", [str(bundle)])
    check_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../run.json", "index/../../x", "/etc/passwd", "index/", "vocab/a/b", "model.pkl", "index\\x", ""]
)
def test_names_that_no_bundle_has(name: str) -> None:
    assert not is_bundle_part(name)


def published(bundle: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Publish a bundle; return its run in the store, and its manifest's hash."""
    call_verb("publish", [str(bundle), "--tracking", uri])
    words = capsys.readouterr().out.split()
    return words[words.index("fetch", words.index("with:")) + 1], words[words.index("--manifest") + 1]


def test_what_was_published_is_fetched(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    number, digest = published(bundle, uri, capsys)
    out = tmp_path / "releases" / "next"
    call_verb("fetch", [number, "--manifest", digest, "--out", str(out), "--tracking", uri])
    names = {path.relative_to(bundle) for path in bundle.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == names
    assert all((out / name).read_bytes() == (bundle / name).read_bytes() for name in names if (bundle / name).is_file())
    assert main(["fetch", number, "--out", str(out), "--tracking", uri]) == 2
    assert main(["fetch", "0" * 32, "--out", str(tmp_path / "x"), "--tracking", uri]) == 2
    assert main(["fetch", number, "--out", str(tmp_path / "x"), "--tracking", uri, "--max-bytes", "100"]) == 2
    told = capsys.readouterr().err
    assert told.count("RunError") == len(told.splitlines()) == 3


def alter_weights(folder: Path) -> None:
    flip_a_bit(folder / WEIGHTS_FILE)


def alter_weights_and_manifest(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, folder / WEIGHTS_FILE)
    write_manifest(folder, json.loads((folder / BUNDLE_FILE).read_text())["release_hash"])


def add_a_pickle(folder: Path) -> None:
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")


def drop_the_manifest(folder: Path) -> None:
    (folder / BUNDLE_FILE).unlink()


@pytest.mark.parametrize("alter", [alter_weights, alter_weights_and_manifest, add_a_pickle, drop_the_manifest])
@pytest.mark.parametrize("pinned", [False, True])
def test_what_was_altered_in_the_store_is_refused(
    bundle: Path, tmp_path: Path, alter: Callable[[Path], None], pinned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    number, digest = published(bundle, uri, capsys)
    (stored,) = (tmp_path / "store").rglob("bundle")
    alter(stored)
    out = tmp_path / "releases" / "next"
    pin = ["--manifest", digest] if pinned else []
    assert main(["fetch", number, "--out", str(out), "--tracking", uri, *pin]) == 2
    assert list(out.parent.iterdir()) == []  # nothing is left, not even the quarantine
    message = capsys.readouterr().err
    assert message.startswith("RunError")
    assert len(message.splitlines()) == 1


def test_another_bundle_than_the_one_asked_for_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole in itself, put in the store by somebody else: only the hash that was told can say so."""
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    number, digest = published(bundle, uri, capsys)
    (stored,) = (tmp_path / "store").rglob("bundle")
    (stored / "metrics.jsonl").write_text("")
    write_manifest(stored, json.loads((stored / BUNDLE_FILE).read_text())["release_hash"])
    out = str(tmp_path / "next")
    assert main(["fetch", number, "--manifest", digest, "--out", out, "--tracking", uri]) == 2
    assert "expected a bundle with manifest" in capsys.readouterr().err
    call_verb("fetch", [number, "--out", out, "--tracking", uri])
