"""Approximate search for large catalogues: FAISS IVF over the same item vectors, built at load, behind a recall gate.

Items are put into about 4 * sqrt(I) lists by nearness; a search looks into the `probes` nearest ones. Nothing is read
from a FAISS file. Parameters go with each call, for the index is shared between threads and never changes.
"""

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.errors import MissingPackageError
from recsys_ksa.retrieval.index import Found
from recsys_ksa.schema import UNKNOWN_ITEM

PROBES = 32
SEED = 20
"""Of the clustering, so that the same vectors give the same index."""


class IvfIndex:
    """`recsys_ksa.retrieval.index.Index` by FAISS `IndexIVFFlat`, inner product.

    Args:
        vectors: float32 [I, E]; row 0 (unknown) is never returned.
        version: of these vectors; the way they are searched is added to it.
        probes: lists looked into.

    Raises:
        MissingPackageError: faiss is not installed.
    """

    def __init__(self, vectors: NDArray[np.float32], version: str, probes: int = PROBES):
        try:
            import faiss
        except ImportError as error:
            raise MissingPackageError(f"--index ivf: expected the package faiss-cpu, got: {error}.") from error
        self._faiss = faiss
        lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))  # FAISS wants 39 rows a list to train
        quantizer = faiss.IndexFlatIP(vectors.shape[1])
        self._index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.seed = SEED
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
        self._index.train(rows)  # pyright: ignore[reportCallIssue]
        self._index.add(rows)  # pyright: ignore[reportCallIssue]
        self._probes = min(probes, lists)
        self.kind = f"FAISS IVF, {self._probes} of {lists} lists"
        self.version = f"{version}-ivf{lists}-{self._probes}"

    def search(self, vector: NDArray[np.float32], k: int, exclude: NDArray[np.integer] | None = None) -> Found:
        """Return about the k items of largest inner product with `vector` [E], none of `exclude` among them."""
        faiss = self._faiss
        shown = np.ones(self._index.ntotal, dtype=bool)
        shown[UNKNOWN_ITEM] = False
        if exclude is not None:
            shown[exclude] = False
        # A bit an item: a set of the 79,000 items of a long history took longer to make than the search.
        bits = np.packbits(shown, bitorder="little")
        chosen = faiss.SearchParametersIVF(  # pyright: ignore[reportCallIssue]
            sel=faiss.IDSelectorBitmap(bits),  # pyright: ignore[reportCallIssue]
            nprobe=self._probes,  # pyright: ignore[reportCallIssue]
        )
        scores, rows = self._index.search(  # pyright: ignore[reportCallIssue]
            np.ascontiguousarray(vector, dtype=np.float32)[None], min(k, self._index.ntotal), params=chosen
        )
        kept = rows[0] >= 0
        return rows[0][kept], scores[0][kept]
