#!/usr/bin/env bash
# Sends one charge three times with one key: it is charged once, and answered alike each time.
. "$(dirname "$0")/lib.sh"

request POST /v1/payments/charge "$(sample charge_payment.json)" "Idempotency-Key: $KEY"
check "the first charge is answered with 201" 201 "$STATUS"
cp "$WORK/body" "$WORK/first"

for again in second third; do
    request POST /v1/payments/charge "$(sample charge_payment.json)" "Idempotency-Key: $KEY"
    check "the $again is answered with 201" 201 "$STATUS"
    check "the $again answer has the same bytes" same "$(cmp -s "$WORK/first" "$WORK/body" && echo same || echo other)"
    check "the $again answer says that it is a replay" 1 "$(grep -ci '^idempotent-replayed: true' "$WORK/headers")"
done

request POST /v1/payments/charge "$(sample charge_payment.json | sed 's/1499.00/1.00/')" "Idempotency-Key: $KEY"
check "another amount under the same key is refused" "422 idempotency-key-reused" "$STATUS $(field code)"

request POST /v1/payments/charge "$(sample charge_payment.json)" "Idempotency-Key: $KEY-other"
check "another key for the paid order is refused" "409 order-already-paid" "$STATUS $(field code)"
finish
