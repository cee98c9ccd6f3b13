-- Refunds that failed by our books and are settled by the gateway's file.
SELECT f.gateway_reference, p.payment_id, p.attempt, r.refund_id, r.amount, p.currency, p.payment_method,
       r.created_at AS begun_at, p.transaction_id, coalesce(p.authorization_code, '') AS charge_reference,
       0::double precision AS age_seconds
FROM settlement_findings f
JOIN refunds r USING (refund_id)
JOIN payments p ON p.payment_id = r.payment_id
WHERE f.class = 'status_differs' AND f.operation = 'refund' AND f.gateway_status = 'settled' AND r.status = 'FAILED'
  AND p.captured_at IS NOT NULL AND p.currency = f.gateway_currency AND r.amount = f.gateway_amount
ORDER BY f.line
LIMIT %(count_max)s::bigint
