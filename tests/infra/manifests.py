"""The manifests as a cluster would get them, and what their fields must be."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubernetes_validate.utils import validate as validate_core

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
TYPES: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "kuberay-1.7.json").read_text())[
    "types"
]
KUBERNETES = "1.35"
PRIMITIVES = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}
CORE = {
    "PodTemplateSpec",
    "ObjectMeta",
    "ResourceRequirements",
    "SecurityContext",
    "EnvVar",
    "EnvFromSource",
    "VolumeMount",
}


@cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    """What `kubectl kustomize` makes of a folder below infra/kuberay."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", KUBERAY / folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def problems(value: Any, kind: str, path: str = "") -> Iterator[str]:
    """Fields of a KubeRay object that its type does not have, or that have another type."""
    if kind in CORE:
        yield from _core_problems(value, kind, path)
    elif kind in PRIMITIVES:
        if not isinstance(value, PRIMITIVES[kind]) or (kind == "integer" and isinstance(value, bool)):
            yield f"{path}: {value!r} is not of type {kind}"
    elif kind == "map<string>":
        for key, item in value.items():
            yield from problems(item, "string", f"{path}.{key}")
    elif kind.startswith("["):
        for i, item in enumerate(value):
            yield from problems(item, kind[1:-1], f"{path}[{i}]")
    elif kind in TYPES:
        yield from _struct_problems(value, TYPES[kind], path)
    elif value not in kind.split("|"):
        yield f"{path}: {value!r} is none of {kind}"


def _struct_problems(value: dict[str, Any], fields: dict[str, str], path: str) -> Iterator[str]:
    known = {name.removesuffix("!"): kind for name, kind in fields.items()}
    for name, item in value.items():
        if name not in known:
            yield f"{path}.{name}: there is no such field"
        else:
            yield from problems(item, known[name], f"{path}.{name}")
    yield from (
        f"{path}.{name[:-1]}: is missing" for name in fields if name.endswith("!") and name[:-1] not in value
    )


def _core_problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """Core types are checked inside an object that has them: Kubernetes' schema is one of whole objects."""
    container: dict[str, Any] = {"name": "x", "image": "x:1"}
    pod: dict[str, Any] = {"metadata": {}, "spec": {"containers": [container]}}
    match kind:
        case "PodTemplateSpec":
            pod = value
        case "ObjectMeta":
            pod["metadata"] = value
        case "ResourceRequirements":
            container["resources"] = value
        case "SecurityContext":
            container["securityContext"] = value
        case "EnvVar":
            container["env"] = [value]
        case "EnvFromSource":
            container["envFrom"] = [value]
        case "VolumeMount":
            container["volumeMounts"] = [value]
    yield from core_object_problems(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}, path
    )


def core_object_problems(value: dict[str, Any], path: str = "") -> Iterator[str]:
    """What Kubernetes' published schema has against one of its own objects."""
    try:
        validate_core(value, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{path}.{'.'.join(map(str, error.path))}: {error.message}"


def pod_specs(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod spec inside an object, with its place."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if isinstance(value.get("containers"), list):
                yield path, value
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from walk(item, f"{path}[{i}]")

    yield from walk(document, f"{document['kind']}/{document['metadata']['name']}")


def quantity(text: str | int) -> float:
    """A Kubernetes amount as a number: 16Gi, 200m, 4."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9}
    text = str(text)
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * units[unit]
    return float(text)
