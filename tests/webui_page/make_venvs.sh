#!/bin/sh
# Make .venvs/gradio3 and .venvs/gradio4, the two Gradio versions that the WebUIs run their page with, for tests/webui_page.
# Their pins need Python 3.10 or 3.11: the first of $PYTHON, python3.11, python3.10, python3 that is one is taken. No torch goes in.
set -eu
cd "$(dirname "$0")/../.."

for python in ${PYTHON:-} python3.11 python3.10 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 10), (3, 11)})' 2>/dev/null; then
        found=$python
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "make_venvs.sh: Gradio 3.41.2 needs Python 3.10 or 3.11, and there is none. Name one in PYTHON." >&2
    exit 1
fi

for version in 3 4; do
    venv=.venvs/gradio$version
    pins=tests/webui_page/requirements-gradio$version.txt
    if cmp -s "$pins" "$venv/made-from.txt"; then
        continue
    fi
    rm -rf "$venv"
    "$found" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$pins"
    cp "$pins" "$venv/made-from.txt"
done
