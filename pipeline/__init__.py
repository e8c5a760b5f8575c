"""strata: from a document corpus to a published vector index, and current ever after.

Serving code needs one name, `open_release`; importing it loads neither torch nor ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.index.reader import open_release

__all__ = ["open_release"]


def __getattr__(name: str) -> Any:
    if name == "open_release":
        from pipeline.index.reader import open_release

        return open_release
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
