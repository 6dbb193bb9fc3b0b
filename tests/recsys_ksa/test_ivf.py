"""The approximate index: made once, stored beside the run, loaded without training, refused where it misses items."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recsys_ksa import Recommender
from recsys_ksa.bundle import BUNDLE_FILE, check_bundle
from recsys_ksa.cli import call_verb, main
from recsys_ksa.errors import RunError
from recsys_ksa.retrieval import ivf, recall
from recsys_ksa.retrieval.index import StoredVectors, TorchIndex
from recsys_ksa.retrieval.ivf import IvfIndex, IvfLists, train_lists, write_ivf
from recsys_ksa.retrieval.recall import drawn_questions, recall_of_each
from recsys_ksa.run import load_network, open_run
from recsys_ksa.testing import random_run

NUM_ITEMS = 3000


def cluster(network: Any) -> None:
    """Put items around 40 centres: those of an untrained network have no nearness."""
    table = network.embedding.all_candidates()
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(40, table.shape[1], generator=draw)
    which = torch.randint(40, (len(table),), generator=draw)
    with torch.no_grad():
        table.copy_(centres[which] + 0.2 * torch.randn(table.shape, generator=draw))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = random_run(tmp_path_factory.mktemp("ivf") / "run", NUM_ITEMS, alter=cluster)
    call_verb("index", [str(run), "--kind", "ivf", "--export", str(run.parent / "bundle")])
    return run.parent


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def clustered(rng: np.random.Generator, num_items: int, dim: int) -> torch.Tensor:
    centres = rng.normal(size=(max(1, num_items // 100), dim))
    rows = centres[rng.integers(len(centres), size=num_items)] + 0.3 * rng.normal(size=(num_items, dim))
    return torch.from_numpy(rows.astype(np.float32))


def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an index was trained, or items assigned to lists, where it was only to be loaded")

    monkeypatch.setattr(faiss.Clustering, "train", refuse)
    for name in ("train", "add", "add_with_ids"):
        monkeypatch.setattr(faiss.IndexIVFFlat, name, refuse)
    monkeypatch.setattr(ivf, "train_lists", refuse)


# -- lists ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(5))
def test_what_is_loaded_has_the_lists_that_were_stored(rng: np.random.Generator, tmp_path: Path, turn: int) -> None:
    """Random catalogues: the lists hold each item once, where it was assigned, as FAISS's own training would."""
    num_items, dim = int(rng.integers(2, 3000)), int(rng.integers(2, 40))
    vectors = clustered(rng, num_items, dim)
    lists = train_lists(vectors, vectors.shape[1])
    assert torch.equal(
        lists.list_index, train_lists(vectors, vectors.shape[1]).list_index
    )  # the same vectors give the same lists
    nearest = (vectors @ lists.centroids.T).max(dim=1).values
    chosen = (vectors * lists.centroids[lists.list_index.long()]).sum(dim=1)
    torch.testing.assert_close(chosen, nearest)
    index = IvfIndex(vectors, lists, "v", probes=len(lists.centroids))
    inverted = index._index.invlists
    found = np.full(num_items, -1)
    for number in range(len(lists.centroids)):
        size = inverted.list_size(number)
        if not size:
            continue
        rows = faiss.rev_swig_ptr(inverted.get_ids(number), size)
        content = faiss.rev_swig_ptr(inverted.get_codes(number), size * dim * 4).view(np.float32).reshape(size, dim)
        np.testing.assert_array_equal(content, vectors[torch.from_numpy(rows.copy())].numpy())
        found[rows] = number
    np.testing.assert_array_equal(found, lists.list_index.numpy())


