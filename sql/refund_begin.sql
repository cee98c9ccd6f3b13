-- Reserves refunds on their payments and records them as PROCESSING, in one statement.
--
-- One row per payment in a batch. Payments are locked first, in the order of charge_begin (order_id), and
-- tested on the locked row; a missing amount asks for all that is left. Every column that a CHECK combines is
-- set from the locked row: PostgreSQL checks a new row that it made from the snapshot's before it finds that
-- somebody was faster, so one that mixes both would be refused. The CHECKs refuse an over-refund even if this
-- text were wrong. As in charge_begin, whoever is missing was refused, and a raced key makes the statement fail.
WITH request AS (
    SELECT r.*
    FROM set_config('lock_timeout', coalesce(%(lock_wait)s::text, current_setting('lock_timeout')), true), unnest(
        %(n)s::bigint[], %(payment_id)s::bigint[], %(amount)s::numeric[], %(reason)s::text[],
        %(begin_id)s::text[], %(description)s::text[], %(at)s::timestamptz[],
        %(idempotency_key)s::text[], %(caller)s::text[], %(request_hash)s::text[],
        %(expires_at)s::timestamptz[], %(actor)s::text[]
    ) AS r (
        n, payment_id, amount, reason, begin_id, description, at,
        idempotency_key, caller, request_hash, expires_at, actor
    )
),
admitted AS MATERIALIZED (
    SELECT r.*, p.order_id
    FROM request r
    JOIN payments p USING (payment_id)
    WHERE NOT EXISTS (
        SELECT FROM idempotency_keys k
        WHERE k.idempotency_key = r.idempotency_key AND k.caller = r.caller
          AND (k.response_body IS NULL OR k.expires_at > r.at)
    )
),
locked AS MATERIALIZED (
    SELECT a.*, p.status, p.captured, p.refunded_amount, p.refund_pending, p.currency,
           coalesce(a.amount, p.captured - p.refunded_amount) AS refund_amount
    FROM (SELECT * FROM admitted ORDER BY order_id) a
    CROSS JOIN LATERAL (
        SELECT status, amount AS captured, refunded_amount, refund_pending, currency
        FROM payments
        WHERE payments.payment_id = a.payment_id
        FOR NO KEY UPDATE
    ) p
),
reserved AS (
    UPDATE payments p SET
        amount = l.captured,
        status = l.status,
        refunded_amount = l.refunded_amount + l.refund_amount,
        refund_pending = l.refund_pending + l.refund_amount,
        updated_at = l.at
    FROM locked l
    WHERE p.payment_id = l.payment_id
      AND l.status = 'COMPLETED'
      AND l.refund_amount > 0
      AND l.refunded_amount + l.refund_amount <= l.captured
      AND (l.refund_amount = trunc(l.refund_amount) OR l.currency <> ALL (%(whole_amount_currencies)s::text[]))
    RETURNING l.n, p.transaction_id, p.attempt, p.payment_method, p.captured_at, p.authorization_code
),
recorded AS (
    INSERT INTO refunds (payment_id, amount, reason, status, begin_id, created_at, updated_at)
    SELECT l.payment_id, l.refund_amount, l.reason, 'PROCESSING', l.begin_id, l.at, l.at
    FROM reserved
    JOIN locked l USING (n)
    ORDER BY l.order_id
    RETURNING refund_id, payment_id
),
audited AS (
    INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at, actor)
    SELECT l.payment_id, 'REFUND', l.refund_amount, 'PROCESSING', l.description, l.at, l.actor
    FROM reserved
    JOIN locked l USING (n)
    ORDER BY l.order_id
),
claimed AS (
    INSERT INTO idempotency_keys AS k (
        idempotency_key, caller, payment_id, refund_id, request_hash, begin_id, created_at, expires_at
    )
    SELECT l.idempotency_key, l.caller, l.payment_id, f.refund_id, l.request_hash, l.begin_id, l.at, l.expires_at
    FROM recorded f
    JOIN locked l USING (payment_id)
    WHERE l.idempotency_key IS NOT NULL
    ORDER BY l.idempotency_key, l.caller
    ON CONFLICT (idempotency_key, caller) DO UPDATE SET
        payment_id = EXCLUDED.payment_id,
        refund_id = EXCLUDED.refund_id,
        request_hash = EXCLUDED.request_hash,
        begin_id = EXCLUDED.begin_id,
        response_body = NULL,
        status_code = NULL,
        created_at = EXCLUDED.created_at,
        expires_at = CASE
            WHEN k.response_body IS NOT NULL AND k.expires_at <= EXCLUDED.created_at
            THEN EXCLUDED.expires_at
        END
    RETURNING k.id, k.refund_id
)
SELECT l.n, l.payment_id, l.order_id, l.begin_id, f.refund_id, l.refund_amount AS amount, l.currency,
       r.transaction_id, r.attempt, r.payment_method, r.captured_at, r.authorization_code, c.id AS key_id
FROM reserved r
JOIN locked l USING (n)
JOIN recorded f USING (payment_id)
LEFT JOIN claimed c USING (refund_id)
