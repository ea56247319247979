#!/usr/bin/env bash
# Run this first, on a CPU, in the repository's root. It puts what a GPU machine needs into the folder
# .gpu/, which git ignores: the script, the tokens of the whole of IMDb (34 MiB, two minutes), and TRL
# for the row trl of bench.py.
#   IMDB_PATH=.../aclImdb_v1.tar.xz TIKTOKEN_CACHE_DIR=.../tiktoken bash tests/gpu/prepare.sh
set -euo pipefail
: "${IMDB_PATH:?}" "${TIKTOKEN_CACHE_DIR:?}" "${PYTHON:=python3}"
mkdir -p .gpu
cp tests/gpu/gpu_run.sh .gpu/
if [ ! -s .gpu/data.tar.xz ]; then
  folder=$($PYTHON - <<'P'
from pathlib import Path

import data_imdb
from support.imdb_archive import REVIEWS
from support.runs import json_hash

data_imdb.load("imdb", "gpt2", Path(".gpu"), 0, 0, progress=lambda text: None)
# `load` looks for this name if IMDB_PATH is not set; other reviews would have another name
made, = Path(".gpu").glob(f"imdb-gpt2-{json_hash([0, 0, REVIEWS])}")
print(made)
P
)
  tar -C .gpu -cf - "$(basename "$folder")" | xz -3 -T0 > .gpu/data.tar.xz
  rm -r "$folder"
fi
if [ ! -d .gpu/whl ]; then  # packages that the GPU machine lacks, for its Python
  grep -E '^(trl|datasets)==' requirements-bench.txt | xargs $PYTHON -m pip download -q --no-deps \
    --only-binary=:all: --python-version 3.12 --implementation cp -d .gpu/whl \
    dill==0.4.1 multiprocess==0.70.19 || { rm -rf .gpu/whl; echo "no wheels: no row for TRL"; }
fi
files() { git ls-files -co --exclude-standard -z; }  # du fails for those that are deleted
tree=$(files | xargs -0 du -cb 2>/dev/null | tail -1 | cut -f1 || true)
bytes=$((tree + $(du -sb .gpu | cut -f1)))
echo "travels: $((bytes / 1048576)) MiB of 64"; ls -la .gpu
[ "$bytes" -lt 64000000 ]
