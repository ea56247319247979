"""All stages: `python -m experiments --stage frontier`, which `python train.py` also runs."""

import sys

import train  # first: it sets an environment variable that torch reads  # isort: skip
import experiments.judge
import experiments.lessons
import experiments.ood
import experiments.variance
import experiments.sweep  # noqa: F401  each import adds its stages; sweep imports the others
from support.runs import main_exit

if __name__ == "__main__":
    sys.exit(main_exit(train.main))
