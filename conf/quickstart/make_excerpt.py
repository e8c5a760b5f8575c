"""Cut the quickstart's corpus from a table of WordNet 3.0's synsets: how the files beside this one were made.

Takes the 10,000 synsets whose ids have the smallest hashes, and 700 usage examples of theirs as queries. 500 of them are
judged and reported on; the others choose the how far a search looks.

    python conf/quickstart/make_excerpt.py WORDNET.parquet
"""

import hashlib
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_DOCUMENTS = 10_000
NUM_QUERIES = 700
NUM_JUDGED = 500


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def main(source: str) -> None:
    """Write corpus.parquet, queries.parquet and qrels.tsv."""
    folder = Path(__file__).parent
    synsets = sorted(pq.read_table(source).to_pylist(), key=lambda row: _hash(row["id"]))[:NUM_DOCUMENTS]
    documents = [
        {
            "_id": s["id"],
            "lemmas": ", ".join(s["lemmas"]),
            "gloss": s["gloss"],
            "pos": s["pos"],
            "lexfile": s["lexfile"],
        }
        for s in synsets
    ]
    pq.write_table(
        pa.Table.from_pylist(documents), folder / "corpus.parquet", compression="zstd", compression_level=19
    )
    examples = sorted(
        ((s["examples"][0], s["id"]) for s in synsets if s["examples"]), key=lambda pair: _hash(pair[0])
    )
    chosen = [(f"q{i:03d}", text, doc) for i, (text, doc) in enumerate(examples[:NUM_QUERIES])]
    queries = [{"query_id": query, "text": text} for query, text, _ in chosen]
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet", compression="zstd")
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{doc}\t1" for query, _, doc in chosen[:NUM_JUDGED])]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
