#!/usr/bin/env bash
# The tests of the fused LSTM with a build that stops at the first invalid memory access or
# undefined behaviour (GCC's AddressSanitizer and UndefinedBehaviorSanitizer).
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r rnn.py csrc tests train_shakespeare.py "$work"
cd "$work"
# The flags for this build only; -O1 keeps it quick, and no frame is left out of the report.
sed -i 's/return \["-O3", native\]/return ["-O1", native, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]/; s/flags\[2:\]/flags[3:]/' rnn.py
grep -q fsanitize rnn.py
export TORCH_EXTENSIONS_DIR=$work/extensions
# Python itself is not instrumented, so the sanitizer must be loaded before it; and Python and torch
# keep memory until the end, which is no leak of ours.
export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0
env -u LD_PRELOAD ninja --version > /dev/null
python -m pytest -q tests/test_fused.py tests/test_layers.py -k "${*:-not compiler and not ninja and not csrc}"
