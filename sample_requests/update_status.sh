#!/usr/bin/env bash
# Records a payment without a gateway and completes it by hand; a completed one cannot be cancelled.
. "$(dirname "$0")/lib.sh"

request POST /v1/payments "$(sample create_payment.json)"
check "the payment is recorded" "201 PENDING" "$STATUS $(field status)"
PAYMENT_ID="$(field payment_id)"

request PATCH "/v1/payments/$PAYMENT_ID/status" "$(cat "$SAMPLES/update_status.json")"
check "it is completed by hand" "200 COMPLETED" "$STATUS $(field status)"
request DELETE "/v1/payments/$PAYMENT_ID" ""
check "it cannot be cancelled any more" "409 invalid-state" "$STATUS $(field code)"
finish
