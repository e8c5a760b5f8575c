import pyarrow as pa
import pytest

from pipeline.artifacts import FileRef, IndexManifest, Partition
from pipeline.errors import MissingFileError
from pipeline.release import read_release, verify
from pipeline.schemas import made_by
from pipeline.tables import read_columns, write_table
from tests.unit.release.conftest import DIMS, Root, write_binarizer, write_manifest


def test_a_whole_release_has_no_problems(root: Root) -> None:
    root.publish(1)
    report = verify(root.store)
    assert report.problems == ()
    assert report.files == 7
    manifest, ref = root.index(1)
    assert report.bytes > ref.bytes + manifest.partitions[0].heads.bytes


def test_nothing_published_is_an_error(root: Root) -> None:
    with pytest.raises(MissingFileError, match="no release is published"):
        verify(root.store)


def test_another_release_can_be_verified(root: Root) -> None:
    root.publish(1)
    root.publish(2)
    root.store.delete(root.index(1)[0].partitions[0].heads.path)
    assert verify(root.store).problems == ()
    assert len(verify(root.store, read_release(root.store, 1)).problems) == 1


@pytest.mark.parametrize("part", ["documents", "heads", "directory", "lists", "vectors", "weights"])
@pytest.mark.parametrize(
    ("damage", "word"), [("flip", "sha256"), ("truncate", "bytes, found"), ("delete", "missing")]
)
def test_one_damaged_file_is_one_problem(local_root: Root, part: str, damage: str, word: str) -> None:
    local_root.publish(1)
    path = _part(local_root.index(1)[0], part).path
    data = local_root.store.read(path)
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    local_root.store.write(path, {"flip": flipped, "truncate": data[:-1], "delete": data}[damage])
    {"delete": local_root.store.delete}.get(damage, lambda _: None)(path)
    (problem,) = verify(local_root.store).problems
    assert path in problem
    assert word in problem


def _part(manifest: IndexManifest, name: str) -> FileRef:
    partition = manifest.partitions[0]
    segment = partition.segments[0]
    return {
        "documents": manifest.documents[0],
        "heads": partition.heads,
        "directory": partition.directory,
        "lists": segment.lists,
        "vectors": segment.vectors,
        "weights": partition.codes.files[0],
    }[name]


def test_a_damaged_manifest_is_a_problem(root: Root) -> None:
    record = root.publish(1)
    root.store.write(record.manifest.path, b"{}")
    (problem,) = verify(root.store).problems
    assert "manifest.json" in problem


def test_recorded_rows_are_held_against_the_footer(local_root: Root) -> None:
    _publish_with(
        local_root, lambda p: p.model_copy(update={"heads": p.heads.model_copy(update={"rows": 99})})
    )
    (problem,) = verify(local_root.store).problems
    assert "expected 99 rows, found 4" in problem


def test_rows_of_a_partition_are_counted(local_root: Root) -> None:
    _publish_with(local_root, lambda p: p.model_copy(update={"rows": 13}))
    assert verify(local_root.store).problems == ("partition 0: expected 13 rows, found 12",)


def test_a_list_must_have_its_own_vectors_and_none_twice(local_root: Root) -> None:
    _publish_with(local_root, lambda p: _with_rows(local_root, p, [0, 0, *range(2, 12)]))
    twice, missing = verify(local_root.store).problems
    assert "1 entries are in a list twice" in twice
    assert "1 vectors are not in their own list" in missing


@pytest.mark.parametrize(("column", "values"), [("num_primaries", [3, 4, 4]), ("first_row", [0, 2, 8])])
def test_every_vector_must_belong_to_one_list(local_root: Root, column: str, values: list[int]) -> None:
    _publish_with(local_root, lambda p: _with_directory(local_root, p, column, values))
    problems = verify(local_root.store).problems
    assert any("do not have each of the 12 vectors once as their own" in problem for problem in problems)


def test_entries_must_stay_within_the_vectors(local_root: Root) -> None:
    _publish_with(local_root, lambda p: _with_rows(local_root, p, [*range(11), 12]))
    (problem,) = verify(local_root.store).problems
    assert "entries point beyond the 12 vectors" in problem


def test_a_list_number_beyond_the_heads_is_a_problem(local_root: Root) -> None:
    _publish_with(local_root, lambda p: _with_directory(local_root, p, "list_no", [0, 1, 4]))
    (problem,) = verify(local_root.store).problems
    assert "names lists beyond the 4 heads" in problem


@pytest.mark.parametrize(
    ("column", "values"), [("num_entries", [3, 5, 3]), ("first_entry", [0, 2, 8]), ("list_no", [0, 0, 3])]
)
def test_lists_must_cover_the_entries_once(local_root: Root, column: str, values: list[int]) -> None:
    _publish_with(local_root, lambda p: _with_directory(local_root, p, column, values))
    (problem,) = verify(local_root.store).problems
    assert "do not cover the 12 entries of segment 0 once" in problem


@pytest.mark.parametrize(
    ("column", "value", "name"), [("row_at", "lists", "row"), ("embeddings_at", "vectors", "embedding")]
)
def test_values_must_start_where_the_directory_says(
    local_root: Root, column: str, value: str, name: str
) -> None:
    (partition,) = local_root.index(1)[0].partitions
    places = read_columns(local_root.store, partition.directory.path)[column].to_pylist()
    wrong = [places[0], places[1] + 2, places[2]]
    _publish_with(local_root, lambda p: _with_directory(local_root, p, column, wrong))
    (problem,) = verify(local_root.store).problems
    assert f".{value}.parquet: its {name}s do not start where the directory says" in problem


