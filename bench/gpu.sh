#!/usr/bin/env bash
# Everything a machine with a GPU is asked, most important first; it needs no network.
#
#   OUT=folder bench/gpu.sh [seconds]
#
# Needs torch with CUDA, triton and pytest, for the core's own tests pybind11, for some benchmarks transformers and timm;
# wheels in $WHEELS (default: wheels/) are installed beside it first. A step that fails or runs out of time does not
# stop the next one. Logs and results.jsonl go to $OUT; the summary ends the output, and the exit code says if all passed.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:?a folder for logs and results}
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
  if ((limit < 5)); then
    code="not run, no time left"
  else
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
  fi
  [[ $code == 0 ]] || failed=1
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - start)) "$([[ $code == 0 ]] && echo passed || echo "exit $code")" |
    tee -a "$OUT/summary.txt"
  tail -n 3 "$OUT/$name.log" 2>/dev/null | cut -c1-300
}

# The smallest case of every kernel, forward and backward; the GPU tests pick it by this expression.
SMALLEST='two_runs_give_the_same_bits_and_one_gradient'

: >"$OUT/summary.txt"
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$site" "$WHEELS"/*.whl && PYTHONPATH=$site:$PYTHONPATH
fi
# An extension built elsewhere serves: it is one binary for every torch from 2.11 and every Python 3.
[[ -e panda_kernels/_cpu.so ]] || step build 120 env PANDA_KERNELS_BUILD=require "$PYTHON" setup.py build_ext --inplace
step info 60 "$PYTHON" -m panda_kernels.cli info
step tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton_ops.py tests/test_triton_fp8.py
step gpu 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests
step verify 120 "$PYTHON" -m panda_kernels.cli verify
step bench 180 "$PYTHON" -m pytest -q -p no:cacheprovider bench --device cuda --save "$OUT/results.jsonl"
for tool in memcheck racecheck; do
  step "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton_ops.py -k "$SMALLEST"
done
echo "all of it: $(((failed)) && echo failed || echo passed)" | tee -a "$OUT/summary.txt"
exit "$failed"