@pytest.mark.parametrize("turn", range(5))
def test_all_lists_are_exact_search_and_hide_what_they_are_told(rng: np.random.Generator, turn: int) -> None:
    num_items, dim = int(rng.integers(50, 2000)), int(rng.integers(2, 40))
    vectors = clustered(rng, num_items, dim)
    lists = train_lists(vectors, vectors.shape[1])
    exact, index = TorchIndex(vectors), IvfIndex(vectors, lists, "v", probes=len(lists.centroids))
    for query in rng.normal(size=(10, dim)).astype(np.float32):
        hidden = rng.integers(1, num_items, int(rng.integers(0, num_items)))
        k = int(rng.integers(1, 60))
        wanted, best = exact.search(query, k, hidden)
        rows, scores = index.search(query, k, hidden)
        assert not set(rows.tolist()) & {0, *hidden.tolist()}
        assert len(rows) == len(wanted)
        np.testing.assert_allclose(scores, best, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(vectors.numpy()[rows] @ query, best, rtol=1e-4, atol=1e-4)


def test_a_few_lists_find_almost_all(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 20_000, 16)
    index = IvfIndex(vectors, train_lists(vectors, vectors.shape[1]), "v")
    questions = vectors[torch.from_numpy(rng.integers(1, 20_000, 100))]
    assert recall_of_each(index, vectors, questions).mean() > 0.98


def test_biases_cost_no_recall(rng: np.random.Generator) -> None:
    """Lists by direction and bias together lose a tenth and more here."""
    vectors = torch.nn.functional.normalize(clustered(rng, 4000, 16), dim=1)
    biases = torch.from_numpy(rng.normal(0, 2, (4000, 1)).astype(np.float32))
    biased = torch.cat([vectors, biases], dim=1)
    some = torch.from_numpy(rng.integers(1, 4000, 50))
    questions = torch.cat([vectors[some] / 0.05, torch.ones(50, 1)], dim=1)
    lists = train_lists(biased, 16)
    assert torch.equal(lists.list_index, train_lists(vectors, 16).list_index)
    for number in range(0, len(lists.centroids), 10):
        assert lists.centroids[number, 16] == biases[lists.list_index == number].max()
    ours = recall_of_each(IvfIndex(biased, lists, "v", 8), biased, questions).mean()
    together = recall_of_each(IvfIndex(biased, train_lists(biased, 17), "v", 8), biased, questions).mean()
    assert ours > max(0.95, together + 0.05)


def test_training_less_than_faiss_does_loses_next_to_nothing(rng: np.random.Generator) -> None:
    ours, reference = [], []
    for _ in range(4):  # the difference of one catalogue alone has a standard deviation of 0.006
        vectors = clustered(rng, 20_000, 16)
        lists = train_lists(vectors, vectors.shape[1])
        theirs = faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, len(lists.centroids), faiss.METRIC_INNER_PRODUCT)
        theirs.cp.min_points_per_centroid = 1
        theirs.train(vectors.numpy())  # pyright: ignore[reportCallIssue]
        centroids = torch.from_numpy(theirs.quantizer.reconstruct_n(0, theirs.nlist))
        whole = IvfLists(centroids, (vectors @ centroids.T).argmax(dim=1).int())
        questions = vectors[torch.from_numpy(rng.integers(1, 20_000, 200))]
        for found, one in ((ours, lists), (reference, whole)):
            found.append(recall_of_each(IvfIndex(vectors, one, "v", 8), vectors, questions).mean())
    assert np.mean(ours) > np.mean(reference) - 0.02


# -- the gate -------------------------------------------------------------------------------------------------


def test_recall_is_what_is_counted_by_hand(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 500, 8)
    exact = TorchIndex(vectors)

    class Lossy:
        kind, version, recall = "lossy", "v", 1.0

        def search(self, vector: Any, k: int, exclude: Any = None) -> Any:
            rows, scores = exact.search(vector, k, exclude)
            return rows[7:], scores[7:]

    questions = vectors[1:20]
    np.testing.assert_allclose(recall_of_each(exact, vectors, questions), 1.0)
    np.testing.assert_allclose(recall_of_each(Lossy(), vectors, questions), 0.93)


