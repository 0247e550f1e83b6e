#!/usr/bin/env bash
# Makes .venv ready for `make demo` (argument: demo) or `make test` (argument: test), or .venv-latest, with the newest
# torch, for `make test-latest` (argument: latest).
#
# Every step may be interrupted and run again: a stage counts as done only once its stamp, a hash of all
# that the stage was made from, is written at its end.
#   PYTHON      interpreter that .venv is made with (default python3.11)
#   VENV        where the environment is (default .venv; latest: .venv-latest)
#   SELFKD_CACHE  where compiled wheels are kept (default ~/.cache/selfkd)
set -euo pipefail
cd "$(dirname "$0")/.."

stage=${1:?usage: tools/setup.sh demo|test|latest}
PYTHON=${PYTHON:-python3.11}
[ "$stage" = latest ] && default=.venv-latest constraints=constraints-latest.txt || default=.venv constraints=constraints.txt
VENV=${VENV:-$default}
CACHE=${SELFKD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/selfkd}
REQ=requirements
py=$VENV/bin/python
say() { printf '[setup] %s\n' "$*"; }
version() { "$1" -c 'import sys, sysconfig; print(f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")'; }
pip_install() { "$py" -m pip install -qq --disable-pip-version-check -c $REQ/$constraints "$@"; }
installed() { "$py" -c "import importlib.metadata as m; m.version('$1')" 2>/dev/null; }
stamp_of() { { cat "$REQ/$constraints" pyproject.toml tools/setup.sh "$@"; pwd; version "$py"; } | sha256sum | cut -d' ' -f1; }
done_with() { [ -f "$VENV/.selfkd-$1" ] && [ "$(cat "$VENV/.selfkd-$1")" = "$2" ]; }

command -v "$PYTHON" >/dev/null || { say "there is no '$PYTHON' here: name a Python 3.11 with PYTHON=..."; exit 1; }
if [ -x "$py" ] && "$py" -m pip --version >/dev/null 2>&1; then
    [ "$(version "$py")" = "$(version "$PYTHON")" ] || {
        say "$VENV was made with $(version "$py"), PYTHON asks for $(version "$PYTHON"): remove $VENV or set VENV="; exit 1; }
else
    say "making $VENV with $PYTHON"
    "$PYTHON" -m venv --clear "$VENV"
fi

setup_demo() {
    local stamp; stamp=$(stamp_of $REQ/demo.txt)
    if done_with demo "$stamp"; then return; fi
    say "installing torch, mmengine, mmpretrain (about 2 minutes, 5 GB on disk)"
    pip_install -r $REQ/build.txt
    # mmcv and mmcv-lite fill the same package: never both. Where mmcv is there already it serves as well.
    if installed mmcv; then pip_install -r <(grep -v '^mmcv-lite' $REQ/demo.txt)
    else pip_install -r $REQ/demo.txt; fi
    # mmengine asks for opencv-python, whose wheel wants libGL from the system; the headless one does not.
    if ! "$py" -c 'import cv2' 2>/dev/null; then pip_install --force-reinstall --no-deps opencv-python-headless; fi
    pip_install --no-deps --no-build-isolation -e .
    echo "$stamp" > "$VENV/.selfkd-demo"
}

# compiled NAME==VERSION MINUTES: prints the folder with its wheel, which it makes if it is not in the cache.
compiled() {
    local torch key dir tmp
    torch=$("$py" -c 'import torch; print(torch.__version__)')
    # pip's own cache keeps no note of the torch (or numpy) a wheel was compiled for, so ours does.
    key=${1/==/-}-torch${torch%%+*}-$(version "$py")
    dir=$CACHE/wheels/$key
    if ! ls "$dir"/*.whl >/dev/null 2>&1; then
        mkdir -p "$CACHE/wheels"
        tmp=$(mktemp -d "$CACHE/wheels/.making-XXXXXX")
        if [ "${1%%==*}" = mmcv ] && "$py" -m pip download -qq --no-deps --no-index --only-binary :all: --retries 0 \
            --timeout 10 -d "$tmp" -f "https://download.openmmlab.com/mmcv/dist/cpu/torch${torch%.*}/index.html" "$1" >/dev/null 2>&1
        then say "$1: OpenMMLab's own wheel" >&2
        else
            say "compiling $1 for torch $torch (about $2 minutes on 2 cores, kept in $dir)" >&2
            MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH="$PWD/$VENV/bin:$PATH" "$py" -m pip wheel -q \
                --disable-pip-version-check --no-deps --no-build-isolation --no-cache-dir -w "$tmp" "$1" > "$tmp/log" 2>&1 \
                || { say "compiling $1 failed; the last lines of $tmp/log:" >&2; tail -n 30 "$tmp/log" >&2; exit 1; }
        fi
        rm -rf "$dir"; mv "$tmp" "$dir"
    fi
    echo "$dir"
}

setup_test() {
    local stamp name dir; stamp=$(stamp_of $REQ/*.txt)
    if done_with test "$stamp"; then return; fi
    say "adding mmcv with its ops, mmdet, mmsegmentation, fairseq and the test tools (about 2 minutes, and once 9 more to compile)"
    rm -f "$VENV/.selfkd-demo"
    while read -r name minutes; do
        dir=$(compiled "$name" "$minutes")
        if [ "${name%%==*}" = mmcv ] && installed mmcv-lite; then "$py" -m pip uninstall --quiet -y mmcv-lite; fi
        pip_install "$dir"/*.whl
    done < <(sed -n 's/^\([a-z].*\)  *# *\([0-9]*\) minutes.*/\1 \2/p' $REQ/compiled.txt)
    pip_install -r $REQ/test.txt -r $REQ/lint.txt
    if ! "$py" -c 'import cv2' 2>/dev/null; then pip_install --force-reinstall --no-deps opencv-python-headless; fi
    "$py" -c 'import mmcv.ops, mmdet, mmseg, fairseq' 2>/dev/null || "$py" -c 'import mmcv.ops, mmdet, mmseg, fairseq'
    stamp_of $REQ/demo.txt > "$VENV/.selfkd-demo"
    echo "$stamp" > "$VENV/.selfkd-test"
}

setup_latest() {
    local stamp; stamp=$(stamp_of $REQ/latest.txt)
    if done_with latest "$stamp"; then return; fi
    say "installing today's torch, mmengine, mmpretrain, lightning, transformers (about 3 minutes, 6 GB on disk)"
    pip_install -r $REQ/latest.txt
    if ! "$py" -c 'import cv2' 2>/dev/null; then pip_install --force-reinstall --no-deps opencv-python-headless; fi
    pip_install setuptools wheel
    pip_install --no-deps --no-build-isolation -e .
    echo "$stamp" > "$VENV/.selfkd-latest"
}

case $stage in
    demo) setup_demo ;;
    test) setup_demo; setup_test ;;
    latest) setup_latest ;;
    *) say "unknown stage '$stage': demo, test or latest"; exit 1 ;;
esac
