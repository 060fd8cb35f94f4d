#!/usr/bin/env bash
# The tests of the fused LSTM with a build that stops at the first invalid memory access or
# undefined behaviour (GCC's AddressSanitizer and UndefinedBehaviorSanitizer). An argument chooses a
# part, as pytest's -k does: tests/stress/sanitize.sh attack
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${TMPDIR:-/tmp}/rnn_sanitize  # stays: next time only what has changed is compiled
mkdir -p "$work"
rm -rf "$work"/{csrc,tests}
cp -rp rnn.py csrc tests train_shakespeare.py "$work"
cd "$work"
# For this build only. -O1 and -g1 keep it quick; with no frame left out, reports can be read.
flags='"-O1", native, "-g1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"'
sed -i "s/return .*, openmp$/return [$flags, *openmp], ['-fsanitize=address,undefined', *openmp]/" \
  csrc/build.py
grep -q fsanitize csrc/build.py
export TORCH_EXTENSIONS_DIR=$work/extensions
# Python itself is not instrumented, so the sanitizers must be loaded before it; but not before the
# compiler that it calls, which would take twice as long. Python and torch keep memory until the
# end, which is no leak of ours. Nothing is captured: a report must be seen.
libraries=$(for name in asan ubsan stdc++; do c++ -print-file-name=lib$name.so; done)
printf '#!/bin/sh\nunset LD_PRELOAD\nexec c++ "$@"\n' > c++
chmod +x c++
export CXX=$work/c++
export RNN_ATTACKS=${RNN_ATTACKS:-200}  # of each operator
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-halt_on_error=1}
LD_PRELOAD="${libraries//$'\n'/ }" python -m pytest -q --capture=no --durations=10 -m "not slow" \
  tests/stress/test_attack.py tests/test_fused.py tests/test_fused_torch.py \
  tests/test_fused_build.py tests/test_layers.py \
  -k "${*:-(fused or attack) and not without_its_tools and not no_memory and not does_not_load and not compile and not environment and not is_named}"
