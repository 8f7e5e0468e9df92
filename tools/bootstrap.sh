#!/usr/bin/env bash
# Prepares .venv in this checkout: finds a Python, installs the versions in constraints.txt and this package
# (editable). Once that is done a call changes nothing; an interrupted call is taken up where it stopped.
#
#   bash tools/bootstrap.sh                 prepare .venv
#   bash tools/bootstrap.sh --find-python   print the Python it would use, change nothing
#
# Read from the environment:
#   PYTHON           the Python to use (3.12 or 3.13)
#   TORCH_INDEX_URL  package index to take torch from; https://download.pytorch.org/whl/cpu has builds without CUDA
#   PIP_*, UV_*      as pip and uv define them (PIP_INDEX_URL, PIP_NO_CACHE_DIR, UV_PYTHON_INSTALL_MIRROR, ...)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
venv=$root/.venv
venv_python=$venv/bin/python
stamp=$venv/.megatron_solopo_ready
extras=test

# Measured on 2026-11-21 on x86-64 Linux, Python 3.12, in MiB.
download_all=2750 installed_all=5400
download_rest=165 installed_rest=850 # the same without torch, triton and the CUDA libraries

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}
gib() { printf '%d.%d GiB' $(($1 / 1024)) $(($1 % 1024 * 10 / 1024)); }

# ---------------------------------------------------------------------------------------------------------------
# Finding a Python. megatron-core has wheels for CPython 3.12 and 3.13 on Linux.

rejected=()  # one line for each Python that was looked at and cannot be used
apt_venv=""  # Debian package that would make a found Python usable

