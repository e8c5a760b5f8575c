"""Whether the layout of the current release still fits what is asked: for `strata status`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import IndexManifest, Segment, arrow_schema
from pipeline.config import Config
from pipeline.filters import Region
from pipeline.index.reader import open_release
from pipeline.index.tombstones import live_rows
from pipeline.partitioning import (
    PAYS,
    SAMPLE_ROWS,
    Workload,
    grow_tree,
    limits_for,
    reach_of,
    read_fitted,
    read_regions,
    read_workload,
    regions_of_paths,
    unseen_share,
)
from pipeline.storage import Store, open_store
from pipeline.tables import read_columns

__all__ = ["layout_drift"]


def layout_drift(config: Config, workload: str) -> dict[str, Any]:
    """Hold a workload against the partitions of the current release and against those that it would be given.

    Args:
        config: Names the root and the limits of a layout.
        workload: Parquet of past queries.

    Returns:
        Figures for the summary: share of unseen filters, rows and partitions that a query looks into now and after a
        fit to this workload, and whether that pays.
    """
    store = open_store(config.root, config.storage)
    manifest = open_release(config.root, storage=config.storage).reader.manifest
    asked = read_workload(workload, config.storage, arrow_schema(manifest.attributes))
    rows = sum(one.rows for one in manifest.partitions)
    limits = limits_for(asked, config.layout, rows=rows, storage=config.serving.storage)
    sample = _sample(store, manifest, rows)
    tree = grow_tree(sample, asked, limits)
    sizes = np.bincount(tree.assign(sample), minlength=tree.num_partitions) * (rows / max(sample.num_rows, 1))
    counts = [one.rows for one in manifest.partitions]
    now = reach_of(_regions(store, manifest), counts, asked)
    then = reach_of(tree.regions, sizes.tolist(), asked)
    # Of partitions that are not built yet no more is known than their paths.
    by_paths = reach_of(_paths(manifest), counts, asked)
    costs = by_paths.cost(limits.open_rows), then.cost(limits.open_rows)
    return {
        "filters": len(asked.filters),
        "unfiltered": round(asked.unfiltered, 4),
        "unreadable": round(asked.unreadable, 4),
        "unseen_filters": round(_unseen(store, manifest, asked), 4),
        "rows": rows,
        "rows_touched": round(now.rows),
        "partitions_touched": round(now.partitions, 2),
        "rows_touched_refitted": round(then.rows),
        "partitions_touched_refitted": round(then.partitions, 2),
        "refitting_pays": bool(costs[1] < PAYS * costs[0]),
    }


def _regions(store: Store, manifest: IndexManifest) -> list[Region]:
    if manifest.partition_table is None:
        return [Region() for _ in manifest.partitions]
    attributes = arrow_schema(manifest.attributes)
    return read_regions(store, manifest.partition_table, manifest.cuts, attributes)


def _paths(manifest: IndexManifest) -> list[Region]:
    """What the paths of the partitions alone say."""
    bits = [one.bits for one in manifest.partitions]
    return regions_of_paths(bits, manifest.cuts, arrow_schema(manifest.attributes))


def _unseen(store: Store, manifest: IndexManifest, asked: Workload) -> float:
    fitted = read_fitted(store, manifest.workload) if manifest.workload is not None else {}
    return unseen_share(fitted, asked)


def _sample(store: Store, manifest: IndexManifest, rows: int) -> pa.Table:
    """Attributes of rows at even distances."""
    step = max(1, -(-rows // SAMPLE_ROWS))
    names = [one.name for one in manifest.attributes]
    segments = [segment for partition in manifest.partitions for segment in partition.segments]
    return pa.concat_tables([_sampled(store, segment, names, step) for segment in segments])


def _sampled(store: Store, segment: Segment, names: Sequence[str], step: int) -> pa.Table:
    rows = np.flatnonzero(live_rows(store, segment))
    return read_columns(store, segment.vectors.path, names).take(pa.array(rows[::step]))
