"""Print what strata needs, one requirement a line: `requirements.py PYPROJECT EXTRAS` (extras separated by commas)."""

import sys
import tomllib
from pathlib import Path

__all__ = ["requirements"]


def requirements(pyproject: Path, extras: str) -> list[str]:
    """Requirements of the project and of some of its extras.

    Args:
        pyproject: Path of pyproject.toml.
        extras: Names separated by commas; empty: none.

    Raises:
        KeyError: There is no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    chosen = [name.strip() for name in extras.split(",") if name.strip()]
    return project["dependencies"] + [
        line for name in chosen for line in project["optional-dependencies"][name]
    ]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path(sys.argv[1]), sys.argv[2])) + "\n")
