-- What the gateway was asked on a day, or is known to have done, in the order of its instants. `reference` is null where
-- a lookup tells it.
--
-- No index has these instants, but for what is still PROCESSING: the tables are read once. It is done in tests and
-- demonstrations alone, and an index would cost every payment.
SELECT o.*, p.transaction_id, p.payment_method, p.authorization_code
FROM (
    SELECT 1 AS source, captured_at AS at, payment_id AS id, 'charge' AS type, NULL AS reference,
           payment_id, attempt, NULL::bigint AS refund_id, amount, currency
    FROM payments
    WHERE captured_at >= %(day_begin)s::timestamptz AND captured_at < %(day_end)s::timestamptz

    UNION ALL
    SELECT 2, updated_at, payment_id, 'charge', NULL, payment_id, attempt, NULL, amount, currency
    FROM payments
    WHERE status = 'PROCESSING'
      AND updated_at >= %(day_begin)s::timestamptz AND updated_at < %(day_end)s::timestamptz

    -- A payment that was never captured is refunded without the gateway.
    UNION ALL
    SELECT 3, f.completed_at, f.refund_id, 'refund', NULL,
           f.payment_id, p.attempt, f.refund_id, f.amount, p.currency
    FROM refunds f
    JOIN payments p USING (payment_id)
    WHERE f.status = 'COMPLETED' AND f.gateway_reference IS NOT NULL AND p.captured_at IS NOT NULL
      AND f.completed_at >= %(day_begin)s::timestamptz AND f.completed_at < %(day_end)s::timestamptz

    UNION ALL
    SELECT 4, f.created_at, f.refund_id, 'refund', NULL,
           f.payment_id, p.attempt, f.refund_id, f.amount, p.currency
    FROM refunds f
    JOIN payments p USING (payment_id)
    WHERE f.status = 'PROCESSING' AND p.captured_at IS NOT NULL
      AND f.created_at >= %(day_begin)s::timestamptz AND f.created_at < %(day_end)s::timestamptz

    -- Money taken late, unless it was booked after all.
    UNION ALL
    SELECT 5, coalesce(r.looked_at, r.found_at), r.recovery_id, 'charge', r.late_reference,
           r.payment_id, r.attempt, NULL, r.amount, r.currency
    FROM recoveries r
    JOIN payments p USING (payment_id)
    WHERE r.state IN ('LATE', 'DONE') AND r.late_reference IS NOT NULL AND r.refund_id IS NULL
      AND NOT (p.attempt = r.attempt AND (p.captured_at IS NOT NULL OR p.status = 'PROCESSING'))
      AND coalesce(r.looked_at, r.found_at) >= %(day_begin)s::timestamptz
      AND coalesce(r.looked_at, r.found_at) < %(day_end)s::timestamptz

    UNION ALL
    SELECT 6, r.ended_at, r.recovery_id, 'refund', r.returned_reference,
           r.payment_id, r.attempt, NULL, r.amount, r.currency
    FROM recoveries r
    WHERE r.returned_reference IS NOT NULL
      AND r.ended_at >= %(day_begin)s::timestamptz AND r.ended_at < %(day_end)s::timestamptz
) o
JOIN payments p USING (payment_id)
ORDER BY o.at, o.source, o.id
