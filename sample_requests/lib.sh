# What the demos share: requests, and checks that print PASS or FAIL. Sourced, not run.
#
# ECI_PAY_URL names the server (http://127.0.0.1:8086). Orders get numbers of their own, so that a demo can be run
# again on the same database. Requests go through curl; nothing but curl, sed and grep is needed.

set -u
ECI_PAY_URL="${ECI_PAY_URL:-http://127.0.0.1:8086}"
SAMPLES="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
FAILED=0

ORDER_ID="$(date +%s)$((RANDOM % 9000 + 1000))"
KEY="sample-$ORDER_ID"

# sample FILE: the sample's body, for this run's order.
sample() {
    sed "s/\"order_id\": [0-9]*/\"order_id\": $ORDER_ID/" "$SAMPLES/$1"
}

# request METHOD PATH BODY [HEADER...]: sets STATUS; the body goes to $WORK/body, the headers to $WORK/headers.
request() {
    local method="$1" path="$2" body="$3"
    shift 3
    local options=(--silent --show-error --max-time 30 --request "$method" --output "$WORK/body"
                   --dump-header "$WORK/headers" --write-out '%{http_code}')
    [ -z "$body" ] || options+=(--header 'Content-Type: application/json' --data-binary "$body")
    local header
    for header in "$@"; do options+=(--header "$header"); done
    STATUS="$(curl "${options[@]}" "$ECI_PAY_URL$path")" || STATUS=000
}

# field NAME: the first member of that name in the answer.
field() {
    grep -o "\"$1\": *[^,}]*" "$WORK/body" | head -n 1 | sed 's/^[^:]*: *//; s/^"//; s/"$//'
}

# check SENTENCE WANTED FOUND
check() {
    if [ "$2" = "$3" ]; then
        echo "PASS  $1"
    else
        echo "FAIL  $1: wanted $2, found $3"
        FAILED=1
    fi
}

# finish: ends the demo with what its checks came to.
finish() {
    [ "$FAILED" = 0 ] && echo "PASS" || echo "FAIL"
    exit "$FAILED"
}
