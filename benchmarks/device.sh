#!/usr/bin/env bash
# Everything to know about one GPU, in at most eight minutes, as one JSON file:
#
#   benchmarks/device.sh [--device cuda|cpu] [--json FILE] [--minutes 8]
#
# Runs the tests marked `device` (every objective, tower, optimizer and the ranking equal to the CPU; no host sync in the
# step), then benchmarks/device.py (step, full softmax, ranking and epoch next to plain PyTorch, torch.compile and the
# matrix products alone; memory). PYTHON names the interpreter. With cuda, if its torch sees no GPU or a package is
# missing, an environment .venv-device is made with the CUDA build of the pinned torch. `--device cpu` is a dry run with
# tiny sizes and installs nothing. Exit code 1: a test failed; the measurements are in the file all the same.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=cuda
MINUTES=8
JSON=
PYTHON=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case "$1" in
    --device) DEVICE=$2 ;;
    --json) JSON=$2 ;;
    --minutes) MINUTES=$2 ;;
    *) echo "device.sh: unknown option $1; expected --device, --json or --minutes" >&2; exit 2 ;;
  esac
  shift 2
done
JSON=${JSON:-benchmarks/results/device-$DEVICE.json}
END=$((SECONDS + 60 * MINUTES))

export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" TWOTOWER_DEVICE=$DEVICE
NEEDS="import sys, pytest, torch, twotower.run, twotower.training.fit"
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c "$NEEDS; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
  nvidia-smi >/dev/null 2>&1 || { echo "device.sh: no NVIDIA GPU here; --device cpu is a dry run" >&2; exit 2; }
  "$PYTHON" -m venv .venv-device
  # The package index has the CUDA build of torch for Linux under the pinned version.
  .venv-device/bin/pip install --quiet --constraint constraints.txt --editable . pytest pytest-timeout hypothesis pandas pyarrow
  PYTHON=.venv-device/bin/python
fi

XML=$(mktemp)
trap 'rm -f "$XML"' EXIT
TESTS=0
timeout $(((END - SECONDS) / 2)) "$PYTHON" -m pytest -p no:cacheprovider -m device tests/device --junitxml "$XML" || TESTS=$?
"$PYTHON" benchmarks/device.py --device "$DEVICE" --tests "$XML" --seconds $((END - SECONDS - 10)) --json "$JSON"
exit $((TESTS != 0))