def test_the_first_questions_are_the_same_however_many_are_drawn(tiny_run: Path) -> None:
    network = load_network(open_run(tiny_run))
    many = drawn_questions(network, 300, seed=3)
    assert torch.equal(many[:70], drawn_questions(network, 70, seed=3))
    assert not torch.equal(many[:70], drawn_questions(network, 70, seed=4))


def test_questions_are_user_vectors(tmp_path: Path) -> None:
    """Unit vectors over temperature with a trailing 1, near items: the best item is that of the question."""
    run = random_run(tmp_path / "run", 200, ["model.item_bias=learned"])
    network = load_network(open_run(run))
    questions = drawn_questions(network, 50)
    assert questions.shape == (50, network.config.dim + 1)
    torch.testing.assert_close(questions[:, :-1].norm(dim=1) * network.temperature, torch.ones(50))
    assert torch.equal(questions[:, -1], torch.ones(50))


@pytest.mark.parametrize("first_alone", [False, True])
def test_an_index_that_misses_too_much_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first_alone: bool
) -> None:
    """Also one that misses them only where a service asks again."""
    before = {path.name: path.read_bytes() for path in (run / "index").iterdir()}

    def poor(index: Any, vectors: Any, questions: Any) -> Any:
        shares = np.ones(len(questions))
        shares[: recall.NUM_PROBED] = 0.97
        return shares if first_alone else np.full(len(questions), 0.97)

    monkeypatch.setattr(ivf, "recall_of_each", poor)
    assert main(["index", str(run), "--kind", "ivf"]) == 2
    message = capsys.readouterr().err
    assert "expected recall@100 of at least 0.98 against exact search, got 0.97" in message
    assert len(message.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in (run / "index").iterdir()} == before
    assert not (run / "index.new").exists()


def test_items_without_nearness_are_refused_and_more_probes_mend_it(tmp_path: Path, capsys: Any) -> None:
    run = str(random_run(tmp_path / "run", 8_000))
    assert main(["index", run, "--kind", "ivf", "--probes", "2"]) == 2
    assert "with more --probes, or search exactly" in capsys.readouterr().err
    call_verb("index", [run, "--kind", "ivf", "--probes", "100000"])
    assert Recommender.load(run, index="ivf").index.recall == 1.0


# -- in a run -------------------------------------------------------------------------------------------------


def test_a_run_with_lists_is_loaded_without_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_training(monkeypatch)
    exact, approximate = Recommender.load(run), Recommender.load(run, index="ivf")
    assert "IVF" in approximate.index.kind
    assert approximate.index.version != exact.index.version
    assert approximate.index.version == Recommender.load(run, index="ivf").index.version
    record = json.loads((run / "index" / "ivf.json").read_text())
    assert 0.98 <= record["recall"] <= 1
    assert record["num_questions"] >= 1000
    assert 0.98 <= approximate.index.recall <= 1
    assert exact.index.recall == 1
    states = [rec.append(rec.new_state(), ["i1", "i7"], [1000, 2000]) for rec in (exact, approximate)]
    answers = [{item for item, _ in rec.recommend(of, 10)} for rec, of in zip((exact, approximate), states)]
    assert len(answers[0] & answers[1]) >= 8


