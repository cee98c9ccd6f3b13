-- Finds what our books hold and no file: of the period, and what earlier runs have left open. What was booked after the
-- cut-off may be in a later file.
WITH ours AS (
    SELECT 'P' || p.payment_id AS operation_key, 'charge' AS operation, p.payment_id, p.order_id,
           NULL::bigint AS refund_id, NULL::bigint AS recovery_id, p.transaction_id, p.authorization_code AS reference,
           p.amount, p.currency, p.status::text AS status, p.captured_at AS booked_at
    FROM payments p
    WHERE p.captured_at >= %(period_from)s::timestamptz AND p.captured_at < %(period_to)s::timestamptz
    UNION ALL
    SELECT 'R' || f.refund_id, 'refund', p.payment_id, p.order_id, f.refund_id, NULL, p.transaction_id,
           f.gateway_reference, f.amount, p.currency, f.status, f.completed_at
    FROM refunds f
    JOIN payments p USING (payment_id)
    WHERE f.completed_at >= %(period_from)s::timestamptz AND f.completed_at < %(period_to)s::timestamptz
      AND f.status = 'COMPLETED' AND p.captured_at IS NOT NULL
    UNION ALL
    SELECT 'L' || r.recovery_id, 'refund', p.payment_id, p.order_id, NULL, r.recovery_id, p.transaction_id,
           r.returned_reference, r.amount, r.currency, 'returned', r.ended_at
    FROM recoveries r
    JOIN payments p USING (payment_id)
    WHERE r.returned_reference IS NOT NULL
      AND r.ended_at >= %(period_from)s::timestamptz AND r.ended_at < %(period_to)s::timestamptz
    UNION ALL
    SELECT a.operation_key, CASE WHEN a.operation_key LIKE 'P%%' THEN 'charge' ELSE 'refund' END, p.payment_id, p.order_id,
           a.refund_id, a.recovery_id, p.transaction_id,
           coalesce(f.gateway_reference, r.returned_reference, p.authorization_code),
           coalesce(f.amount, r.amount, p.amount), p.currency, coalesce(f.status, p.status), a.booked_at
    FROM settlements_awaited a
    JOIN payments p USING (payment_id)
    LEFT JOIN refunds f ON f.refund_id = a.refund_id
    LEFT JOIN recoveries r ON r.recovery_id = a.recovery_id
    WHERE a.settled_run_id IS NULL AND a.closed_at IS NULL
      AND a.booked_at < %(period_from)s::timestamptz
)
INSERT INTO settlement_findings
SELECT CASE
           WHEN o.booked_at > %(cut_off)s::timestamptz THEN 'pending'
           WHEN o.operation = 'charge' THEN 'missing_at_gateway'
           ELSE 'refund_missing_at_gateway'
       END,
       o.operation, NULL, o.payment_id, o.order_id, o.refund_id, o.recovery_id, o.transaction_id, NULL, o.reference, NULL,
       o.amount, NULL, o.currency, NULL, o.status, o.operation_key, o.booked_at, o.booked_at,
       CASE
           WHEN o.booked_at > %(cut_off)s::timestamptz
           THEN 'booked after what the file can have: the next one may settle it'
           WHEN o.booked_at < %(period_from)s::timestamptz
           THEN 'no file has had a line of it, nor that of the day after'
           ELSE 'the file has no line of it'
       END
FROM ours o
LEFT JOIN settlement_findings f ON f.operation_key = o.operation_key
LEFT JOIN settlements_awaited known
    ON known.operation_key = o.operation_key AND (known.settled_run_id IS NOT NULL OR known.closed_at IS NOT NULL)
WHERE f.operation_key IS NULL AND known.operation_key IS NULL
