#!/bin/sh
# Everything that needs a GPU, in under ten minutes on one: correctness first, then times.
#   sh benchmarks/gpu.sh [FOLDER]        PYTHON=python3 chooses the interpreter; results and logs go to FOLDER.
# A failed part does not keep the next from running; the exit code is that of the tests.
cd "$(dirname "$0")/.." || exit 2
out=${1:-gpu-results}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/launchers" HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1

timeout 270 "$python" -m pytest -p no:cacheprovider -q -m gpu tests/kernels tests/contracts tests/families \
    tests/engines/test_capture.py tests/bench > "$out/tests.txt" 2>&1
code=$?
tail -n 15 "$out/tests.txt"
timeout 120 "$python" -m dbtrain bench ops --json > "$out/ops.json" 2> "$out/ops.txt" || tail -n 5 "$out/ops.txt"
timeout 190 "$python" -m dbtrain bench step --config sd15_lora --random-weights --sizes 1,8 --steps 10 --turns 2 \
    --capture off,graph --attention sdpa,flash,xformers --json train.precision=bf16 \
    > "$out/step.json" 2> "$out/step.txt" || tail -n 5 "$out/step.txt"
echo "results are in $out; the tests ended with $code"
exit $code
