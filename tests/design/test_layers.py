"""Imports go one way, and heavy libraries stay where they are used (DESIGN §3)."""

import subprocess
import sys

import pytest

from tests.design.sources import ROOT, Module, modules

LAYERS = (
    ("jobs",),
    ("execution",),
    ("upgrade", "reporting"),
    ("evaluation", "release"),
    ("index",),
    ("corpus", "embedding", "binarization", "partitioning", "postings"),
    ("spaces", "filters", "clustering", "measures"),
    ("tables",),
    ("storage",),
    ("artifacts", "schemas", "config"),
    ("errors",),
)
DEPTH = {package: depth for depth, layer in enumerate(LAYERS) for package in layer}

ONLY_IN = {
    "ray": {"execution"},
    "s3fs": {"storage"},
    "fsspec": {"storage"},
    "boto3": set(),
    "yaml": {"config"},
    "torch": {"embedding", "binarization", "upgrade"},
    "sentence_transformers": {"embedding"},
    "transformers": {"embedding"},
    "faiss": {"clustering", "binarization", "postings", "index", "evaluation"},
    "typer": {"jobs"},
    "tenacity": {"storage"},
    "sqlglot": {"filters"},
    "jinja2": {"reporting"},
    "matplotlib": {"reporting"},
    "duckdb": set(),
    "polars": set(),
    "pandas": set(),
}

MODULES = pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)


# The package's face names the reader, lazily; what importing it loads is tested elsewhere.
@pytest.mark.parametrize(
    "module", [m for m in modules() if m.name != "pipeline"], ids=lambda module: module.name
)
def test_a_module_imports_only_what_lies_below(module: Module) -> None:
    found = {
        name.split(".")[1] if name.startswith("pipeline.") else name.split(".")[0]
        for name in module.imports()
    }
    ours = {name for name in found if name in DEPTH and name != module.package}
    upward = {name for name in ours if DEPTH[name] <= DEPTH[module.package]}
    assert not upward, f"{module.name} imports {sorted(upward)}, which is not below {module.package}"


@MODULES
def test_a_library_is_imported_only_where_it_belongs(module: Module) -> None:
    found = {name.split(".")[0] for name in module.imports()}
    strangers = {name for name in found & set(ONLY_IN) if module.package not in ONLY_IN[name]}
    assert not strangers, f"{module.name} imports {sorted(strangers)}"


def test_every_package_has_its_layer() -> None:
    assert {module.package for module in modules()} - {"pipeline"} <= set(DEPTH)


@pytest.mark.parametrize(
    "statement", ["import pipeline", "from pipeline.index.reader import open_release", "import jobs"]
)
def test_opening_a_release_loads_neither_torch_nor_ray(statement: str) -> None:
    code = f"import sys\n{statement}\nprint(*(m for m in ('torch', 'ray', 'sentence_transformers') if m in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == ""
