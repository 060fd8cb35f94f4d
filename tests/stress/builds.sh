#!/usr/bin/env bash
# The fused LSTM's tests with other builds than the usual one. Arguments choose some of them:
#
#   clang    the other compiler
#   avx2     for CPUs without AVX-512 and AMX
#   alone    without OpenMP: one thread
set -euo pipefail
cd "$(dirname "$0")/../.."
for build in ${*:-clang avx2 alone}; do
  work=${TMPDIR:-/tmp}/rnn_builds/$build  # stays: next time only what has changed is compiled
  mkdir -p "$work"
  rm -rf "$work"/{csrc,tests}
  cp -rp rnn.py csrc tests train_shakespeare.py "$work"
  flags=$work/csrc/build.py compiler=g++
  case $build in
    clang) compiler=clang++ ;;
    avx2) sed -i 's/-march=native/-march=haswell/' "$flags"; grep -q haswell "$flags" ;;
    alone) sed -i 's/\["-fopenmp"\]/[]/' "$flags"; grep -q 'else \[\]$' "$flags" ;;
  esac
  echo "== $build"
  (cd "$work" && CXX=$compiler TORCH_EXTENSIONS_DIR=$work/extensions \
    RNN_ATTACKS=${RNN_ATTACKS:-200} python -m pytest -q -m "not slow" tests/test_fused.py \
    tests/test_fused_torch.py tests/test_fused_build.py tests/stress/test_attack.py)
done
