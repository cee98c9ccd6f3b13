#!/usr/bin/env bash
# Starts `eci-pay serve` on a free port, runs the demos that are named against it, and stops it.
# Usage: through_server.sh DEMO.sh...   The server uses DATABASE_URL, or the embedded PostgreSQL.
set -u
HERE="$(cd "$(dirname "$0")" && pwd)"
LOG="$(mktemp)"
START_TIMEOUT_SECONDS=60

LOG_LEVEL=INFO eci-pay serve --port 0 2>"$LOG" &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null; wait "$SERVER" 2>/dev/null; rm -f "$LOG"' EXIT

ECI_PAY_URL=""
for _ in $(seq $((START_TIMEOUT_SECONDS * 10))); do
    ECI_PAY_URL="$(grep -o 'http://127.0.0.1:[0-9]*' "$LOG" | head -n 1)"
    [ -z "$ECI_PAY_URL" ] || break
    kill -0 "$SERVER" 2>/dev/null || break
    sleep 0.1
done
if [ -z "$ECI_PAY_URL" ]; then
    echo "FAIL  the server did not start:"
    cat "$LOG"
    exit 1
fi

export ECI_PAY_URL
RESULT=0
for demo in "$@"; do
    echo "== $demo against $ECI_PAY_URL"
    "$HERE/$demo" || RESULT=1
done
exit "$RESULT"
