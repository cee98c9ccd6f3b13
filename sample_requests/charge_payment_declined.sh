#!/usr/bin/env bash
# A card is declined, the decline is replayed, and another card pays the same order.
. "$(dirname "$0")/lib.sh"

BODY="$(sample charge_payment.json | sed 's/1499.00/4000.03/')"
request POST /v1/payments/charge "$BODY" "Idempotency-Key: $KEY"
check "the charge is declined" "402 payment-declined" "$STATUS $(field code)"
check "the decline has its reason" insufficient_funds "$(field decline_code)"
cp "$WORK/body" "$WORK/first"
PAYMENT_ID="$(field payment_id)"

request POST /v1/payments/charge "$BODY" "Idempotency-Key: $KEY"
check "the same key replays the decline" same "$(cmp -s "$WORK/first" "$WORK/body" && echo same || echo other)"

request POST /v1/payments/charge "$(echo "$BODY" | sed 's/CREDIT_CARD/DEBIT_CARD/')" "Idempotency-Key: $KEY-again"
check "another card pays the order" "201 COMPLETED" "$STATUS $(field status)"
check "in the same payment" "$PAYMENT_ID" "$(field payment_id)"
finish
