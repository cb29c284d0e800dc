#!/usr/bin/env bash
#
# inotify_simple 2.0.1, Python 3.11: the first INotify() of a process starts /sbin/ldconfig, and waits for it.
#
# Guess: a thin wrapper of three system calls makes these system calls.
# Seen: it looks for the C library by ctypes.util.find_library("c"), which forks and runs `ldconfig -p`, or where there is none
# gcc and ld, at the first INotify(), not at the import.  So a daemon that forbids execve by then (seccomp), that has no room for
# another process, or that minds SIGCHLD, meets it in a place where nobody expects a child; and an INotify() takes milliseconds.
# Making one before giving up privileges, or ctypes.CDLL(None), does without.

set -euo pipefail
command -v strace >/dev/null || { echo "needs strace"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install inotify_simple==2.0.1
cat >"$work/watch.py" <<'PYTHON'
import os

import inotify_simple

os.path.exists("/imported")  # marks in the trace
inotify_simple.INotify().close()
os.path.exists("/first")
inotify_simple.INotify().close()
PYTHON
strace -f -qq -e trace=execve,stat,newfstatat,inotify_init1 -o "$work/trace" "$work/venv/bin/python" "$work/watch.py"
# What was run, between these marks.
sed -n 's/.*"\/imported".*/imported/p; s/.*"\/first".*/first/p; s/.*execve("\([^"]*\)".*= 0$/run \1/p' "$work/trace" >"$work/seen"
python3 -V
paste -sd ' ' "$work/seen"
before=$(sed '/^imported/q' "$work/seen" | grep -c '^run') || true
between=$(sed -n '/^imported/,/^first/p' "$work/seen" | grep -c '^run') || true
after=$(sed -n '/^first/,$p' "$work/seen" | grep -c '^run') || true
echo "programs run: $((before - 1)) by the import, $between by the first INotify(), $after by the second"
[ "$before" = 1 ] && [ "$between" -ge 1 ] && [ "$after" = 0 ]
