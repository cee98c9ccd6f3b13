#!/usr/bin/env bash
# Refunds a part, then the rest; more than that is refused.
. "$(dirname "$0")/lib.sh"

request POST /v1/payments/charge "$(sample charge_payment.json)" "Idempotency-Key: $KEY"
check "the order is charged" 201 "$STATUS"
PAYMENT_ID="$(field payment_id)"

REFUND="$(cat "$SAMPLES/refund_payment.json")"
request POST "/v1/payments/$PAYMENT_ID/refund" "$REFUND" "Idempotency-Key: $KEY-refund"
check "a part is refunded" "200 COMPLETED" "$STATUS $(field status)"
request POST "/v1/payments/$PAYMENT_ID/refund" "$REFUND" "Idempotency-Key: $KEY-refund"
check "the same key refunds nothing more" 499.0 "$(field refunded_amount)"

request POST "/v1/payments/$PAYMENT_ID/refund" '{"amount": 1000.01, "reason": "Too much"}'
check "more than is left is refused" "409 refund-exceeds-balance" "$STATUS $(field code)"
request POST "/v1/payments/$PAYMENT_ID/refund" '{"reason": "The rest was returned"}'
check "the rest is refunded" "200 REFUNDED" "$STATUS $(field status)"
finish
