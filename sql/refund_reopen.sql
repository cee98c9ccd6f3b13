-- Takes a refund that was booked as never happened back to PROCESSING, because the gateway did give the money:
-- reserves it again if that much of the payment is left. In the same commit recovery takes charge of it, so that
-- whoever settles it now may be cut off.
WITH locked AS MATERIALIZED (
    SELECT p.payment_id, p.order_id, p.status, p.amount AS captured, p.refunded_amount, p.refund_pending, p.attempt,
           p.currency, p.payment_method, f.refund_id, f.amount, f.created_at
    FROM (SELECT payment_id FROM refunds WHERE refund_id = %(refund_id)s::bigint) wanted
    CROSS JOIN LATERAL (
        SELECT payment_id, order_id, status, amount, refunded_amount, refund_pending, attempt, currency, payment_method
        FROM payments
        WHERE payments.payment_id = wanted.payment_id
        FOR NO KEY UPDATE
    ) p
    CROSS JOIN LATERAL (
        SELECT refund_id, amount, status, created_at
        FROM refunds
        WHERE refunds.refund_id = %(refund_id)s::bigint
        FOR NO KEY UPDATE
    ) f
    WHERE f.status = 'FAILED' AND p.status = 'COMPLETED' AND p.refunded_amount + f.amount <= p.amount
),
reserved AS (
    UPDATE payments p SET
        amount = l.captured,
        status = l.status,
        refunded_amount = l.refunded_amount + l.amount,
        refund_pending = l.refund_pending + l.amount,
        updated_at = %(at)s::timestamptz
    FROM locked l
    WHERE p.payment_id = l.payment_id
    RETURNING p.payment_id
),
reopened AS (
    UPDATE refunds f SET status = 'PROCESSING', updated_at = %(at)s::timestamptz
    FROM locked l
    JOIN reserved USING (payment_id)
    WHERE f.refund_id = l.refund_id
),
audited AS (
    INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at, actor)
    SELECT l.payment_id, 'REFUND', l.amount, 'PROCESSING', %(description)s::text, %(at)s::timestamptz, %(actor)s::text
    FROM locked l
    JOIN reserved USING (payment_id)
),
recovered AS (
    INSERT INTO recoveries AS r (payment_id, attempt, refund_id, amount, currency, payment_method, begun_at)
    SELECT l.payment_id, l.attempt, l.refund_id, l.amount, l.currency, l.payment_method, l.created_at
    FROM locked l
    JOIN reserved USING (payment_id)
    ON CONFLICT ON CONSTRAINT idx_recoveries_refund_id DO UPDATE SET
        state = 'OPEN',
        next_look_at = CASE WHEN r.lease_id IS NULL THEN now() ELSE r.next_look_at END,
        ended_at = NULL
)
SELECT l.refund_id, l.payment_id, l.order_id FROM locked l JOIN reserved USING (payment_id)
