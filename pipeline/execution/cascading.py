"""Cascades: what a search finds across a bridge is embedded by the new encoder and ranked in its space.

What is embedded stays in that encoder's cache: no document is embedded twice for queries, and a backfill finds it there.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import IndexManifest
from pipeline.corpus import documents_by_id
from pipeline.corpus.identity import bucket_of, hash_array
from pipeline.embedding.bisecting import encode_around
from pipeline.embedding.cache import Cache, add_condemned, add_vectors, open_cache, read_redrives
from pipeline.embedding.encoder import TextEncoder
from pipeline.index.reader import Hit
from pipeline.index.vectors import cached_vectors
from pipeline.storage import Store
from pipeline.tables import hash_keys, vector_array

__all__ = ["Cascaded", "cascade"]

KEPT_TOGETHER = 5000
"""Texts after which what is embedded is kept: a search that dies loses no more. Fewer would be more and smaller files."""
QUERY_BLOCK = 1000
"""Queries whose documents are read together: bounds the memory of their texts and vectors."""


class Cascaded(NamedTuple):
    """Hits ranked in the new space."""

    hits: list[list[Hit]]
    embedded: int
    """Texts that were not in the cache."""


def cascade(
    store: Store,
    manifest: IndexManifest,
    encoder: TextEncoder,
    queries: NDArray[np.float32],
    found: Sequence[list[Hit]],
    *,
    depth: int,
    admit: int = 1,
) -> Cascaded:
    """Rank the first documents of each query by vectors of the new encoder; the others follow as they were found.

    A document none of whose texts can be embedded keeps its score, and so does one that too few queries find, unless the cache
    has all its texts: what is found once is seldom asked for again.

    Source: caching on the second hit, Maggs and Sitaraman, "Algorithmic nuggets in content delivery", 2015, section 4.

    Args:
        store: The root.
        manifest: The index that was searched.
        encoder: Of its queries.
        queries: (q, d) unit vectors.
        found: Of each query, hits with calibrated scores.
        depth: First hits of each that are ranked anew.
        admit: Of these queries, how many find a document among their first ones before it is embedded.
    """
    wanted = Counter(hit.doc_id for hits in found for hit in hits[:depth])
    admitted = frozenset(name for name, count in wanted.items() if count >= admit)
    texts = _Texts(store, manifest, encoder)
    parts = []
    for start in range(0, len(queries), QUERY_BLOCK):
        some = slice(start, start + QUERY_BLOCK)
        parts.append(_ranked_anew(texts, queries[some], found[some], depth, admitted))
    return Cascaded([hits for part in parts for hits in part.hits], sum(part.embedded for part in parts))


def _ranked_anew(
    texts: "_Texts",
    queries: NDArray[np.float32],
    found: Sequence[list[Hit]],
    depth: int,
    admitted: frozenset[str],
) -> Cascaded:
    """The same for one block of queries."""
    names = sorted({hit.doc_id for hits in found for hit in hits[:depth]})
    rows, vectors, embedded = texts.of_documents(names, admitted)
    of_document: dict[str, list[int]] = {}
    for row, name in enumerate(rows):
        if vectors[row].any():
            of_document.setdefault(name, []).append(row)

    def ranked(query: NDArray[np.float32], hits: list[Hit]) -> list[Hit]:
        scored = [
            hit._replace(score=float((vectors[of_document[hit.doc_id]] @ query).max()))
            if hit.doc_id in of_document
            else hit
            for hit in hits[:depth]
        ]
        return [*sorted(scored, key=lambda hit: -hit.score), *hits[depth:]]

    return Cascaded([ranked(query, hits) for query, hits in zip(queries, found, strict=True)], embedded)


class _Texts:
    """Texts of documents as vectors of an encoder, from its cache or made now.

    Args:
        store: The root.
        manifest: Whose documents these are.
        encoder: Makes the vectors.
    """

    def __init__(self, store: Store, manifest: IndexManifest, encoder: TextEncoder) -> None:
        self._store, self._encoder, self._documents = store, encoder, manifest.documents
        identity = encoder.identity
        self._cache: Cache = open_cache(
            store,
            identity.fingerprint,
            dims=identity.dims,
            rows=sum(one.rows for one in manifest.partitions),
            redrives=read_redrives(store, identity.fingerprint),
        )

    def of_documents(
        self, names: list[str], admitted: frozenset[str]
    ) -> tuple[list[str], NDArray[np.float32], int]:
        """The document of each row, (n, d) vectors, how many texts were embedded now.

        Vectors are zeros where a text cannot be embedded, and of every document that is not admitted and has a text to embed.
        """
        rows = documents_by_id(self._store, self._documents, names, ["doc_id", "text", "text_hash"])
        hashes, first, text_of = np.unique(
            hash_keys(rows["text_hash"]), return_index=True, return_inverse=True
        )
        owners = rows["doc_id"].to_pylist()
        is_there, is_condemned, vectors = cached_vectors(self._store, self._cache, hashes)
        is_admitted = np.zeros(len(hashes), np.bool_)
        is_admitted[text_of[[name in admitted for name in owners]]] = True
        is_open = ~is_there & ~is_condemned
        missing = np.flatnonzero(is_open & is_admitted)
        for start in range(0, len(missing), KEPT_TOGETHER):
            some = missing[start : start + KEPT_TOGETHER]
            texts = rows["text"].take(pa.array(first[some])).to_pylist()
            vectors[some] = self._embedded(hashes[some], texts)
        embedded = int(vectors[missing].any(axis=1).sum())
        left = np.flatnonzero((is_open & ~is_admitted)[text_of])
        unfinished = {owners[row] for row in left}
        of_rows = vectors[text_of]
        of_rows[[name in unfinished for name in owners]] = 0
        return owners, of_rows, embedded

    def _buckets(self, hashes: NDArray[np.bytes_]) -> NDArray[np.int32]:
        return bucket_of(hashes.view(np.uint8).reshape(-1, 16), self._cache.buckets)

    def _embedded(self, hashes: NDArray[np.bytes_], texts: list[str]) -> NDArray[np.float32]:
        """(n, d) vectors of texts by rising hash, which are added to the cache; zeros of those that cannot be embedded."""
        vectors, failed = encode_around(self._encoder.encode_documents, texts, dims=self._cache.dims)
        is_bad = np.zeros(len(texts), np.bool_)
        is_bad[[one.row for one in failed]] = True
        reasons = {one.row: one for one in failed}
        buckets = self._buckets(hashes)
        for bucket in np.unique(buckets).tolist():
            here = np.flatnonzero(buckets == bucket)
            good = here[~is_bad[here]]
            if len(good):
                column = hash_array(hashes[good].view(np.uint8).reshape(-1, 16))
                table = pa.table({"text_hash": column, "embedding": vector_array(vectors[good])})
                add_vectors(self._store, self._cache, bucket, table)
            bad = here[is_bad[here]]
            if len(bad):
                column = pa.chunked_array([hash_array(hashes[bad].view(np.uint8).reshape(-1, 16))])
                found = [reasons[row]._replace(row=at) for at, row in enumerate(bad.tolist())]
                add_condemned(self._store, self._cache, bucket, column, found)
        return vectors
