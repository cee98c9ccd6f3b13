-- What does not add up in the books of some payments: their audit trail and their refunds tell something else.
WITH payment AS (
    SELECT payment_id, status, amount, refunded_amount, refund_pending
    FROM payments
    WHERE payment_id BETWEEN %(first_id)s::bigint AND %(last_id)s::bigint
      AND (%(changed_from)s::timestamptz IS NULL OR updated_at >= %(changed_from)s::timestamptz)
      AND (%(changed_to)s::timestamptz IS NULL OR updated_at < %(changed_to)s::timestamptz)
),
trail AS (
    SELECT payment_id,
           max(transaction_log_id) FILTER (WHERE transaction_type = 'PAYMENT') AS latest_id,
           count(*) FILTER (WHERE transaction_type = 'PAYMENT' AND status = 'COMPLETED') AS times_paid,
           coalesce(sum(CASE status WHEN 'PROCESSING' THEN amount WHEN 'FAILED' THEN -amount END)
               FILTER (WHERE transaction_type = 'REFUND'), 0) AS refunded,
           coalesce(sum(CASE status WHEN 'PROCESSING' THEN amount ELSE -amount END)
               FILTER (WHERE transaction_type = 'REFUND'), 0) AS pending
    FROM transactions
    WHERE payment_id BETWEEN %(first_id)s::bigint AND %(last_id)s::bigint
    GROUP BY payment_id
),
given AS (
    SELECT payment_id,
           coalesce(sum(amount) FILTER (WHERE status <> 'FAILED'), 0) AS refunded,
           coalesce(sum(amount) FILTER (WHERE status = 'PROCESSING'), 0) AS pending
    FROM refunds
    WHERE payment_id BETWEEN %(first_id)s::bigint AND %(last_id)s::bigint
    GROUP BY payment_id
),
compared AS (
    SELECT p.*, latest.status AS audited_status, coalesce(t.times_paid, 0) AS times_paid,
           coalesce(t.refunded, 0) AS audited_refunded, coalesce(t.pending, 0) AS audited_pending,
           coalesce(g.refunded, 0) AS given_refunded, coalesce(g.pending, 0) AS given_pending
    FROM payment p
    LEFT JOIN trail t ON t.payment_id = p.payment_id
    LEFT JOIN transactions latest ON latest.transaction_log_id = t.latest_id
    LEFT JOIN given g ON g.payment_id = p.payment_id
),
-- What is wrong is put into words for those alone where something is.
suspect AS (
    SELECT *
    FROM compared
    WHERE audited_status IS DISTINCT FROM status OR times_paid > 1 OR given_refunded > amount
       OR (audited_refunded, audited_pending) <> (refunded_amount, refund_pending)
       OR (given_refunded, given_pending) <> (refunded_amount, refund_pending)
),
-- One row for all, so that payments are counted even where none is at fault.
checked AS (
    SELECT count(*) AS payments FROM payment
)
SELECT checked.payments, fault.*
FROM checked
LEFT JOIN (
    SELECT c.payment_id, f.check_name, f.detail
    FROM suspect c
    CROSS JOIN LATERAL (VALUES
        ('status_not_audited', c.audited_status IS DISTINCT FROM c.status,
         'the payment is ' || c.status || ', the audit trail says ' || coalesce(c.audited_status, 'nothing')),
        ('paid_twice', c.times_paid > 1, 'the audit trail has ' || c.times_paid || ' successful charges'),
        ('refunds_not_audited', (c.audited_refunded, c.audited_pending) <> (c.refunded_amount, c.refund_pending),
         'refunded ' || c.refunded_amount || ', of it ' || c.refund_pending || ' in flight; the audit trail says '
         || c.audited_refunded || ' and ' || c.audited_pending),
        ('refunds_do_not_add_up',
         (c.given_refunded, c.given_pending) <> (c.refunded_amount, c.refund_pending) OR c.given_refunded > c.amount,
         'refunded ' || c.refunded_amount || ', of it ' || c.refund_pending || ' in flight; the refunds add up to '
         || c.given_refunded || ' and ' || c.given_pending)
    ) AS f (check_name, found, detail)
    WHERE f.found
) fault ON true
ORDER BY fault.payment_id