def test_a_segment_number_beyond_the_segments_is_a_problem(local_root: Root) -> None:
    _publish_with(local_root, lambda p: _with_directory(local_root, p, "segment", [0, 0, 1]))
    assert any("names segments beyond the 1" in problem for problem in verify(local_root.store).problems)


@pytest.mark.parametrize("part", ["heads", "lists", "vectors"])
def test_a_file_in_another_space_is_a_problem_that_names_both(local_root: Root, part: str) -> None:
    _publish_with(local_root, lambda p: _with_file(p, part, _made_by_others(local_root, p, part, "other")))
    (problem,) = verify(local_root.store).problems
    assert "expected vectors of space enc, found vectors of space other" in problem


def test_codes_of_another_binarizer_are_a_problem_that_names_both(local_root: Root) -> None:
    theirs = write_binarizer(local_root.store, seed=2).binarizer
    _publish_with(
        local_root,
        lambda p: _with_file(p, "lists", _made_by_others(local_root, p, "lists", "enc", theirs)),
    )
    (problem,) = verify(local_root.store).problems
    mine = local_root.index(1)[0].partitions[0].codes.binarizer
    assert f"expected codes of {mine}, found codes of {theirs}" in problem


def test_a_file_that_does_not_say_what_made_it_is_no_problem(local_root: Root) -> None:
    _publish_with(local_root, lambda p: _with_file(p, "lists", _replaced(local_root, _file(p, "lists"))))
    assert verify(local_root.store).problems == ()


def test_weights_of_another_binarizer_are_a_problem(local_root: Root) -> None:
    mine, theirs = local_root.index(1)[0].partitions[0].codes, write_binarizer(local_root.store, seed=2)
    name = "weights.safetensors"
    local_root.store.write(f"{mine.binarizer}/{name}", local_root.store.read(f"{theirs.binarizer}/{name}"))
    _publish_with(local_root, lambda p: p.model_copy(update={"codes": mine.model_copy(update={"files": ()})}))
    (problem,) = verify(local_root.store).problems
    assert f"expected the binarizer's file of sha256 {mine.files[0].sha256}, found" in problem
    assert theirs.files[0].sha256 in problem


@pytest.mark.parametrize(
    ("dims", "problem"),
    [(4 * DIMS, "expected a binarizer of vectors of 8 dimensions, found one of 32"), (16, "one of 16")],
)
def test_a_binarizer_of_other_vectors_is_a_problem(local_root: Root, dims: int, problem: str) -> None:
    theirs = write_binarizer(local_root.store, seed=2, dims=dims)
    lists = lambda p: _made_by_others(local_root, p, "lists", "enc", theirs.binarizer)  # noqa: E731
    _publish_with(local_root, lambda p: _with_file(p.model_copy(update={"codes": theirs}), "lists", lists(p)))
    assert problem in verify(local_root.store).problems[0]


def test_levels_of_the_manifest_are_held_against_the_binarizer(local_root: Root) -> None:
    _publish_with(
        local_root,
        lambda p: p.model_copy(update={"codes": p.codes.model_copy(update={"levels": (16, 16)})}),
    )
    (problem,) = verify(local_root.store).problems
    assert "expected codes of levels (16, 16), found (8, 8, 8, 8)" in problem


def test_a_gap_in_the_alias_is_a_problem(local_root: Root) -> None:
    record = local_root.publish(1)
    local_root.publish(2)
    local_root.store.delete("releases/2.json")
    assert "alias entry 2 names release 2, which does not exist" in verify(local_root.store, record).problems


def _publish_with(root: Root, change) -> None:
    manifest, _ = root.index(1)
    manifest = manifest.model_copy(
        update={"index": "changed", "partitions": (change(manifest.partitions[0]),)}
    )
    root.indexes[9] = manifest, write_manifest(root.store, manifest)
    root.publish(9)


def _replaced(root: Root, ref: FileRef, made: dict[bytes, bytes] | None = None, **columns) -> FileRef:
    """The file again, made by somebody else or with other numbers in a column."""
    table = read_columns(root.store, ref.path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        array = pa.array(values, table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), array)
    return write_table(root.store, "partitions", table.schema.with_metadata(made), [table])


def _made_by_others(root: Root, partition: Partition, part: str, *others: str) -> FileRef:
    return _replaced(root, _file(partition, part), made_by(*others))


def _file(partition: Partition, part: str) -> FileRef:
    return getattr(partition if part == "heads" else partition.segments[0], part)


def _with_file(partition: Partition, part: str, ref: FileRef) -> Partition:
    if part == "heads":
        return partition.model_copy(update={"heads": ref})
    segment = partition.segments[0].model_copy(update={part: ref})
    return partition.model_copy(update={"segments": (segment,)})


def _with_rows(root: Root, partition: Partition, rows: list[int]) -> Partition:
    return _with_file(partition, "lists", _replaced(root, _file(partition, "lists"), row=rows))


def _with_directory(root: Root, partition: Partition, column: str, values: list[int]) -> Partition:
    directory = _replaced(root, partition.directory, **{column: values})
    return partition.model_copy(update={"directory": directory})
