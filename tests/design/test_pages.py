"""What the READMEs say of tests, commands, settings, targets and numbers is so."""

import re

import pytest

from jobs.__main__ import COMMANDS
from pipeline import config
from tests.design.sources import ROOT

PAGES = ("README.md", "pipeline/README.md", "infra/README.md", "infra/alerts/RUNBOOKS.md")
SECTIONS = "binarizer|corpus|embedding|evaluation|gates|layout|lease|ray|report|search|storage"
ARCHITECTURE = (ROOT / "pipeline/README.md").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def named_tests() -> list[tuple[str, str]]:
    """File and beginning of the name of each test that the crash matrix names; `…` stands for the file named before."""
    found, file = [], ""
    for path, name in re.findall(
        r"`((?:…|[a-z_/]+\.py)?)(?:::(test_\w+)…?(?:\[[^`]*\])?)?`",
        section(ARCHITECTURE, "When something dies"),
    ):
        file = file if path in {"…", ""} else path
        found.append((file, name))
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(named_tests())))
def test_every_test_of_the_crash_matrix_exists(file, name):
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name or 'test_'}", source, flags=re.MULTILINE)


def test_every_row_of_the_crash_matrix_names_a_test():
    rows = re.findall(r"^\| (.+) \|$", section(ARCHITECTURE, "When something dies"), flags=re.MULTILINE)
    assert len(rows) > 30
    for row in rows[2:]:
        assert re.search(r"`[a-z_/]+\.py|`…::test_", row.rpartition(" | ")[2]), row


def test_decisions_are_numbered_one_after_the_other():
    numbers = re.findall(r"^(\d+)\. \*\*", section(ARCHITECTURE, "Decisions"), flags=re.MULTILINE)
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert len(numbers) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_exists(page):
    known = set(re.findall(r"^\| `([\w.<>]+)` \|", config.reference(), flags=re.MULTILINE))
    named = set(re.findall(rf"`((?:{SECTIONS})\.[a-z_0-9]+)", (ROOT / page).read_text(encoding="utf-8")))
    assert named
    assert named - {"storage.py"} <= known


def test_every_command_is_in_the_readme_and_every_one_there_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `strata (\w+) CONF", readme, flags=re.MULTILINE)) == set(COMMANDS)


def test_every_make_target_that_a_page_names_exists():
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"quickstart", "test", "test-slow"} <= named <= targets
