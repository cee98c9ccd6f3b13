-- Books the gateway's answers: payments, audit rows, messages and the finished responses of the keys.
--
-- Rows are locked first, in the order in which charge_begin locks them, and status and attempt are
-- tested on the locked row: in the WHERE of the UPDATE, status would let a cached plan scan
-- idx_payments_status, tenfold slower under a long snapshot. A row whose payment is no longer PROCESSING
-- in the same attempt was settled by somebody else; it is missing from the result.
WITH settlement AS (
    SELECT s.*
    FROM set_config('lock_timeout', coalesce(%(lock_wait)s::text, current_setting('lock_timeout')), true), unnest(
        %(n)s::bigint[], %(order_id)s::bigint[], %(payment_id)s::bigint[], %(attempt)s::bigint[],
        %(status)s::text[], %(authorization_code)s::text[], %(gateway_response)s::text[],
        %(completed_at)s::timestamptz[], %(captured_at)s::timestamptz[], %(at)s::timestamptz[],
        %(transaction_log_id)s::bigint[], %(description)s::text[],
        %(key_id)s::bigint[], %(response_body)s::text[], %(status_code)s::bigint[],
        %(expires_at)s::timestamptz[], %(releases_key)s::boolean[], %(message_count)s::bigint[],
        %(request_id)s::text[], %(traceparent)s::text[], %(actor)s::text[]
    ) AS s (
        n, order_id, payment_id, attempt, status, authorization_code, gateway_response,
        completed_at, captured_at, at, transaction_log_id, description,
        key_id, response_body, status_code, expires_at, releases_key, message_count, request_id, traceparent, actor
    )
),
message AS (
    SELECT *
    FROM unnest(
        %(message_n)s::bigint[], %(message_number)s::bigint[], %(message_destination)s::text[],
        %(message_event)s::text[], %(message_payload)s::text[]
    ) AS m (n, number, destination, event, payload)
),
locked AS MATERIALIZED (
    SELECT s.*, p.amount, p.currency, p.status AS current_status, p.attempt AS current_attempt, p.last_sequence
    FROM (SELECT * FROM settlement ORDER BY order_id) s
    CROSS JOIN LATERAL (
        SELECT amount, currency, status, attempt, last_sequence
        FROM payments
        WHERE payments.payment_id = s.payment_id
        FOR NO KEY UPDATE
    ) p
),
applied AS (
    UPDATE payments p SET
        status = l.status,
        authorization_code = l.authorization_code,
        gateway_response = l.gateway_response,
        completed_at = l.completed_at,
        captured_at = l.captured_at,
        updated_at = l.at,
        last_sequence = l.last_sequence + l.message_count
    FROM locked l
    WHERE p.payment_id = l.payment_id
      AND l.current_status = 'PROCESSING' AND l.current_attempt = l.attempt
    RETURNING l.n
),
audited AS (
    INSERT INTO transactions (
        transaction_log_id, payment_id, transaction_type, amount, status, description, created_at, actor
    )
    OVERRIDING SYSTEM VALUE
    SELECT l.transaction_log_id, l.payment_id, 'PAYMENT', l.amount, l.status, l.description, l.at, l.actor
    FROM applied
    JOIN locked l USING (n)
),
told AS (
    INSERT INTO outbox (payment_id, sequence, destination, event, payload, request_id, traceparent, created_at)
    SELECT l.payment_id, l.last_sequence + m.number, m.destination, m.event, m.payload::jsonb,
           l.request_id, l.traceparent, l.at
    FROM applied
    JOIN locked l USING (n)
    JOIN message m USING (n)
    ORDER BY l.order_id, m.number
),
-- A released key is kept as finished and long expired: the next request with it starts anew.
-- An answer that comes late, by way of recovery, can be replayed for a whole lifetime all the same; to move every
-- key's would cost every charge its HOT update.
finished AS (
    UPDATE idempotency_keys k SET
        response_body = l.response_body,
        status_code = l.status_code,
        expires_at = CASE
            WHEN l.releases_key THEN to_timestamp(0)
            WHEN k.expires_at < l.at + interval '1 hour' THEN l.expires_at
            ELSE k.expires_at
        END
    FROM applied
    JOIN locked l USING (n)
    WHERE k.id = l.key_id AND k.response_body IS NULL
),
counted AS (
    INSERT INTO total_changes (metric, label, count, amount)
    SELECT c.metric, c.label, sum(c.count), sum(c.amount)
    FROM applied
    JOIN locked l USING (n)
    CROSS JOIN LATERAL (VALUES
        ('status', 'PROCESSING', -1, 0), ('status', l.status, 1, 0),
        (CASE l.status WHEN 'COMPLETED' THEN 'completed' ELSE 'failed' END,
         CASE l.status WHEN 'COMPLETED' THEN l.currency ELSE '' END, 1,
         CASE l.status WHEN 'COMPLETED' THEN l.amount ELSE 0 END)
    ) AS c (metric, label, count, amount)
    GROUP BY c.metric, c.label
)
SELECT n FROM applied
