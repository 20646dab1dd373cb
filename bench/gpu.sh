#!/usr/bin/env bash
# Everything a machine with a GPU is asked, in the order in which it matters; it needs no network.
#
#   OUT=folder bench/gpu.sh [seconds]
#
# Correctness first, then the sanitizers over the smallest case of every kernel, then peers and our rows in turns, then
# tuning and our rows once more. What passed is noted in $OUT/passed.txt and not run again: with that file, and
# results.jsonl, in another run's $OUT (or in $RESUME) it goes on where it stopped. A step that fails or runs out of time
# does not stop the next one. Logs and results.jsonl go to $OUT; the summary ends the output, and the exit code says if
# all passed.
#
# Needs torch with CUDA, triton and pytest, for the core's own tests pybind11, for some benchmarks transformers and timm;
# wheels in $WHEELS (default: wheels/) are installed beside it first. Extensions built elsewhere serve: each is one binary
# for every torch from 2.11 and every Python 3.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:?a folder for logs and results}
RESUME=${RESUME:-$OUT}
WHEELS=${WHEELS:-wheels}
SECONDS_GIVEN=${1:-540}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

# step NAME SECONDS COMMAND...: no longer than SECONDS, nor than what is left of the whole.
step() {
  local name=$1 limit=$2 left=$((SECONDS_GIVEN - SECONDS)) start=$SECONDS code
  shift 2
  ((left < limit)) && limit=$left
  if grep -qx "$name" "$OUT/passed.txt"; then
    code="passed before"
  elif ((limit < 5)); then
    code="not run, no time left"
    failed=1
  else
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    if [[ $code == 0 ]]; then
      code=passed
      echo "$name" >>"$OUT/passed.txt"
    else
      code="exit $code"
      failed=1
    fi
  fi
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$code" | tee -a "$OUT/summary.txt"
  [[ $code == "passed before" ]] || tail -n 3 "$OUT/$name.log" 2>/dev/null | cut -c1-300
}

test_step() { step "$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}"; }
rows() { test_step "$1" "$2" "bench/$3" --device cuda --save "$OUT/results.jsonl" "${@:4}"; }

# The smallest case of every kernel, forward and backward; the GPU tests pick it by this expression.
SMALLEST='two_runs_give_the_same_bits_and_one_gradient or another_run_in_another_order'
KERNELS=(tests/test_triton_ops.py tests/test_cuda_ops.py)

for file in passed.txt results.jsonl; do
  [[ $RESUME == "$OUT" || ! -e $RESUME/$file ]] || cp "$RESUME/$file" "$OUT/"
done
touch "$OUT/passed.txt"
: >"$OUT/summary.txt"
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$site" "$WHEELS"/*.whl && PYTHONPATH=$site:$PYTHONPATH
fi
[[ -e panda_kernels/_cpu.so && -e panda_kernels/_cuda.so ]] ||
  step build 240 env PANDA_KERNELS_BUILD=require PANDA_KERNELS_CUDA=require "$PYTHON" setup.py build_ext --inplace
step info 60 "$PYTHON" -m panda_kernels.cli info
test_step kernels 240 "${KERNELS[@]}"
test_step gpu 180 -m gpu tests
step verify 120 "$PYTHON" -m panda_kernels.cli verify
for tool in memcheck racecheck initcheck; do
  step "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" -m pytest -q -p no:cacheprovider "${KERNELS[@]}" -k "$SMALLEST"
done
rows tower 180 bench_tower.py
rows ops 180 bench_ops.py
rows encoders 120 bench_encoders.py
rows first_token 120 bench_first_token.py
rows scaling 120 bench_scaling.py
step launches 60 "$PYTHON" -m bench.launches
export PANDA_KERNELS_CACHE="$OUT/tuned"
step tuning 240 "$PYTHON" -m panda_kernels.cli autotune --device cuda
rows tuned 120 bench_tower.py
echo "all of it: $(((failed)) && echo failed || echo passed)" | tee -a "$OUT/summary.txt"
exit "$failed"
