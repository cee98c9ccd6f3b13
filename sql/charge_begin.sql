-- Records charges as begun: the payments, their audit rows and their idempotency keys, in one statement.
--
-- Payments come first, keys second: the other way round, each order conflict would leave a key without
-- a payment, which answers "in flight" for ever. Rows whose key is live or whose order is taken are left
-- out, so whoever is missing from the result was refused. Both upserts run in sorted order, so two
-- batches wait for each other instead of deadlocking. Where one key races for two orders, expires_at
-- becomes NULL and the whole statement fails: run again, it sees the key and refuses only the offender.
WITH request AS (
    SELECT r.*
    FROM set_config('lock_timeout', coalesce(%(lock_wait)s::text, current_setting('lock_timeout')), true), unnest(
        %(n)s::bigint[], %(order_id)s::bigint[], %(user_id)s::bigint[], %(amount)s::numeric[],
        %(currency)s::text[], %(payment_method)s::text[], %(reference)s::text[], %(begin_id)s::text[],
        %(status)s::text[], %(description)s::text[], %(at)s::timestamptz[],
        %(idempotency_key)s::text[], %(caller)s::text[], %(request_hash)s::text[],
        %(expires_at)s::timestamptz[], %(actor)s::text[]
    ) AS r (
        n, order_id, user_id, amount, currency, payment_method, reference, begin_id,
        status, description, at, idempotency_key, caller, request_hash, expires_at, actor
    )
),
admitted AS MATERIALIZED (
    SELECT r.*
    FROM request r
    WHERE NOT EXISTS (
        SELECT FROM idempotency_keys k
        WHERE k.idempotency_key = r.idempotency_key AND k.caller = r.caller
          AND (k.response_body IS NULL OR k.expires_at > r.at)
    )
    AND NOT EXISTS (
        SELECT FROM payments p
        WHERE p.order_id = r.order_id
          AND NOT (
              %(takes_over)s::boolean
              AND p.status IN ('FAILED', 'PENDING')
              AND NOT (p.status = 'PENDING' AND p.payment_method = 'COD' AND r.payment_method = 'COD')
          )
    )
),
written AS (
    INSERT INTO payments AS p (
        order_id, user_id, amount, currency, payment_method, status, transaction_id, begin_id,
        reference, created_at, updated_at
    )
    SELECT order_id, user_id, amount, currency, payment_method, status, begin_id, begin_id,
           reference, at, at
    FROM admitted
    ORDER BY order_id
    ON CONFLICT (order_id) DO UPDATE SET
        user_id = EXCLUDED.user_id,
        amount = EXCLUDED.amount,
        currency = EXCLUDED.currency,
        payment_method = EXCLUDED.payment_method,
        status = EXCLUDED.status,
        begin_id = EXCLUDED.begin_id,
        reference = EXCLUDED.reference,
        updated_at = EXCLUDED.updated_at,
        attempt = p.attempt + 1,
        authorization_code = NULL,
        gateway_response = NULL,
        completed_at = NULL,
        captured_at = NULL,
        previous_status = p.status,
        previous_method = p.payment_method
    WHERE %(takes_over)s::boolean
      AND p.status IN ('FAILED', 'PENDING')
      AND NOT (p.status = 'PENDING' AND p.payment_method = 'COD' AND EXCLUDED.payment_method = 'COD')
    RETURNING p.payment_id, p.order_id, p.begin_id, p.transaction_id, p.attempt, p.created_at,
              p.previous_status, p.previous_method
),
audited AS (
    INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at, actor)
    SELECT w.payment_id, 'PAYMENT', a.amount, a.status, a.description, a.at, a.actor
    FROM written w
    JOIN admitted a USING (order_id)
    ORDER BY a.order_id
    RETURNING transaction_log_id, payment_id
),
claimed AS (
    INSERT INTO idempotency_keys AS k (
        idempotency_key, caller, payment_id, request_hash, begin_id, created_at, expires_at
    )
    SELECT a.idempotency_key, a.caller, w.payment_id, a.request_hash, a.begin_id, a.at, a.expires_at
    FROM written w
    JOIN admitted a USING (order_id)
    WHERE a.idempotency_key IS NOT NULL
    ORDER BY a.idempotency_key, a.caller
    ON CONFLICT (idempotency_key, caller) DO UPDATE SET
        payment_id = EXCLUDED.payment_id,
        refund_id = NULL,
        request_hash = EXCLUDED.request_hash,
        begin_id = EXCLUDED.begin_id,
        response_body = NULL,
        status_code = NULL,
        created_at = EXCLUDED.created_at,
        expires_at = CASE
            WHEN k.response_body IS NOT NULL AND k.expires_at <= EXCLUDED.created_at
            THEN EXCLUDED.expires_at
        END
    RETURNING k.id, k.payment_id
),
-- A first attempt has nothing previous; what another one has taken over is known from the locked row.
counted AS (
    INSERT INTO total_changes (metric, label, count, amount)
    SELECT c.metric, c.label, sum(c.count), 0
    FROM written w
    JOIN admitted a USING (order_id)
    CROSS JOIN LATERAL (VALUES
        ('status', a.status, 1), ('method', a.payment_method, 1),
        ('status', w.previous_status, -1), ('method', w.previous_method, -1)
    ) AS c (metric, label, count)
    WHERE c.label IS NOT NULL
    GROUP BY c.metric, c.label
    HAVING sum(c.count) <> 0
)
SELECT a.n, w.payment_id, w.begin_id, w.transaction_id, w.attempt, w.created_at,
       t.transaction_log_id AS begin_log_id,
       nextval('transactions_transaction_log_id_seq') AS settle_log_id,
       c.id AS key_id
FROM written w
JOIN admitted a USING (order_id)
JOIN audited t USING (payment_id)
LEFT JOIN claimed c USING (payment_id)
