"""The scripts for a GPU machine, run on a CPU with tiny sizes: each phase must end with exit 0.

`check` takes two minutes on two cores, so its test runs only with TEST_GPU_CHECK=1.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def phases(mode: str, folder: Path) -> dict[str, str]:
    """Runs gpu_run.sh. Returns each phase's name -> its exit code. Results are in folder/out."""
    environment = os.environ | dict(GPU_DEVICE="cpu", GPU_SUITE="0", PYTHON=sys.executable,
                                    OUT=str(folder / "out"), WORK=str(folder / "work"))
    run = subprocess.run(["bash", "tests/gpu/gpu_run.sh", mode], cwd=ROOT, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    return dict(re.findall(r"^(?:\[.*\] )?(\S.*): exit (\d+)$", run.stdout, re.M))


def test_main_runs_dpo_the_frontier_and_inspect_and_packs_their_results(tmp_path):
    assert phases("main", tmp_path) == dict.fromkeys(("dpo", "frontier", "inspect"), "0")
    packed = {path.name for path in (tmp_path / "out").iterdir()}
    assert packed == {"run.log", "logs.tar.gz", "results.tar.gz", "frontier.png", "curves.png"}


@pytest.mark.skipif(not os.environ.get("TEST_GPU_CHECK"), reason="two minutes: TEST_GPU_CHECK=1")
def test_check_runs_a_chain_per_precision_the_device_s_tests_and_the_bench(tmp_path):
    chains = ("bf16 dpo", "bf16 inspect", "bf16 ppo", "bf16 best-of-n", "fp16 dpo", "fp32 dpo",
              "fp32 unlikelihood")
    assert phases("check", tmp_path) == dict.fromkeys(
        ("env", "smoke-sft", *(f"smoke {chain}" for chain in chains), "checks", "bench"), "0")
