# Sourced by run.sh and test.sh: makes .venv and installs requirements.txt once, again only after a change of either.
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
  echo "error: $PYTHON is $("$PYTHON" --version 2>&1 || true); Python 3.10 to 3.13 is needed: PYTHON=/path/to/python3.12 $0" >&2
  exit 1
fi
stamp="$("$PYTHON" --version 2>&1) $(cksum <requirements.txt)"
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$stamp" ]; then
  echo "installing requirements.txt into .venv (once, some minutes) ..."
  rm -rf .venv
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  # torch first: an installed torch keeps the other packages from choosing one of their own.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$stamp" >.venv/installed
fi
