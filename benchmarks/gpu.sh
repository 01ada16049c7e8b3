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

timed() { # SECONDS NAME VERB ARGUMENTS: a bench into NAME.json, with what it says in NAME.txt
    limit=$1 name=$2
    shift 2
    timeout "$limit" "$python" -m dbtrain bench "$@" --json > "$out/$name.json" 2> "$out/$name.txt" ||
        { echo "$name: failed or out of time:"; tail -n 5 "$out/$name.txt"; }
}

timeout 240 "$python" -m pytest -p no:cacheprovider -q -m gpu tests/kernels tests/contracts tests/families \
    tests/engines/test_capture.py tests/packing tests/bench > "$out/tests.txt" 2>&1
code=$?
tail -n 15 "$out/tests.txt"
timed 60 ops ops
timed 110 step step --config sd15_lora --random-weights --sizes 1,8 --steps 10 --turns 2 \
    --capture off,graph --attention sdpa,auto train.precision=bf16
timed 90 pack-sd15 pack --config sd15_lora --random-weights --sizes 1,8,32 --steps 5 --turns 2 \
    train.batch=1 lora.rank=16 train.precision=bf16
timed 95 pack-sdxl pack --config sdxl_lora --random-weights --sizes 1,2,4 --steps 3 --turns 1 \
    train.batch=1 lora.rank=16 train.precision=bf16 train.gradient_checkpointing=false
echo "results are in $out; the tests ended with $code"
exit $code