def test_loading_would_notice_training(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    without_training(monkeypatch)
    with pytest.raises(AssertionError, match="was trained"):
        train_lists(clustered(rng, 500, 8), 8)


def test_another_number_of_probes_is_another_version(run: Path) -> None:
    versions = {Recommender.load(run, index="ivf").index.version}
    for probes in ("40", "41"):
        call_verb("index", [str(run), "--kind", "ivf", "--probes", probes])
        versions.add(Recommender.load(run, index="ivf").index.version)
    assert len(versions) == 3


@pytest.mark.parametrize("arguments", [["--probes", "8"], ["--kind", "ivf", "--probes", "0"], ["--kind", "hnsw"]])
def test_flags_that_mean_nothing_are_one_line(run: Path, arguments: list[str], capsys: Any) -> None:
    assert main(["index", str(run), *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("had", ["nothing", "exact"])
def test_a_run_without_lists_is_not_searched_by_lists(run: Path, had: str) -> None:
    """Neither silently exactly, nor by training them here; exactly it is loaded as before."""
    shutil.rmtree(run / "index")
    if had == "exact":
        call_verb("index", [str(run)])
    with pytest.raises(
        RunError, match=r"expected an approximate index, got no such file\. Run `ksa index .* --kind iv"
    ):
        Recommender.load(run, index="ivf")
    assert "exact" in Recommender.load(run).index.kind or "flat" in Recommender.load(run).index.kind


def test_lists_are_part_of_a_bundle(made: Path) -> None:
    manifest = check_bundle(made / "bundle")
    assert {"index/ivf.safetensors", "index/ivf.json"} <= manifest.files.keys()
    assert (made / "bundle" / BUNDLE_FILE).exists()
    index = Recommender.load(made / "bundle", index="ivf").index
    assert index.version == Recommender.load(made / "run", index="ivf").index.version


def test_lists_are_of_vectors_with_their_popularity(tiny_data: Path, tmp_path: Path) -> None:
    from recsys_ksa.testing import trained_run

    run = trained_run(tmp_path / "run", tiny_data, ["model.item_bias=popularity-7d"])
    call_verb("index", [str(run), "--kind", "ivf"])
    kept = {name: (run / "index" / name).read_bytes() for name in ("ivf.json", "ivf.safetensors")}
    rec = Recommender.load(run, index="ivf")
    assert rec.index.version.startswith(Recommender.load(run).index.version)
    last = int(rec.popularity.as_of) if rec.popularity else 0
    call_verb("index", [str(run), "--popularity-as-of", str(last - 30 * 86_400)])
    for name, content in kept.items():  # of the popularity before
        (run / "index" / name).write_bytes(content)
    with pytest.raises(RunError, match="expected lists of the vectors"):
        Recommender.load(run, index="ivf")


# -- what is refused ------------------------------------------------------------------------------------------


def rewritten(run: Path, change: Callable[[dict[str, torch.Tensor]], None], signed: bool = True) -> None:
    """Change the stored lists; `signed`: their record names the new file, as whoever writes both could have it."""
    import hashlib

    file = run / "index" / "ivf.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    if signed:
        record = json.loads((run / "index" / "ivf.json").read_text())
        record["lists_hash"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (run / "index" / "ivf.json").write_text(json.dumps(record))


def move_an_item(tensors: dict[str, torch.Tensor]) -> None:
    tensors["list_index"][3] = (tensors["list_index"][3] + 1) % len(tensors["centroids"])


def test_lists_that_their_record_does_not_name_are_refused(run: Path) -> None:
    rewritten(run, move_an_item, signed=False)
    with pytest.raises(RunError, match=r"ivf\.safetensors: expected SHA-256 .* as ivf\.json says, got"):
        Recommender.load(run, index="ivf")


def permute_centroids(tensors: dict[str, torch.Tensor]) -> None:
    tensors["centroids"] = tensors["centroids"].roll(1, dims=0).contiguous()


def scatter_items(tensors: dict[str, torch.Tensor]) -> None:
    tensors["list_index"] = tensors["list_index"].roll(1).contiguous()


def one_centroid(tensors: dict[str, torch.Tensor]) -> None:
    tensors["centroids"][:] = tensors["centroids"][0].clone()


@pytest.mark.parametrize("change", [permute_centroids, scatter_items, one_centroid])
def test_lists_that_are_wrong_but_signed_do_not_pass_the_gate(run: Path, change: Any) -> None:
    call_verb("index", [str(run), "--kind", "ivf", "--probes", "8"])  # the fewer, the sooner what is wrong shows
    Recommender.load(run, index="ivf")
    rewritten(run, change)
    with pytest.raises(RunError, match=r"expected recall@100 of at least 0\.98 against exact search, got 0\."):
        Recommender.load(run, index="ivf")


def other_lists(change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Any:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        centroids, list_index = change(tensors["centroids"], tensors["list_index"])
        tensors |= {"centroids": centroids.contiguous(), "list_index": list_index.contiguous()}

    return changed


def placed(list_index: torch.Tensor, value: int) -> torch.Tensor:
    list_index[5] = value
    return list_index


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, i: (c, placed(i, len(c))), r"expected lists 0 to \d+, got 0 to"),
        (lambda c, i: (c, placed(i, -1)), r"expected lists 0 to \d+, got -1 to"),
        (lambda c, i: (c, i[:-1]), r"expected centroids \[L, \d+\], list_index \[3001\]"),
        (lambda c, i: (c, i[:, None]), r"expected centroids \[L, \d+\], list_index \[3001\]"),
        (lambda c, i: (c[:, 1:], i), r"expected centroids \[L, \d+\], list_index \[3001\]"),
        (lambda c, i: (c[:0], i), r"expected centroids \[L, \d+\], list_index \[3001\]"),
        (lambda c, i: (c[:10], i), "and at most L probes"),
        (lambda c, i: (c.double(), i), "expected centroids of float32"),
        (lambda c, i: (c, i.long()), "list_index of int32"),
        (lambda c, i: (c * torch.nan, i), "expected finite centroids"),
    ],
)
def test_lists_that_faiss_would_read_out_of_bounds_with_are_refused(run: Path, change: Any, message: str) -> None:
    rewritten(run, other_lists(change))
    with pytest.raises(RunError, match=message) as refused:
        Recommender.load(run, index="ivf")
    assert "--kind ivf" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        drop("ivf.safetensors"),
        drop("ivf.json"),
        write("ivf.json", b"{"),
        write("ivf.json", b"[]"),
        write("ivf.json", b"\xff"),
        write("ivf.json", b'{"probes": 1e99}'),
        write("ivf.safetensors", b""),
        write("ivf.safetensors", b"\xff" * 64),
        lambda folder: save_file({"centroids": torch.zeros(1, 2)}, folder / "ivf.safetensors"),
        lambda folder: shutil.copy(folder / "item_vectors.safetensors", folder / "ivf.safetensors"),
    ],
)
def test_damaged_files_are_refused_in_one_line(run: Path, harm: Callable[[Path], object]) -> None:
    harm(run / "index")
    with pytest.raises(RunError, match="--kind ivf") as refused:
        Recommender.load(run, index="ivf")
    assert len(str(refused.value).splitlines()) == 1
    Recommender.load(run)  # exact search does not read them


