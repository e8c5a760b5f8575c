"""infra/README.md against the files: paths, names and settings in it exist."""

import re
from pathlib import Path

import yaml

from pipeline.config import Config
from tests.infra.manifests import built

INFRA = Path(__file__).resolve().parents[2] / "infra"
TEXT = (INFRA / "README.md").read_text()


def test_every_path_exists():
    named = set(re.findall(r"infra/[a-zA-Z/_.-]*[a-zA-Z]", TEXT))
    assert len(named) > 5
    for path in named:
        assert (INFRA.parent / path).exists(), path
    for link in set(re.findall(r"\]\(([^)]+)\)", TEXT)):
        assert (INFRA / link).exists(), link
    for folder in re.findall(r"`((?:kuberay|components)/[a-z/-]+)`", TEXT):
        assert (INFRA / folder).exists() or (INFRA / "kuberay" / folder).exists(), folder


def test_every_object_that_a_command_names_is_applied():
    names = {(d["kind"].lower(), d["metadata"]["name"]) for d in built("overlays/example")}
    for kind, name in re.findall(r"(cronjob)[/ ](strata-[a-z]+)", TEXT):
        assert (kind, name) in names
    for name in re.findall(r"`(strata-[a-z]+)`", TEXT):
        assert name in {n for _, n in names} | {"strata-s3"}, name
    assert f"kubectl create namespace {next(n for k, n in names if k == 'namespace')}" in TEXT


def test_every_setting_exists():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    found = re.findall(r"`(ray|embedding|layout|corpus)\.([a-z_]+)", TEXT)
    assert len(found) > 8
    for section, key in found:
        assert key in sections[section].model_fields, f"{section}.{key}"


def test_the_secret_is_the_one_that_pods_read():
    component = yaml.safe_load((INFRA / "kuberay/components/s3-secret/kustomization.yaml").read_text())
    (name,) = set(re.findall(r"secretRef: {name: ([a-z0-9-]+)", component["patches"][0]["patch"]))
    assert f"create secret generic {name} " in TEXT
