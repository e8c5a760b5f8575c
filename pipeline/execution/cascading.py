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
from pipeline.index.vectors import cached_vectors, unknown_texts
from pipeline.storage import Store
from pipeline.tables import hash_keys, vector_array

__all__ = ["Cascaded", "admitted", "cascade"]

KEPT_TOGETHER = 5000
"""Texts after which what is embedded is kept: a search that dies loses no more. Fewer would be more and smaller files."""
READ_TOGETHER = 50_000
"""Documents that are looked up together: bounds the memory of their hashes."""
ROUNDED = 9
"""Digits of a sum of weights."""
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
    # Weights may be fractions, whose sum depends on their order in its last bits.
    return sorted(name for name, count in wanted.items() if round(count, ROUNDED) >= admit)


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
        known = texts.known(sorted(first))
        across |= first - known.rows.keys()
        asked = zip(queries[some], found[some], strict=True)
        ranked += [_ranked(query, hits, known, depth) for query, hits in asked]
    return Cascaded(ranked, embedded, len(across))


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


class _Known(NamedTuple):
    """Vectors of documents that have one and no text that is still to be embedded."""

    rows: Mapping[str, list[int]]
    """By document."""
    vectors: NDArray[np.float32]
    """(t, d)"""

    def score(self, query: NDArray[np.float32], hit: Hit) -> Hit:
        rows = self.rows.get(hit.doc_id)
        return hit if rows is None else hit._replace(score=float((self.vectors[rows] @ query).max()))


def _ranked(query: NDArray[np.float32], hits: list[Hit], known: _Known, depth: int) -> list[Hit]:
    scored = [known.score(query, hit) for hit in hits[:depth]]
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
        rows = documents_by_id(self._store, self._documents, names, ["doc_id", "text_hash"])
        hashes, first = np.unique(hash_keys(rows["text_hash"]), return_index=True)
        missing = unknown_texts(self._store, self._cache, hashes)
        owners = rows["doc_id"].take(pa.array(first[missing])).to_pylist()
        return sum(
            self._embed(hashes[missing[some]], owners[some]) for some in _spans(len(missing), KEPT_TOGETHER)
        )

    def known(self, names: Sequence[str]) -> _Known:
        """What the cache has of documents."""
        rows = documents_by_id(self._store, self._documents, names, ["doc_id", "text_hash"])
        hashes, text_of = np.unique(hash_keys(rows["text_hash"]), return_inverse=True)
        cached = cached_vectors(self._store, self._cache, hashes)
        texts: dict[str, list[int]] = defaultdict(list)
        for name, text in zip(rows["doc_id"].to_pylist(), text_of.tolist(), strict=True):
            texts[name].append(text)
        is_settled = cached.is_there | cached.is_condemned
        settled = {
            name: [text for text in own if cached.is_there[text]]
            for name, own in texts.items()
            if is_settled[own].all()
        }
        return _Known({name: own for name, own in settled.items() if own}, cached.vectors)

    def _read(self, hashes: NDArray[np.bytes_], owners: list[str]) -> list[str]:
        """The texts of these hashes, which are among those of these documents."""
        rows = documents_by_id(self._store, self._documents, sorted({*owners}), ["text", "text_hash"])
        found, first = np.unique(hash_keys(rows["text_hash"]), return_index=True)
        texts: list[str] = rows["text"].take(pa.array(first[np.searchsorted(found, hashes)])).to_pylist()
        return texts

    def _embed(self, hashes: NDArray[np.bytes_], owners: list[str]) -> int:
        """Add the vectors of texts of documents by rising hash to the cache, and which have none; how many have one."""
        texts = self._read(hashes, owners)
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
