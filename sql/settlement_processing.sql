-- Lines that differ because our books have no outcome yet: what they say, to be compared with the gateway's own word.
SELECT f.payment_id, f.refund_id, f.gateway_reference, f.gateway_status,
       f.gateway_amount = f.our_amount AND f.gateway_currency = f.our_currency AS same_money
FROM settlement_findings f
WHERE f.class = 'status_differs' AND f.our_status = 'PROCESSING' AND f.line IS NOT NULL
LIMIT %(count_max)s::bigint
