#!/usr/bin/env bash
# Makes .venv in the checkout with the pinned versions of constraints.txt. A second run takes a second.
#
#   bash scripts/setup.sh                 everything (all extras)
#   EXTRAS=mllm bash scripts/setup.sh     some of them: mllm, eval, quant, demo, open_clip, dev
#   PYTHON=python3.12 bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

EXTRAS=${EXTRAS:-all}
PYTHON=${PYTHON:-python3}

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.11 or newer (Debian: apt-get install python3 python3-venv python3-dev)"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$PYTHON" --version) is too old; Python 3.11 or newer is needed"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module (Debian: apt-get install python3-venv)"
# DeepSpeed compiles its shared-memory communication op for CPU ranks at first use.
for tool in gcc g++; do
    command -v "$tool" >/dev/null || fail "$tool not found; DeepSpeed compiles an extension with it (Debian: apt-get install gcc g++)"
done

# The stamp holds what an installation depends on; where it is unchanged there is nothing to do.
stamp=.venv/.vision-moe-installed
wanted=$(printf '%s\n' "$EXTRAS" "$("$PYTHON" --version)" "$PWD" | cat - pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
echo "setup: installing vision-moe[$EXTRAS] into .venv (several GB and some minutes the first time)"
.venv/bin/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
.venv/bin/python -m pip install --progress-bar off --quiet -c constraints.txt -e ".[$EXTRAS]"
case $EXTRAS in *all* | *dev*)
    # The golden tests of LLaVA's labels read a Llama tokenizer out of this wheel. Not installed: it would hold numpy back.
    .venv/bin/python -m pip download --progress-bar off --quiet --no-deps -d .venv/share mistral-common==1.13.1
    .venv/bin/python -m zipfile -e .venv/share/mistral_common-1.13.1-*.whl .venv/share/mistral_common
esac
printf '%s\n' "$wanted" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
echo "setup: done"
