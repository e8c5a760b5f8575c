"""Habits that every module keeps, and pages that are generated from it."""

import ast
import re

import pytest

from pipeline import config
from tests.design.sources import ROOT, Module, modules

LONGEST_FUNCTION = 60
BANNED_WORDS = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|$)")

MODULES = pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)


@MODULES
def test_a_module_says_what_it_is_for(module: Module) -> None:
    assert ast.get_docstring(module.tree)


@MODULES
def test_a_module_says_what_it_offers(module: Module) -> None:
    names = [
        target.id if isinstance(target, ast.Name) else ""
        for node in module.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    assert "__all__" in names


@MODULES
def test_functions_are_short(module: Module) -> None:
    long = {
        f.name: length
        for f in module.functions()
        if (length := f.end_lineno - f.lineno + 1) > LONGEST_FUNCTION
    }
    assert long == {}


@MODULES
def test_a_module_has_a_name_that_says_something(module: Module) -> None:
    assert not BANNED_WORDS.search(module.path.stem)


@pytest.mark.parametrize(
    ("page", "generate"), [("schema.json", config.json_schema), ("README.md", config.reference)]
)
def test_pages_about_the_configuration_are_generated_from_it(page: str, generate) -> None:
    found = (ROOT / "conf" / page).read_text(encoding="utf-8")
    assert found == generate(), "conf/ is behind pipeline/config.py: run `make docs`"