def test_probes_out_of_range_are_refused(run: Path) -> None:
    record = json.loads((run / "index" / "ivf.json").read_text())
    for probes in (0, -1, 10**6, 2**40, "all", None):
        (run / "index" / "ivf.json").write_text(json.dumps(record | {"probes": probes}))
        with pytest.raises(RunError):
            Recommender.load(run, index="ivf")


def test_lists_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    other = random_run(tmp_path / "other", NUM_ITEMS, ["seed=5"])
    call_verb("index", [str(other)])
    for name in ("ivf.json", "ivf.safetensors"):
        shutil.copy(run / "index" / name, other / "index" / name)
    with pytest.raises(RunError, match="expected lists of the vectors"):
        Recommender.load(other, index="ivf")


def test_write_ivf_writes_nothing_beside_its_two_files(made: Path, tmp_path: Path) -> None:
    network = load_network(open_run(made / "run"))
    vectors = network.item_vectors().detach()
    (tmp_path / "index").mkdir()
    record = write_ivf(tmp_path / "index", network, StoredVectors(vectors, "v"), probes=10**6)
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"ivf.safetensors", "ivf.json"}
    assert record.recall == 1.0
    lists = load_file(tmp_path / "index" / "ivf.safetensors")
    assert record.probes == len(lists["centroids"])
