#!/usr/bin/env bash
# Uses a GPU machine for fifteen minutes, with the folder .gpu/ of prepare.sh. Run two commands, one
# directly after the other, in the repository's root:
#   bash .gpu/gpu_run.sh check      about 200 s
#   bash .gpu/gpu_run.sh main       about 480 s; if it is run again, it goes on
#   bash .gpu/gpu_run.sh bench 100  if time is left: the rows that `check` had no time for
# A phase that fails does not stop the script. Each phase has a time limit, a log, and two lines in
# run.log; after each phase the results are packed into $OUT. GPU_DEVICE=cpu tries the script without
# a GPU, with tiny sizes. GPU_SUITE=0 leaves out the test suite, which runs on the CPU.
set -uo pipefail
mode=${1:-check} device=${GPU_DEVICE:-cuda} here=$(dirname "$0") python=${PYTHON:-python3}
OUT=${OUT:-/tmp/gpu-out} work=${WORK:-/tmp/gpu-work}
limit=${2:-$([ "$mode" = main ] && echo 480 || echo 200)}  # seconds
start=$SECONDS
mkdir -p "$OUT" "$work"; exec > >(tee -a "$work/run-$mode.log" "$OUT/run.log") 2>&1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MPLBACKEND=Agg
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCHINDUCTOR_CACHE_DIR=$work/inductor
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-$work/none} HF_HUB_OFFLINE=1
slow=1; [ "$device" = cpu ] && { export OMP_NUM_THREADS=1; slow=10; }  # the limits are for a GPU

left() { echo $((slow * limit - (SECONDS - start))); }
clock() { printf '%4d s' $((SECONDS - start)); }

pack() {  # at most 8 files of 16 MiB, none deeper than $OUT
  local runs; runs=$(cat "$work/runs" 2>/dev/null || echo out)
  (cd "$work" && tar czf "$OUT/logs.tar.gz" --exclude=inductor --exclude=smoke --exclude=none \
    --exclude=site --exclude=toydata --exclude='runs-*' . 2>/dev/null)
  [ -d "$runs" ] && (cd "$runs" && find . -type f \( -name '*.jsonl' -o -name '*.json' \
    -o -name '*.png' -o -name '*.txt' -o -name '*.md' \) ! -name groups.jsonl -print0 |
    tar czf "$OUT/results.tar.gz" --null -T - 2>/dev/null)
  cp -f "$work/checks.log" "$work/bench.json" "$OUT/" 2>/dev/null
  find "$runs" -path '*frontier*' -name frontier.png -exec cp -f {} "$OUT/" \; 2>/dev/null
  find "$runs" -path '*dpo*' -name curves.png -exec cp -f {} "$OUT/" \; 2>/dev/null
  local size; size=$(stat -c %s "$OUT/results.tar.gz" 2>/dev/null || echo 0)
  [ "$size" -gt 16000000 ] &&
    (cd "$OUT" && split -b 15000000 -d results.tar.gz results.part. && rm results.tar.gz)
}

phase() {  # phase NAME SECONDS COMMAND...: sends Ctrl-C at the limit; the checkpoint is kept
  local name=$1 most=$((slow * $2)); shift 2
  local rest; rest=$(left); [ "$most" -gt "$rest" ] && most=$rest
  if [ "$most" -lt 5 ]; then echo "[$(clock)] SKIP $name: no time is left"; return 99; fi
  echo "[$(clock)] $name, at most $most s: ${*//$'\n'/ }" | cut -c1-600
  timeout -s INT -k 20 "$most" "$@" > "$work/$name.log" 2>&1; local code=$?
  echo "[$(clock)] $name: exit $code"
  tail -n "${SHOW:-4}" "$work/$name.log" | cut -c1-300 | sed 's/^/    /'
  pack; return $code
}

unpack() {  # IMDb's tokens into data/
  phase data 40 $python -c "import tarfile; tarfile.open('$here/data.tar.xz').extractall('data')"
}

