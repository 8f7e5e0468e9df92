#!/usr/bin/env bash
# Prepares .venv in this checkout with the versions of uv.lock: by `uv sync` where uv is, else by venv and pip (which read
# constraints.txt, exported from it). A call changes nothing once that is done.
#
#   PYTHON           the Python to use (3.12 or 3.13)
#   TORCH_INDEX_URL  package index to take torch from; https://download.pytorch.org/whl/cpu has builds without CUDA
#   PIP_*, UV_*      as pip and uv define them; UV=no: pip although uv is there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
stamp=.venv/.megatron_solopo_ready # its key, or "unfinished" while packages are installed; the checkout's path
again="run the same command again"

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}
key() { { cat pyproject.toml uv.lock constraints.txt tools/bootstrap.sh && .venv/bin/python -I -VV; } | sha256sum; }
ready() { [[ -f $stamp && $(<"$stamp") == "$(key 2>/dev/null)"$'\n'"$root" ]]; }

# Prints "3.12.1", or why the Python cannot be used; a shim on PATH need not run.
version_of() {
    timeout 30 "$1" -I -c '
import platform, sys
version = platform.python_version()
if platform.python_implementation() != "CPython" or not (3, 12) <= sys.version_info[:2] <= (3, 13):
    sys.exit(print("is", platform.python_implementation(), version))
try:
    import ensurepip, venv
except ImportError:
    sys.exit(print("is Python", version, "without the venv and ensurepip modules (apt install python3-venv)"))
print(version)' 2>/dev/null || echo "does not run"
}
usable() { [[ $1 == [0-9]* ]]; }

# Sets $python, or $uv where an older Python can install uv, which downloads a Python.
find_python() {
    local candidate version older="" looked_at=()
    while read -r candidate; do
        version=$(version_of "$candidate")
        if usable "$version"; then python=$candidate && return; fi
        looked_at+=("  $candidate $version")
        [[ $version != "is CPython"* ]] || older=$candidate
        [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON: $candidate $version; set the path of Python 3.12 or 3.13 with venv"
    done < <(
        if [[ -n ${PYTHON:-} ]]; then type -P "$PYTHON" || echo "$PYTHON"; exit; fi
        for candidate in python3.12 python3.13 python3 python; do type -aP "$candidate" || true; done
        compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.1[23]*/bin/python3" || true
    )
    if [[ -n $older && $1 == install ]]; then
        echo "no Python 3.12 or 3.13 here; downloading uv (25 MB) and with it a Python (35 MB) into .python"
        export UV_PYTHON_INSTALL_DIR=$root/.python/versions
        "$older" -m venv .python && .python/bin/python -m pip install -q uv && uv=$root/.python/bin/uv && return
    fi
    fail "no usable Python was found; megatron-core needs Python 3.12 or 3.13" "looked at:" "${looked_at[@]}" \
        "do one of these, then $again:" \
        "  apt install python3 python3-venv     (Debian 13, Ubuntu 24.04 or later; Debian 12 has only 3.11)" \
        "  install uv, which brings one         (https://docs.astral.sh/uv)" \
        "  pyenv install 3.12                   (https://github.com/pyenv/pyenv)" \
        "  PYTHON=/path/to/python3.12 make ...  (a Python that is somewhere else)"
}

if [[ ${1:-} == --find-python ]]; then find_python look && echo "$python" && exit; fi
if ready; then exit; fi
case $(uname -sm) in
"Linux x86_64" | "Linux aarch64") ;;
*) fail "$(uname -sm): megatron-core has wheels for Linux on x86-64 and aarch64 only" ;;
esac
[[ ! -L .venv ]] || fail ".venv is a link to $(readlink .venv); remove it (rm .venv), then $again"
exec 9<tools/bootstrap.sh # one set-up at a time (make -j); the lock goes with the process
flock 9 2>/dev/null || true
if ready; then exit; fi

uv=$(type -P uv) || uv=""
[[ ${UV:-} != no ]] || uv=""
# An environment's scripts contain its path, so that of a moved checkout is created again; pip and uv keep their downloads.
if [[ -f $stamp && $(tail -n 1 "$stamp") != "$root" ]]; then
    echo "creating .venv again: it was created in $(tail -n 1 "$stamp")"
    rm -rf .venv
fi
# RECORD is written last: a package without it was cut off half-way, yet counts as installed.
for info in .venv/lib/python3.*/site-packages/*.dist-info; do
    [[ -d $info && ! -f $info/RECORD ]] || continue
    echo "${info##*/} was half installed; installing it again"
    rm -rf "$info"
done
if [[ -e .venv/bin/python ]]; then
    version=$(version_of .venv/bin/python)
    usable "$version" || fail ".venv: its Python $version, and megatron-core needs 3.12 or 3.13" \
        "remove it (rm -r .venv), then $again"
elif [[ -e .venv ]]; then
    fail ".venv has no Python; remove it (rm -r .venv), then $again"
elif [[ -z $uv ]]; then
    find_python install
fi
free=$(df -Pk . | { read -r _ && read -r _ _ _ free _ && echo $((free >> 20)); })
if [[ ! -e .venv ]]; then # measured on 2026-11-21 on x86-64 Linux, Python 3.12
    echo "setting up megatron_solopo (once) in $root/.venv: 2.7 GiB to download, 5.3 GiB on disk, mostly CUDA libraries"
    echo "(without a GPU: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu takes a torch of 0.2 GiB)"
    ((free >= 8)) || [[ -n ${TORCH_INDEX_URL:-} ]] || fail "$root: $free GiB free on this disk, 8 GiB needed"
fi
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX UV_PROJECT_ENVIRONMENT
if [[ -n $uv && ! -e .venv ]]; then
    "$uv" venv --quiet --seed --python "${PYTHON:->=3.12,<3.14}" .venv || fail "uv could not make .venv (see above)"
elif [[ ! -e .venv ]]; then
    "$python" -m venv .venv || fail "$python could not create .venv; the lines above have the reason"
fi
printf 'unfinished\n%s\n' "$root" >"$stamp"
if [[ -n $uv && -z ${TORCH_INDEX_URL:-} ]]; then
    "$uv" sync --frozen --extra test --inexact ||
        fail "uv could not install the packages (its message is above)" "$again, or UV=no make setup to use pip"
else
    export PIP_USER=0 PYTHONWARNINGS=ignore TMPDIR=$root/.venv
    install() {
        .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$@" ||
            fail "${*: -1} could not be installed (pip's message is above); $again"
    }
    install -q setuptools pip
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then install --no-deps --index-url "$TORCH_INDEX_URL" torch; fi
    install --no-build-isolation -e '.[test]'
fi
message=$(.venv/bin/python -c 'import torch, megatron.core, transformers' 2>&1) ||
    fail "an installed package does not work: $(tail -n 1 <<<"$message")" "remove .venv (rm -r .venv), then $again"
printf '%s\n%s\n' "$(key)" "$root" >"$stamp"
echo "ready: .venv/bin/solopo --help"