# usable_python EXE: true when EXE runs, has the right version and can make environments with pip.
usable_python() {
    local answer
    # A pyenv shim is on PATH whether or not its Python is: only running it tells.
    answer=$(timeout 30 "$1" -I -c '
import platform, sys
version = platform.python_version()
if platform.python_implementation() != "CPython":
    print("is", platform.python_implementation(), "instead of CPython")
elif not (3, 12) <= sys.version_info[:2] <= (3, 13):
    print("is Python", version)
else:
    try:
        import ensurepip, venv
        print("ok", version)
    except ImportError:
        print("is Python", version, "without the venv and ensurepip modules")
' 2>/dev/null) || answer="does not run"
    [[ $answer == ok\ * ]] && return 0
    [[ $answer == *ensurepip* ]] && apt_venv=$(sed -E 's/^is Python ([0-9]+\.[0-9]+).*/python\1-venv/' <<<"$answer")
    rejected+=("$1 ${answer:-does not run}")
    return 1
}

candidates() {
    local name directory
    for name in python3.12 python3.13 python3 python; do type -aP "$name" || true; done
    for directory in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin; do
        [[ -x $directory/python3 ]] && printf '%s\n' "$directory/python3"
    done
    if type -P uv >/dev/null; then uv python find '>=3.12,<3.14' 2>/dev/null || true; fi
}

# Without any usable Python: uv downloads one, when uv is there or a Python can make an environment for it.
python_from_uv() {
    local uv old helper
    uv=$(type -P uv) || uv=""
    if [[ -z $uv ]]; then
        old=$(type -P python3) && "$old" -I -c 'import ensurepip, venv' 2>/dev/null || return 1
        say "no Python 3.12 or 3.13 here; downloading uv (about 25 MB, from the package index) to get one" >&2
        helper=$root/.python/uv
        mkdir -p "$root/.python" && printf '*\n' >"$root/.python/.gitignore"
        "$old" -m venv --clear "$helper" >&2 && "$helper/bin/python" -m pip install -q uv >&2 || return 1
        uv=$helper/bin/uv
        # Nothing outside this checkout changes.
        export UV_PYTHON_INSTALL_DIR=$root/.python/versions
    fi
    say "downloading Python 3.12 with uv (about 35 MB)" >&2
    if ! "$uv" python install --no-bin 3.12 >&2; then
        say "uv could not download a Python; its message is above" >&2
        rm -rf "$root/.python"
        return 1
    fi
    "$uv" python find --managed-python 3.12
}

# Sets $python.
find_python() {
    local candidate seen=:
    if [[ -n ${PYTHON:-} ]]; then
        python=$(type -P "$PYTHON") || fail "PYTHON=$PYTHON: no such command; give the path of Python 3.12 or 3.13"
        usable_python "$python" ||
            fail "PYTHON=$PYTHON ${rejected[0]#* }; give the path of Python 3.12 or 3.13 with venv"
        return
    fi
    while IFS= read -r candidate; do
        [[ $seen == *":$candidate:"* ]] && continue
        seen+=$candidate:
        if usable_python "$candidate"; then python=$candidate && return; fi
    done < <(candidates)
    for candidate in "$root"/.python/versions/cpython-3.1[23]*/bin/python3; do
        if [[ -x $candidate ]] && usable_python "$candidate"; then python=$candidate && return; fi
    done
    if [[ $1 != look-only ]] && candidate=$(python_from_uv) && usable_python "$candidate"; then
        python=$candidate && return
    fi
    local ways=()
    if [[ -n $apt_venv ]]; then ways+=("apt install $apt_venv"); fi
    ways+=(
        "apt install python3 python3-venv     (Debian 13, Ubuntu 24.04 or later; Debian 12 has only 3.11)"
        "uv python install 3.12               (uv: https://docs.astral.sh/uv)"
        "pyenv install 3.12                   (pyenv: https://github.com/pyenv/pyenv)"
        "PYTHON=/path/to/python3.12 make ...  (a Python that is somewhere else)"
    )
    fail "no usable Python was found; megatron-core needs Python 3.12 or 3.13" "looked at:" \
        "${rejected[@]/#/  }" "do one of these, then run the same command again:" "${ways[@]/#/  }"
}

# ---------------------------------------------------------------------------------------------------------------
# The environment.

# A key of everything that decides what is installed: another key means there is something to do.
wanted_key() {
    { cat setup.py constraints.txt tools/bootstrap.sh && printf '%s\n' "$root" && "$venv_python" -I -VV; } |
        sha256sum | cut -d' ' -f1
}

venv_minor() { "$venv_python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Makes .venv, or mends one whose Python or pip is gone.
make_venv() {
    local minor
    if minor=$(venv_minor); then
        if [[ $minor != 3.12 && $minor != 3.13 ]]; then
            fail "$venv was made with Python $minor, and megatron-core needs 3.12 or 3.13" \
                "remove it (rm -r .venv), then run the same command again"
        fi
        say "  environment  $venv (there already, Python $minor; what is missing is added)"
    else
        find_python install
        minor=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        say "  Python       $("$python" -I -c 'import platform; print(platform.python_version())') ($python)"
        if [[ -d $venv/lib/python$minor ]]; then
            say "  environment  $venv (its Python was gone; linked again)"
            rm -f "$venv"/bin/python "$venv"/bin/python3*
        elif [[ -e $venv && -n $(ls -A "$venv") && ! -f $venv/pyvenv.cfg ]]; then
            fail "$venv exists and is no Python environment; move it away, then run the same command again"
        else
            say "  environment  $venv (new)"
        fi
        "$python" -m venv $([[ -d $venv/lib/python$minor ]] || printf -- --clear) "$venv" ||
            fail "$python could not make the environment $venv; the lines above say why"
    fi
    "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip --upgrade --default-pip >/dev/null ||
        fail "$venv has no pip and ensurepip failed; remove it (rm -r .venv), then run the same command again"
}

# A checkout that was moved or copied has scripts that start the Python of the old place.
mend_moved_scripts() {
    local old
    [[ -f $stamp ]] || return 0
    old=$(sed -n 2p "$stamp")
    if [[ -n $old && $old != "$root" ]]; then
        say "  moved        from $old; the scripts in .venv/bin are adapted"
        find "$venv/bin" -maxdepth 1 -type f -exec sed -i "1,2s|$old/.venv/|$venv/|" {} +
        "$venv_python" -m venv --without-pip "$venv" # writes the activate scripts anew
    fi
}

# pip writes RECORD last: a package without it was cut off half-way, yet counts as installed.
drop_half_installed() {
    local info package
    for info in "$venv"/lib/python3.*/site-packages/*.dist-info; do
        [[ -d $info && ! -f $info/RECORD ]] || continue
        package=$(basename "$info" .dist-info)
        say "  repair       $package was half installed; installing it again"
        rm -rf "$info"
    done
    rm -rf "$venv"/lib/python3.*/site-packages/~*
}

free_mib() { df -Pk "$1" | { read -r _ && read -r _ _ _ free _ && echo $((free / 1024)); }; }
file_system() { df -Pk "$1" | { read -r _ && read -r name _ && echo "$name"; }; }

# Says what will be downloaded, and stops when it does not fit. Sets $cache_option.
announce_download() {
    local download=$download_all installed=$installed_all have cache
    cache_option=()
    have=$("$venv_python" -I -c '
from importlib import metadata
print(metadata.version("torch").split("+")[0])' 2>/dev/null) || have=""
    if [[ $have == "$(sed -n 's/^torch==//p' constraints.txt)" ]]; then
        say "  download     only what is missing; torch $have is there"
        download=$download_rest installed=$installed_rest
        if "$venv_python" -I -c '
from importlib.metadata import version
version("megatron-core"), version("trl")' 2>/dev/null; then
            download=50 installed=100
        fi
    elif [[ -n ${TORCH_INDEX_URL:-} ]]; then
        # A build without CUDA has about these sizes; one with CUDA is found out by pip.
        download=$((download_rest + 200)) installed=$((installed_rest + 900))
        say "  download     $(gib "$download_rest") from the package index, and torch from $TORCH_INDEX_URL"
    elif [[ $(uname -m) == x86_64 ]]; then
        say "  download     $(gib "$download") from the package index, $(gib "$installed") on disk (mostly CUDA libraries)"
        say "               (without a GPU: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu takes a smaller torch)"
    else
        say "  download     up to $(gib "$download") from the package index, $(gib "$installed") on disk"
    fi

    # pip keeps the wheels in TMPDIR (here: inside .venv) until all are installed, and a copy in its cache.
    local need=$((download + installed)) free
    free=$(free_mib "$venv")
    if ((free < need)); then
        fail "$venv: $(gib "$free") free on this disk, $(gib "$need") needed ($(gib "$installed") of it to stay)" \
            "make room, or put the checkout on a larger disk, then run the same command again"
    fi
    cache=$("$venv_python" -m pip cache dir 2>/dev/null) || cache=""
    while [[ -n $cache && ! -d $cache ]]; do cache=$(dirname "$cache"); done
    if [[ -n $cache ]]; then
        if [[ $(file_system "$cache") == "$(file_system "$venv")" ]]; then
            need=$((need + download))
        else
            free=$(free_mib "$cache") need=$download
        fi
        if ((free < need)); then
            say "  cache        not kept: $(gib "$free") free, $(gib "$need") needed to keep pip's downloads in $cache"
            cache_option=(--no-cache-dir)
        fi
    fi
}

pip_install() {
    "$venv_python" -m pip install --disable-pip-version-check -c constraints.txt \
        ${cache_option[@]+"${cache_option[@]}"} "$@"
}

install_packages() {
    local again="run the same command again: it goes on from here"
    # Settings that would make pip look or install somewhere else than .venv.
    unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
    # Warnings of the build are for us, not for who installs.
    export PIP_USER=0 TMPDIR=$venv/.tmp PYTHONWARNINGS=ignore
    rm -rf "$TMPDIR" && mkdir -p "$TMPDIR"
    pip_install -q pip setuptools ||
        fail "pip could not be brought up to date; is the package index reachable? (pip's message is above)" "$again"
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        pip_install --no-deps --index-url "$TORCH_INDEX_URL" torch ||
            fail "torch could not be installed from $TORCH_INDEX_URL (pip's message is above)" "$again"
    fi
    # setuptools is there in its pinned version, so the build needs no download of its own.
    pip_install --no-build-isolation -e ".[$extras]" ||
        fail "the packages could not be installed (pip's message is above)" "$again"
    rm -rf "$TMPDIR"
    say "  checking     torch, megatron-core and transformers can be imported"
    local message
    message=$("$venv_python" -c 'import torch, megatron.core, transformers' 2>&1) ||
        fail "an installed package does not work: $(tail -n 1 <<<"$message")" \
            "remove .venv (rm -r .venv), then run the same command again"
}

# ---------------------------------------------------------------------------------------------------------------

if [[ ${1:-} == --find-python ]]; then
    find_python look-only
    say "$python"
    exit 0
elif (($#)); then
    fail "tools/bootstrap.sh: unknown argument '$1' (the only one is --find-python)"
fi

if [[ -f $stamp && $(head -n 1 "$stamp") == "$(wanted_key 2>/dev/null)" ]]; then exit 0; fi

case $(uname -s)/$(uname -m) in
Linux/x86_64 | Linux/aarch64) ;;
*) fail "$(uname -s) on $(uname -m): megatron-core has wheels for Linux on x86-64 and aarch64 only" ;;
esac

# Two calls at a time (make -j) would install over each other. The lock goes with the process.
exec 9<tools/bootstrap.sh
if type -P flock >/dev/null && ! flock -n 9; then
    say "another set-up of this checkout is running; waiting for it"
    flock 9 || true
fi
if [[ -f $stamp && $(head -n 1 "$stamp") == "$(wanted_key 2>/dev/null)" ]]; then exit 0; fi

# Adapting another checkout's environment to this one would break it there.
[[ -L $venv ]] && fail "$venv is a link to $(readlink "$venv"); remove it (rm .venv), then run the same command again"

say "setting up megatron_solopo (once)"
make_venv
mend_moved_scripts
rm -f "$stamp"
drop_half_installed
announce_download
install_packages
printf '%s\n%s\n' "$(wanted_key)" "$root" >"$stamp.partial"
mv "$stamp.partial" "$stamp"
say "ready: .venv/bin/solopo --help"
