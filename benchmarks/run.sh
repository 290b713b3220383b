#!/usr/bin/env bash
# All benchmarks for a machine without a GPU, one after the other, 16 to 40 minutes on two cores: bash benchmarks/run.sh [FOLDER for JSON]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/grpo_launcher/launch/environment.sh"
cd "$here"
results=${1:-benchmarks/results}
mkdir -p "$results"
run() {
    echo "== $*"
    "$PYTHON" "benchmarks/$1.py" "${@:2}"
}
run overlap --output "$results/overlap.json"
run overlap --quickstart --output "$results/overlap-quickstart.json"
run sync --output "$results/sync.json"
run scale --output "$results/scale.json"
run overhead --pairs 2 --output "$results/overhead.json"
run overhead --server --pairs 1 --output "$results/overhead-server.json"
run process_dataset --rows 20000 --output "$results/process_dataset.json"
run rewards
