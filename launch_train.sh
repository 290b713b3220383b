#!/usr/bin/env bash
# Train a recipe: bash launch_train.sh [CONFIG] [option …] [--key value …]; --help tells all.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if early=$(command -v python3.11 || command -v python3); then
    "$early" "$here/grpo_launcher/launch/arguments.py" "$@"
    case " $* " in *" --help "* | *" -h "*) exit 0 ;; esac
fi
source "$here/grpo_launcher/launch/environment.sh"
exec "$PYTHON" -P -m grpo_launcher.launch "$@"
