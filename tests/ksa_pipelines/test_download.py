"""Downloads, from a server of this machine: the publisher's address is never asked in tests."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ksa_pipelines.config import presets
from ksa_pipelines.download import Download, download_of, fetch
from recsys_ksa.cli import main
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.errors import DataError, UsageError

RATINGS = "1::10::5::100\n1::11::4::200\n2::10::3::300\n"


def archive(members: dict[str, str]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return held.getvalue()


ZIP = archive({"ml-1m/ratings.dat": RATINGS, "ml-1m/README": "terms", "ml-1m/users.dat": "1::M\n"})


@pytest.fixture
def address(monkeypatch) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ml-1m.zip" else 404)
            self.end_headers()
            self.wfile.write(ZIP)

        def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
        server.shutdown()
        thread.join()


def a_download(address: str, **other: object) -> Download:
    values = {"address": address, "md5": hashlib.md5(ZIP).hexdigest(), "members": ("ml-1m/ratings.dat", "ml-1m/README")}
    return Download.model_validate(values | {"terms": "\nonly for tests"} | other)


def test_a_preset_is_fetched_shown_its_terms_and_prepared(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ksa_pipelines.download.download_of", lambda preset: a_download(address))
    log, target = tmp_path / "log", tmp_path / "ds"
    arguments = ["prepare", str(log), "--out", str(target), "--preset", "movielens-1m", "--download"]

    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "only for tests" in shown.splitlines()
    assert "--accept-terms" in shown.splitlines()[-1]
    assert not log.exists()

    assert main([*arguments, "--accept-terms"]) == 0
    assert sorted(path.name for path in log.iterdir()) == ["README", "ratings.dat"]
    assert open_dataset(target).histories.num_events == 3


def test_what_is_there_is_not_fetched_again(tmp_path):
    said: list[str] = []
    fetch(a_download("http://127.0.0.1:9/none"), tmp_path, said.append, accepted=False)
    assert "nothing is fetched" in said[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [({"md5": "0" * 32}, "expected md5 0000"), ({"members": ("ml-1m/none.dat",)}, r"zip with ml-1m/none\.dat")],
)
def test_what_is_not_what_was_published_leaves_nothing(address, tmp_path, other, message):
    with pytest.raises(DataError, match=message):
        fetch(a_download(address, **other), tmp_path / "log", print, accepted=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("path", "message"), [("/gone.zip", "Not Found"), (None, "refused")])
def test_a_publisher_that_does_not_answer_is_named_and_what_to_do(address, tmp_path, path, message):
    closed = "http://127.0.0.1:9/ml-1m.zip"
    with pytest.raises(DataError, match=f"expected the publisher to answer, got: .*{message}.*without --download"):
        fetch(
            a_download(address.replace("/ml-1m.zip", path) if path else closed), tmp_path / "log", print, accepted=True
        )
    assert list(Path(tmp_path).iterdir()) == []


def test_only_presets_whose_publisher_hands_out_a_file_are_fetched():
    with pytest.raises(UsageError, match="expected --preset movielens or movielens-100k or movielens-1m, got kuairand"):
        download_of("kuairand")
    for preset in ("movielens", "movielens-1m", "movielens-100k"):
        assert preset in presets()
        found = download_of(preset)
        assert found.address.startswith("https://")
        assert len(found.md5) == 32
