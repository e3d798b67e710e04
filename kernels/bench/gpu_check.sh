#!/usr/bin/env bash
# Builds the CUDA kernels, tests them on this machine's GPU, and measures them, all in under nine minutes:
#
#     kernels/bench/gpu_check.sh
#
# Needs an NVIDIA GPU, nvcc, CMake and a Python with a PyTorch that sees the GPU; nothing from the network. What else is
# missing (pytest for the tests, pydantic and typer for `modes bench`, ...) is said, and counts as a failure of its part.
# Works in a plain checkout as in one that is installed. A table comes last; all results are in
# docs/benchmarks/gpu-<name>.json, and a copy in $OUT where that is set.
#
# PYTHON: which Python (default: the first of .venv's and python3 that has a torch with CUDA). MODES_CHECK_SECONDS: for
# everything (default 520). Exits with 1 when a test failed, a part broke, or there is no GPU.
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root" || exit 1

if ! command -v nvidia-smi >/dev/null 2>&1 || ! gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null)" \
  || [ -z "$gpu" ]; then
  echo "error: no NVIDIA GPU on this machine: \`nvidia-smi\` lists none" >&2
  echo "hint: without a GPU the kernels are tested emulated: \`python -m pytest tests/cuda\`" >&2
  exit 1
fi
for place in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
  if [ -n "$place" ] && [ -x "$place/bin/nvcc" ]; then
    PATH="$PATH:$place/bin"
  fi
done
if ! command -v nvcc >/dev/null 2>&1; then
  echo "error: \`nvcc\` is not on the PATH and not in /usr/local/cuda, expected a CUDA compiler" >&2
  echo "hint: set CUDA_HOME to where it is installed" >&2
  exit 1
fi

python=""
for candidate in "${PYTHON:-}" "$root/.venv/bin/python" python3; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no Python with a PyTorch that can use the GPU, tried \`${PYTHON:-}\`, \`.venv/bin/python\` and \`python3\`" >&2
  echo "hint: set PYTHON to one" >&2
  exit 1
fi
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m kernels.bench.gpu_check
