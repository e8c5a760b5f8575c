"""The Dockerfile, as far as it can be judged without an engine."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _instructions():
    """(instruction, arguments), continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def _arguments(name):
    return [rest for instruction, rest in _instructions() if instruction == name]


def _hadolint(path):
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--format", "json", path], capture_output=True, text=True, check=False, timeout=60
    )
    return [found["code"] for found in json.loads(done.stdout)]


def test_the_linter_finds_nothing(tmp_path):
    assert _hadolint(DOCKERFILE) == []
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("USER 1000:1000", "USER root"))
    assert "DL3002" in _hadolint(worse)


def test_every_source_exists_and_reaches_the_context():
    allowed = {
        line[1:].removesuffix("/**")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [
        source for rest in _arguments("COPY") if not rest.startswith("--from") for source in rest.split()[:-1]
    ]
    assert {"pipeline", "jobs", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert source in allowed


def test_every_stage_that_is_copied_from_exists():
    stages = {rest.rpartition(" AS ")[2] for rest in _arguments("FROM") if " AS " in rest}
    for rest in _arguments("COPY"):
        if rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in stages


def test_python_and_torch_are_those_of_the_project():
    (base,) = [rest for rest in _arguments("ARG") if rest.startswith("BASE_IMAGE=")]
    version = re.search(r"python:(\d+\.\d+)\.\d+-", base).group(1)
    assert PROJECT["requires-python"].startswith(f">={version},")
    (torch,) = [rest for rest in _arguments("ARG") if rest.startswith("TORCH=")]
    pinned = torch.removeprefix("TORCH=").strip('"')
    assert pinned in PROJECT["dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    assert f'pip install --quiet --disable-pip-version-check "{pinned}"' in makefile


def test_the_image_runs_as_a_user_of_its_own():
    assert _arguments("USER")[-1] == "1000:1000"
    assert "useradd --uid 1000" in DOCKERFILE.read_text()


def test_the_image_of_the_launcher_job_is_the_base_image():
    base = next(rest for rest in _arguments("ARG") if rest.startswith("BASE_IMAGE=")).partition("=")[2]
    assert f"image: {base}\n" in (ROOT / "infra/kuberay/cronjob/cronjob.yaml").read_text()


def test_the_requirements_are_those_of_the_project():
    script = ROOT / "infra" / "requirements.py"
    done = subprocess.run(
        [sys.executable, script, ROOT / "pyproject.toml", "minilm"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == PROJECT["dependencies"] + PROJECT["optional-dependencies"]["minilm"]
    wrong = [sys.executable, script, ROOT / "pyproject.toml", "nonsense"]
    assert subprocess.run(wrong, capture_output=True, check=False, timeout=60).returncode != 0


def test_the_wheel_holds_both_packages_and_the_command(tmp_path):
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "pipeline", "jobs"):
        target = source / name
        target.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, target], check=True)
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel without fetching its back end")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--wheel-dir", tmp_path, source],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("strata-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"jobs/run.py", "pipeline/py.typed", "pipeline/execution/cluster.py"} <= names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "strata = jobs.__main__:main" in zipfile.ZipFile(wheel).read(entry).decode()
