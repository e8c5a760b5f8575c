"""Whether the files of a corpus have the columns that the configuration names, of types that fit and agree.

Pure: a file enters as the families of its columns (`conversion.family_of`), from a Parquet schema or from sampled rows.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import ARROW_TYPES, Attribute
from pipeline.config import CorpusConfig
from pipeline.corpus.conversion import LIST_OF_NUMBERS
from pipeline.corpus.rules import kind_of
from pipeline.errors import ConfigError, SchemaMismatchError
from pipeline.schemas import OWN_PREFIX, RESERVED_COLUMNS

__all__ = ["FileColumns", "check_attribute_names", "sampled_columns", "settle_attributes"]

ID_FAMILIES = ("string", "int")
CONVERSIONS = frozenset({("int", "float"), ("float", "int"), ("string", "timestamp")})
"""(found, stated) families that a mapping in `corpus.attributes` may bridge, row by row."""
ONE_SCHEMA = "write all files with one schema"


@dataclass(frozen=True)
class FileColumns:
    """Columns of one file."""

    place: str
    """The file, for messages."""
    families: dict[str, str]
    """Family of every column of the file; `null` where it is not known."""
    is_sampled: bool
    """Whether the families come from some of the rows: then a value that does not fit is its row's fault."""


def check_attribute_names(config: CorpusConfig) -> None:
    """Refuse attributes that are named twice or as a column of our own tables.

    Raises:
        ConfigError: Names the attribute.
    """
    names = config.attribute_names
    for name in sorted(name for name in names if name in RESERVED_COLUMNS or name.startswith(OWN_PREFIX)):
        raise ConfigError(
            f"corpus.attributes: {name}", "this name is reserved", "rename the column in the corpus"
        )
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"corpus.attributes: {name}", f"is named {count} times", "name it once")


def sampled_columns(place: str, rows: Sequence[dict[str, Any]], config: CorpusConfig) -> FileColumns:
    """Families of JSON rows; where rows disagree, the most common family that the column may have.

    Args:
        place: The file, for messages.
        rows: Sampled rows.
        config: Says which columns are ids and attributes.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    families = {}
    for name in names:
        accepted = ID_FAMILIES if name == config.id else tuple(ARROW_TYPES)
        families[name] = _common_family([row.get(name) for row in rows], accepted)
    return FileColumns(place, families, is_sampled=True)


def settle_attributes(config: CorpusConfig, files: Sequence[FileColumns]) -> tuple[Attribute, ...]:
    """Check all used columns of all files and settle the attributes' types.

    Raises:
        SchemaMismatchError: A column is missing, of a type that does not fit, or differs between files.
    """
    for file in files:
        for name in dict.fromkeys((config.id, *config.text, *config.attribute_names, *_embedding(config))):
            _check_present(file, name, files[0])
    _check_id(config.id, files)
    for file in files:
        _check_text_and_embedding(config, file)
    return tuple(_settled(config, name, files) for name in config.attribute_names)


def _embedding(config: CorpusConfig) -> tuple[str, ...]:
    return () if config.embedding is None else (config.embedding,)


def _common_family(values: Sequence[Any], accepted: tuple[str, ...]) -> str:
    found = Counter(family for value in values if (family := _json_family(value)) != "null")
    usable = {family: n for family, n in found.items() if family in accepted} or dict(found)
    if usable.keys() >= {"int", "float"}:
        usable["float"] += usable.pop("int")
    return max(usable, key=lambda family: usable[family], default="null")


def _json_family(value: Any) -> str:
    if not isinstance(value, list):
        return kind_of(value)
    inside = {kind_of(x) for x in value}
    if inside <= {"string", "null"}:
        return "list<string>"
    return LIST_OF_NUMBERS if inside <= {"int", "float", "null"} else "list"


def _check_present(file: FileColumns, name: str, first: FileColumns) -> None:
    if name in file.families:
        return
    if file is not first and file.is_sampled:
        problem = f"column {name!r} is in {first.place} but in no sampled row here"
        raise SchemaMismatchError(file.place, problem, "write it as null in rows without a value")
    known = sorted(file.families)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise SchemaMismatchError(
        file.place,
        f"there is no column {name!r}{hint} (columns: {', '.join(known)})",
        "mend the corpus section",
    )


def _check_id(name: str, files: Sequence[FileColumns]) -> None:
    expected = ""
    for file in files:
        found = file.families[name]
        if found not in (*ID_FAMILIES, "null"):
            raise SchemaMismatchError(
                file.place,
                f"id column {name!r}: expected string or int, found {found}",
                "name another column",
            )
        if expected and found not in (expected, "null"):
            raise _disagreement(file, name, expected, found, files[0])
        expected = expected or (found if found != "null" else "")


def _check_text_and_embedding(config: CorpusConfig, file: FileColumns) -> None:
    if file.is_sampled:
        return
    roles = [("text", name, "string") for name in config.text]
    roles += [("embedding", name, LIST_OF_NUMBERS) for name in _embedding(config)]
    for role, name, expected in roles:
        found = file.families[name]
        if found not in (expected, "null"):
            raise SchemaMismatchError(
                file.place,
                f"{role} column {name!r}: expected {expected}, found {found}",
                f"name another column in corpus.{role}",
            )


def _settled(config: CorpusConfig, name: str, files: Sequence[FileColumns]) -> Attribute:
    stated: str | None = config.attributes[name] if isinstance(config.attributes, dict) else None
    found = [file.families[name] for file in files]
    expected = stated or next((family for family in found if family != "null"), "string")
    if expected not in ARROW_TYPES:
        raise SchemaMismatchError(
            files[found.index(expected)].place,
            f"attribute {name!r}: found {expected}, supported are {', '.join(ARROW_TYPES)}",
            "convert the column, or leave the attribute out",
        )
    for file, family in zip(files, found, strict=True):
        if not _fits(family, expected, is_stated=stated is not None, is_sampled=file.is_sampled):
            raise (
                _disagreement(file, name, expected, family, files[0])
                if stated is None
                else SchemaMismatchError(
                    file.place,
                    f"attribute {name!r}: stated as {stated}, found {family}",
                    "state the type that the column has",
                )
            )
    return Attribute.model_validate({"name": name, "type": expected})


def _fits(found: str, expected: str, *, is_stated: bool, is_sampled: bool) -> bool:
    is_converted = is_stated and (found, expected) in CONVERSIONS
    return (
        found in (expected, "null") or is_converted or (is_sampled and (found, expected) == ("int", "float"))
    )


def _disagreement(
    file: FileColumns, name: str, expected: str, found: str, first: FileColumns
) -> SchemaMismatchError:
    problem = f"column {name!r}: expected {expected} as in {first.place}, found {found}"
    return SchemaMismatchError(file.place, problem, ONE_SCHEMA)
