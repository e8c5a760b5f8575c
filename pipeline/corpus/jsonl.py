"""JSONL as bytes: blocks of whole lines, what a scan of them finds, and the rows they hold.

The row number of JSONL is the 0-based number of the line in its file, blank lines counted, so that an editor finds
it; a blank line is not a row. A byte-order mark at the start of a file is skipped.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.rules import LINE_TOO_LONG, NOT_AN_OBJECT, BadRowError
from pipeline.errors import CorruptArtifactError

__all__ = ["Block", "LineScan", "line_blocks", "numbered_lines", "parse_line", "scan_lines"]

MAX_LINE_BYTES = 64 * 1024 * 1024
"""Longest line that is read; one JSON array of a whole corpus is no JSONL and would take all memory."""
TOO_LONG = b"\xff a line of more than 64 MiB"
"""Stands for the bytes of a longer line; no line of UTF-8 is like it."""
BOM = b"\xef\xbb\xbf"
NEWLINE = 0x0A
SPACE = 0x20


@dataclass
class LineScan:
    """What one pass over a file finds."""

    rows: int = 0
    """Lines that are not blank."""
    lines: int = 0
    size: int = 0
    starts: list[tuple[int, int]] = field(default_factory=list)
    """(first byte, first line) of each shard."""
    head: list[bytes] = field(default_factory=list)
    """The first lines that are not blank."""


class Block(NamedTuple):
    """Whole lines of a file."""

    data: bytes
    size: int
    """Bytes in the file: more than `data` has where a line was too long to be kept."""


def line_blocks(pieces: Iterable[bytes]) -> Iterator[Block]:
    """Cut a stream of bytes behind newlines; only the last block may lack one. A line that is too long is let go.

    A piece is shorter than the longest line that is read.
    """
    carried, let_go = b"", 0
    for piece in pieces:
        first, newline, others = piece.partition(b"\n")
        if not newline:
            carried, let_go = _carried(carried + piece, let_go)
            continue
        line = carried + first
        if let_go or len(line) > MAX_LINE_BYTES:
            yield Block(TOO_LONG + newline, let_go + len(line) + 1)
        else:
            yield _block(line + newline)
        whole, newline, rest = others.rpartition(b"\n")
        if newline:
            yield _block(whole + newline)
        carried, let_go = _carried(rest, 0)
    if let_go:
        yield Block(TOO_LONG, let_go + len(carried))
    elif carried:
        yield _block(carried)


def _block(data: bytes) -> Block:
    return Block(data, len(data))


def _carried(line: bytes, let_go: int) -> tuple[bytes, int]:
    """The beginning of a line as far as it is kept, and the number of its bytes that are not."""
    if let_go or len(line) > MAX_LINE_BYTES:
        return b"", let_go + len(line)
    return line, 0


def scan_lines(blocks: Iterable[Block], shard_rows: int, head_rows: int, place: str) -> LineScan:
    """Count rows and note where each shard starts.

    Args:
        blocks: From `line_blocks`, over a whole file.
        shard_rows: Rows of one shard.
        head_rows: Lines to keep, for their types.
        place: The file, for messages.

    Raises:
        CorruptArtifactError: The last line has no newline and is not JSON.
    """
    scan = LineScan()
    last = b""
    for block in blocks:
        _scan_block(scan, block, shard_rows, head_rows)
        last = block.data
    if last and not last.endswith(b"\n"):
        _check_last_line(last.rpartition(b"\n")[2], scan.lines - 1, place)
    return scan


def numbered_lines(blocks: Iterable[Block], first_line: int) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of every line that is not blank."""
    line_no = first_line
    for block in blocks:
        lines = block.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield from ((line_no + i, line) for i, line in enumerate(lines) if line.strip())
        line_no += len(lines)


def parse_line(line: bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        BadRowError: Too long, not UTF-8, not JSON, or not an object.
    """
    if line.startswith(TOO_LONG):
        raise BadRowError(LINE_TOO_LONG)
    try:
        value = json.loads(line.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        raise BadRowError(f"invalid UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"invalid JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError("invalid JSON: a number is too long or lists are too deep") from error
    if not isinstance(value, dict):
        raise BadRowError(NOT_AN_OBJECT)
    return value


def _scan_block(scan: LineScan, read: Block, shard_rows: int, head_rows: int) -> None:
    block = read.data
    data = np.frombuffer(block, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(data == NEWLINE) + 1])
    starts = starts[starts < len(data)]
    stops = np.append(starts[1:], len(data))
    line_no = np.flatnonzero(_is_row(block, starts, stops))
    # number of each row in the file; a shard starts at every multiple
    row_no = scan.rows + np.arange(len(line_no))
    for line in line_no[row_no % shard_rows == 0]:
        scan.starts.append((scan.size + int(starts[line]), scan.lines + int(line)))
    wanted = line_no[: max(0, head_rows - len(scan.head))]
    scan.head += [block[starts[i] : stops[i]] for i in wanted]
    scan.rows += len(line_no)
    scan.lines += len(starts)
    scan.size += read.size


def _is_row(block: bytes, starts: NDArray[np.intp], stops: NDArray[np.intp]) -> NDArray[np.bool_]:
    # Nearly every line starts with a brace: only the others are looked at whole.
    is_row = np.frombuffer(block, np.uint8)[starts] > SPACE
    for i in np.flatnonzero(~is_row):
        is_row[i] = bool(block[starts[i] : stops[i]].strip())
    return is_row


def _check_last_line(line: bytes, line_no: int, place: str) -> None:
    if not line.strip() or line == TOO_LONG:
        return
    try:
        json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        problem = f"is truncated: its last line (row {line_no}) has no newline and is not JSON"
        raise CorruptArtifactError(place, problem, "copy the file again, or remove that line") from error
