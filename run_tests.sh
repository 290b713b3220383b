#!/usr/bin/env bash
# Lint, format and tests: bash run_tests.sh [--no-install] [pytest option ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*)
    echo 'bash run_tests.sh [--no-install] [pytest option ...]   lint, format and all tests'
    echo '  -m "not slow"   the quick loop: no servers, no training ranks'
    echo '  -k WORD         tests whose name holds WORD'
    echo 'TEST_DATA names a folder of real rows and models (default: ../shared/data). Tests that need it skip without.'
    exit 0 ;;
esac
source "$here/grpo_launcher/launch/environment.sh"
cd "$here"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
for word in "$@"; do shift; [ "$word" = --no-install ] || set -- "$@" "$word"; done
exec "$PYTHON" -m pytest "$@"
