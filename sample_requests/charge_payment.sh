#!/usr/bin/env bash
# Charges the sample order and reads it back.
. "$(dirname "$0")/lib.sh"

request POST /v1/payments/charge "$(sample charge_payment.json)" "Idempotency-Key: $KEY"
check "the charge is answered with 201" 201 "$STATUS"
check "the payment is completed" COMPLETED "$(field status)"
PAYMENT_ID="$(field payment_id)"

request GET "/v1/payments/$PAYMENT_ID" ""
check "the payment can be read by its id" 200 "$STATUS"
request GET "/v1/payments/order/$ORDER_ID" ""
check "the payment can be read by its order" "$PAYMENT_ID" "$(field payment_id)"
finish