bench() {  # if it is run again, it goes on. Only bench.py uses the packages of prepare.sh
  [ "$device" = cuda ] && [ -d "$here/whl" ] && [ ! -d "$work/site" ] &&
    phase wheels 30 $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
      --target "$work/site" "$here"/whl/*.whl
  SHOW=40 phase bench $(($(left) - 5)) env PYTHONPATH="$PYTHONPATH:$work/site" $python \
    tests/gpu/bench.py --device "$device" --json "$work/bench.json" --flags "$work/flags" \
    --limit $(($(left) - 20))
}

trap 'pack; echo "[$(clock)] end; in $OUT: $(ls "$OUT" | tr "\n" " ")"' EXIT

if [ "$mode" = check ]; then
  tiny="--preset toy --device $device --threads 1 --reviews 300 --vocab 900 --n-layer 2 --n-head 2
    --n-embd 32 --n-ctx 48 --sft-steps 8 --sft-batch 16 --dropout 0.1 --prompts 40 --eval-prompts 8
    --valid-prompts 8 --optimum-samples 4 --max-new-tokens 24 --dpo-steps 6 --dpo-batch 5
    --rm-batch 12 --rm-epochs 1 --ppo-steps 4 --ppo-rollouts 8 --best-of 8 --data $work/toydata"
  rm -rf "$work/smoke" "$work/smoke.txt" "$work/bench.json"
  SHOW=14 phase env 20 bash -c "nvidia-smi -L
    nvidia-smi --query-gpu=memory.total,clocks.sm,driver_version --format=csv
    nproc; free -g | head -2; df -h /dev/shm /tmp .
    $python -c 'import torch, numpy, tiktoken, matplotlib as m; print(torch.__version__,
      numpy.__version__, m.__version__, torch.cuda.is_available(), torch.cuda.is_bf16_supported())'"
  [ -s "$here/data.tar.xz" ] && unpack
  # first the corpus and its BPE; then at the same time a chain per precision, test_device.py and, on
  # the CPU, the whole suite
  phase smoke-sft 60 $python train.py --stage sft $tiny --out "$work/smoke/first"
  suite=
  if [ "${GPU_SUITE:-1}" = 1 ]; then
    workers=$($python -c "import xdist" 2>/dev/null && echo "-n 8")
    (CUDA_VISIBLE_DEVICES= timeout 75 $python -m pytest -q -x $workers -p no:cacheprovider \
       > "$work/pytest.log" 2>&1; echo "pytest: exit $?" >> "$work/pytest.log") &
    suite=$!
  fi
  declare -A stages=([bf16]="dpo inspect ppo best-of-n" [fp16]="dpo" [fp32]="dpo unlikelihood")
  for precision in bf16 fp16 fp32; do
    (for stage in ${stages[$precision]}; do
       timeout $((40 * slow)) $python -m experiments --stage $stage $tiny --precision $precision \
         --out "$work/smoke/$precision" > "$work/smoke-$precision-$stage.log" 2>&1
       echo "smoke $precision $stage: exit $?" | tee -a "$work/smoke.txt"
     done) & chains+=($!)
  done
  SHOW=6 phase checks 75 $python -m pytest -q -rP --tb=short --durations=3 -p no:cacheprovider \
    -k "$device" tests/gpu/test_device.py tests/test_dpo.py
  wait "${chains[@]}"
  echo "[$(clock)] chains: $(grep -c 'exit 0' "$work/smoke.txt") of 7 ended well"
  grep -v 'exit 0' "$work/smoke.txt" | tr -d : | while read -r _ precision stage _; do
    tail -n 3 "$work/smoke-$precision-$stage.log"; done | cut -c1-300
  [ -n "$suite" ] && { wait $suite; tail -n 3 "$work/pytest.log"; }
  bench
elif [ "$mode" = bench ]; then
  bench
else
  if [ "$device" = cpu ]; then
    base=(--preset toy --device cpu --threads 1 --reviews 300 --vocab 900 --n-layer 1 --n-head 2
          --n-embd 16 --n-ctx 48 --prompts 30 --eval-prompts 4 --valid-prompts 4
          --optimum-samples 4 --max-new-tokens 12 --sft-steps 2)
    frontier=(--sweep-steps 1 --evals-per-run 1 --ppo-steps 1 --ppo-rollouts 8 --best-of 4
              --rm-batch 12 --rm-epochs 1 --jobs 1)
    dpo=(--dpo-steps 2 --dpo-batch 5) flags=() data=$work/toydata
  else
    base=(--preset imdb --device cuda --eval-prompts 512 --valid-prompts 256 --optimum-samples 64
          --save-secs 45)
    frontier=(--sweep-steps 250 --evals-per-run 3 --ppo-steps 16 --ppo-rollouts 512 --ppo-lr 5e-5
              --best-of 64 --jobs 6)
    dpo=(--dpo-steps 600 --dpo-warmup 100) data=data
    # used if bench.py has written no flags
    flags=(--sft-steps 1500 --sft-warmup 75 --reward-steps 500 --prompts 8000)
    [ -s "$work/flags" ] && read -r -a flags < "$work/flags"
    [ -d data ] || unpack
  fi
  runs=$(cat "$work/runs" 2>/dev/null)
  if [ -z "$runs" ]; then  # in memory if there is enough: 200 MB are slow to write to disk
    free=$(df --output=avail -BG /dev/shm 2>/dev/null | tail -1 | tr -dc 0-9); runs=$work/runs-here
    [ "$device" = cuda ] && [ "${free:-0}" -ge 30 ] && runs=/dev/shm/gpu-runs
    mkdir -p "$runs"; echo "$runs" > "$work/runs"
  fi
  common=("${base[@]}" ${flags[@]+"${flags[@]}"} --out "$runs" --data "$data")
  [ -s "$work/precision" ] && common+=(--precision "$(cat "$work/precision")")
  SHOW=30 phase dpo 280 $python train.py --stage dpo "${common[@]}" "${dpo[@]}"; code=$?
  # 124 is the time limit. Another error may come from half precision.
  if [ $code -ne 0 ] && [ $code -ne 124 ] && [ ! -s "$work/precision" ]; then
    echo fp32 > "$work/precision"; common+=(--precision fp32)
    SHOW=30 phase dpo-fp32 250 $python train.py --stage dpo "${common[@]}" "${dpo[@]}"; code=$?
  fi
  if [ $code -eq 0 ]; then
    SHOW=12 phase frontier $(($(left) - 30)) $python -m experiments --stage frontier \
      "${common[@]}" "${frontier[@]}"; code=$?
    SHOW=8 phase inspect 40 $python -m experiments --stage inspect "${common[@]}" "${dpo[@]}"
    [ $code -ne 0 ] && phase degenerate $(($(left) - 5)) $python -m experiments --stage degenerate \
      "${common[@]}"
  fi
  find "$runs" -name metrics.jsonl -exec wc -l {} + | sort -rn | head -n 50 > "$work/rows.txt"
fi
