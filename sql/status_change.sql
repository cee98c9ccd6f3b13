-- Moves a payment to another status if it is in one of the statuses that allow it, with its audit row.
-- The status before is read from the locked row and returned either way; no row means no such payment.
WITH locked AS MATERIALIZED (
    SELECT payment_id, amount, status
    FROM payments
    WHERE payment_id = %(payment_id)s::bigint
    FOR NO KEY UPDATE
),
changed AS (
    UPDATE payments p SET
        status = %(status)s::text,
        gateway_response = coalesce(%(gateway_response)s::text, p.gateway_response),
        completed_at = CASE WHEN %(status)s::text = 'COMPLETED' THEN %(at)s::timestamptz ELSE p.completed_at END,
        updated_at = %(at)s::timestamptz
    FROM locked l
    WHERE p.payment_id = l.payment_id AND l.status = ANY (%(allowed_from)s::text[])
    RETURNING p.payment_id
),
audited AS (
    INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at)
    SELECT l.payment_id, 'PAYMENT', l.amount, %(status)s::text, %(description)s::text, %(at)s::timestamptz
    FROM changed
    JOIN locked l USING (payment_id)
)
SELECT status AS status_before, EXISTS (SELECT FROM changed) AS changed FROM locked
