"""Cascades: what a search finds across a bridge is embedded by the new encoder and ranked in its space.

What is embedded stays in that encoder's cache: no document is embedded twice for queries, and a backfill finds it there.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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

__all__ = ["Cascaded", "admitted", "cascade"]

KEPT_TOGETHER = 5000
"""Texts after which what is embedded is kept: a search that dies loses no more. Fewer would be more and smaller files."""
READ_TOGETHER = 50_000
"""Documents whose texts are read together: bounds their memory."""
QUERY_BLOCK = 1000
"""Queries whose documents are read together: bounds the memory of their vectors."""


class Cascaded(NamedTuple):
    """Hits ranked in the new space."""

    hits: list[list[Hit]]
    embedded: int
    """Texts that were not in the cache."""
    across: int
    """Documents among the first ones that keep their scores from across the bridge."""


def admitted(
    found: Sequence[list[Hit]], *, depth: int, admit: int, weights: Sequence[float] = ()
) -> list[str]:
    """Documents that enough queries find: what is found once is seldom asked for again.

    Source: caching on the second hit, Maggs and Sitaraman, "Algorithmic nuggets in content delivery", 2015, section 4.

    Args:
        found: (q,) hits of each query.
        depth: First hits of each that count.
        admit: Queries that must find a document; 0: whatever they find.
        weights: (q,) as how many each counts; none: as one.

    Returns:
        Their ids, in order.
    """
    wanted: dict[str, float] = defaultdict(float)
    for hits, weight in zip(found, weights or [1.0] * len(found), strict=True):
        for hit in hits[:depth]:
            wanted[hit.doc_id] += weight
    return sorted(name for name, count in wanted.items() if count >= admit)


def cascade(
    store: Store,
    manifest: IndexManifest,
    encoder: TextEncoder,
    queries: NDArray[np.float32],
    found: Sequence[list[Hit]],
    *,
    depth: int,
    embed: Sequence[str],
) -> Cascaded:
    """Rank the first documents of each query by vectors of the new encoder; the others follow as they were found.

    A document none of whose texts can be embedded keeps its score, and so does one that is not to be embedded, unless the cache
    has all its texts that can be. First all is embedded, then all ranked: the order of the queries does not matter.

    Args:
        store: The root.
        manifest: The index that was searched.
        encoder: Of its queries.
        queries: (q, d) unit vectors.
        found: Of each query, hits with calibrated scores.
        depth: First hits of each that are ranked anew.
        embed: Documents whose texts are embedded where the cache knows nothing of them.
    """
    texts = _Texts(store, manifest, encoder)
    embedded = sum(texts.embed(embed[some]) for some in _spans(len(embed), READ_TOGETHER))
    ranked: list[list[Hit]] = []
    across: set[str] = set()
    for some in _spans(len(queries), QUERY_BLOCK):
        first = {hit.doc_id for hits in found[some] for hit in hits[:depth]}
        known = texts.vectors_of(sorted(first))
        across |= first - known.keys()
        asked = zip(queries[some], found[some], strict=True)
        ranked += [_ranked(query, hits, known, depth) for query, hits in asked]
    return Cascaded(ranked, embedded, len(across))


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _ranked(
    query: NDArray[np.float32], hits: list[Hit], known: Mapping[str, NDArray[np.float32]], depth: int
) -> list[Hit]:
    scored = [
        hit._replace(score=float((known[hit.doc_id] @ query).max())) if hit.doc_id in known else hit
        for hit in hits[:depth]
    ]
    return [*sorted(scored, key=lambda hit: -hit.score), *hits[depth:]]


class _Texts:
    """Texts of documents as vectors of an encoder, in its cache.

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

    def embed(self, names: Sequence[str]) -> int:
        """Make vectors of the texts of documents that the cache knows nothing of; how many could be made."""
        rows = documents_by_id(self._store, self._documents, names, ["text", "text_hash"])
        hashes, first = np.unique(hash_keys(rows["text_hash"]), return_index=True)
        cached = cached_vectors(self._store, self._cache, hashes)
        missing = np.flatnonzero(~cached.is_there & ~cached.is_condemned)
        return sum(
            self._embed(hashes[missing[some]], rows["text"].take(pa.array(first[missing[some]])).to_pylist())
            for some in _spans(len(missing), KEPT_TOGETHER)
        )

    def vectors_of(self, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """(c, d) vectors by document, of those that have one and no text that is still to be embedded."""
        rows = documents_by_id(self._store, self._documents, names, ["doc_id", "text_hash"])
        hashes, text_of = np.unique(hash_keys(rows["text_hash"]), return_inverse=True)
        cached = cached_vectors(self._store, self._cache, hashes)
        texts: dict[str, list[int]] = defaultdict(list)
        for name, text in zip(rows["doc_id"].to_pylist(), text_of.tolist(), strict=True):
            texts[name].append(text)
        is_settled = cached.is_there | cached.is_condemned
        settled = {name: np.array(own) for name, own in texts.items() if is_settled[own].all()}
        vectors = {name: cached.vectors[own[cached.is_there[own]]] for name, own in settled.items()}
        return {name: own for name, own in vectors.items() if len(own)}

    def _embed(self, hashes: NDArray[np.bytes_], texts: list[str]) -> int:
        """Add the vectors of texts by rising hash to the cache, and which have none; how many have one."""
        vectors, failed = encode_around(self._encoder.encode_documents, texts, dims=self._cache.dims)
        is_bad = np.zeros(len(texts), np.bool_)
        is_bad[[one.row for one in failed]] = True
        reasons = {one.row: one for one in failed}
        buckets = bucket_of(hashes.view(np.uint8).reshape(-1, 16), self._cache.buckets)
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
        return len(texts) - len(failed)
