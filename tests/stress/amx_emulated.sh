#!/bin/sh
# Tests csrc/amx on a CPU without AMX (it must have AVX-512 BF16): builds the fused LSTM with the tile
# instructions in software, in a folder of its own, and runs the tests of the fused LSTM. Arguments
# are pytest's.
set -e
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
printf '#!/bin/sh\nexec c++ -D__AMX_BF16__ -include "%s" "$@"\n' "$here/amx_emulated.h" > "$folder/c++"
chmod +x "$folder/c++"
export CXX="$folder/c++" TORCH_EXTENSIONS_DIR="$folder"
python -m pytest -q -p no:cacheprovider "$here/../test_fused.py" "$@"
