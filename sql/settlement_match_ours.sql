-- Finds what our books hold of the period and the file does not: charges and refunds, and what earlier runs left to
-- this one because it was booked shortly before the end of theirs.
WITH ours AS (
    SELECT 'charge' AS operation, p.payment_id, p.order_id, NULL::bigint AS refund_id, p.transaction_id,
           p.authorization_code AS reference, p.amount, p.currency, p.status, p.captured_at AS booked_at
    FROM payments p
    WHERE p.captured_at >= %(period_from)s::timestamptz AND p.captured_at < %(period_to)s::timestamptz
    UNION ALL
    SELECT 'refund', p.payment_id, p.order_id, f.refund_id, p.transaction_id, f.gateway_reference, f.amount, p.currency,
           f.status, f.completed_at
    FROM refunds f
    JOIN payments p USING (payment_id)
    WHERE f.completed_at >= %(period_from)s::timestamptz AND f.completed_at < %(period_to)s::timestamptz
      AND f.status = 'COMPLETED' AND p.captured_at IS NOT NULL
    UNION ALL
    SELECT 'charge', p.payment_id, p.order_id, NULL, p.transaction_id, p.authorization_code, p.amount, p.currency,
           p.status, a.booked_at
    FROM settlements_awaited a
    JOIN payments p USING (payment_id)
    WHERE a.ended_run_id IS NULL AND a.refund_id IS NULL
      AND a.booked_at < %(period_from)s::timestamptz
    UNION ALL
    SELECT 'refund', p.payment_id, p.order_id, f.refund_id, p.transaction_id, f.gateway_reference, f.amount, p.currency,
           f.status, a.booked_at
    FROM settlements_awaited a
    JOIN payments p USING (payment_id)
    JOIN refunds f USING (refund_id)
    WHERE a.ended_run_id IS NULL
      AND a.booked_at < %(period_from)s::timestamptz
)
INSERT INTO settlement_findings
SELECT CASE
           WHEN o.booked_at >= %(awaited_from)s::timestamptz THEN 'pending'
           WHEN o.operation = 'charge' THEN 'missing_at_gateway'
           ELSE 'refund_missing_at_gateway'
       END,
       o.operation, NULL, o.payment_id, o.order_id, o.refund_id, o.transaction_id, NULL, o.reference, NULL, o.amount,
       NULL, o.currency, NULL, o.status, true, o.booked_at,
       CASE
           WHEN o.booked_at >= %(awaited_from)s::timestamptz
           THEN 'booked shortly before the end of the period: the next file may settle it'
           ELSE 'the file has no line of it'
       END
FROM ours o
LEFT JOIN settlement_findings f
    ON f.payment_id = o.payment_id AND f.operation = o.operation AND f.our_money
   AND f.refund_id IS NOT DISTINCT FROM o.refund_id AND f.our_reference IS NOT DISTINCT FROM o.reference
WHERE f.payment_id IS NULL
