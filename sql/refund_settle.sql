-- Books the gateway's answers to refunds: completes the refund or releases its reservation.
--
-- One row per payment in a batch. The payment is locked before its refund, and whether the payment is now
-- fully refunded is computed from the locked row: a sum over refunds would be taken from a stale snapshot
-- and lose the transition. A refund that is no longer PROCESSING is missing from the result.
-- As in refund_begin, every column that a CHECK combines is set from the locked row.
WITH settlement AS (
    SELECT s.*
    FROM set_config('lock_timeout', coalesce(%(lock_wait)s::text, current_setting('lock_timeout')), true), unnest(
        %(n)s::bigint[], %(order_id)s::bigint[], %(payment_id)s::bigint[], %(refund_id)s::bigint[],
        %(status)s::text[], %(gateway_reference)s::text[], %(gateway_response)s::text[],
        %(at)s::timestamptz[], %(description)s::text[],
        %(message_count)s::bigint[], %(message_count_in_full)s::bigint[],
        %(request_id)s::text[], %(traceparent)s::text[], %(actor)s::text[]
    ) AS s (
        n, order_id, payment_id, refund_id, status, gateway_reference, gateway_response, at, description,
        message_count, message_count_in_full, request_id, traceparent, actor
    )
),
-- Those of a refund that turns out to be the last one are numbered after the others.
message AS (
    SELECT *
    FROM unnest(
        %(message_n)s::bigint[], %(message_number)s::bigint[], %(message_destination)s::text[],
        %(message_event)s::text[], %(message_payload)s::text[]
    ) AS m (n, number, destination, event, payload)
),
locked AS MATERIALIZED (
    SELECT s.*, f.amount, p.amount AS captured, p.currency, p.refunded_amount, p.refund_pending, p.last_sequence,
           s.status = 'COMPLETED' AND p.refunded_amount = p.amount AND p.refund_pending = f.amount
               AS refunded_in_full
    FROM (SELECT * FROM settlement ORDER BY order_id) s
    CROSS JOIN LATERAL (
        SELECT payment_id, amount, currency, refunded_amount, refund_pending, last_sequence
        FROM payments
        WHERE payments.payment_id = s.payment_id
        FOR NO KEY UPDATE
    ) p
    CROSS JOIN LATERAL (
        SELECT amount, status
        FROM refunds
        WHERE refunds.refund_id = s.refund_id AND refunds.payment_id = p.payment_id
        FOR NO KEY UPDATE
    ) f
    WHERE f.status = 'PROCESSING'
),
applied AS (
    UPDATE payments p SET
        amount = l.captured,
        refund_pending = l.refund_pending - l.amount,
        refunded_amount = CASE
            WHEN l.status = 'FAILED' THEN l.refunded_amount - l.amount
            ELSE l.refunded_amount
        END,
        status = CASE WHEN l.refunded_in_full THEN 'REFUNDED' ELSE 'COMPLETED' END,
        updated_at = l.at,
        last_sequence = l.last_sequence
            + CASE WHEN l.refunded_in_full THEN l.message_count_in_full ELSE l.message_count END
    FROM locked l
    WHERE p.payment_id = l.payment_id
    RETURNING l.n
),
settled AS (
    UPDATE refunds f SET
        status = l.status,
        gateway_reference = l.gateway_reference,
        gateway_response = l.gateway_response,
        updated_at = l.at,
        completed_at = CASE WHEN l.status = 'COMPLETED' THEN l.at END
    FROM applied
    JOIN locked l USING (n)
    WHERE f.refund_id = l.refund_id
),
audited AS (
    INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at, actor)
    SELECT l.payment_id, 'REFUND', l.amount,
           CASE l.status WHEN 'COMPLETED' THEN 'REFUNDED' ELSE 'FAILED' END, l.description, l.at, l.actor
    FROM applied
    JOIN locked l USING (n)
    UNION ALL
    SELECT l.payment_id, 'PAYMENT', l.captured, 'REFUNDED', 'Payment refunded in full', l.at, l.actor
    FROM applied
    JOIN locked l USING (n)
    WHERE l.refunded_in_full
),
told AS (
    INSERT INTO outbox (payment_id, sequence, destination, event, payload, request_id, traceparent, created_at)
    SELECT l.payment_id, l.last_sequence + m.number, m.destination, m.event, m.payload::jsonb,
           l.request_id, l.traceparent, l.at
    FROM applied
    JOIN locked l USING (n)
    JOIN message m USING (n)
    WHERE l.refunded_in_full OR m.number <= l.message_count
    ORDER BY l.order_id, m.number
),
counted AS (
    INSERT INTO total_changes (metric, label, count, amount)
    SELECT c.metric, c.label, sum(c.count), sum(c.amount)
    FROM applied
    JOIN locked l USING (n)
    CROSS JOIN LATERAL (VALUES
        ('refunds', l.currency, 1, l.amount, l.status = 'COMPLETED'),
        ('status', 'COMPLETED', -1, 0, l.refunded_in_full), ('status', 'REFUNDED', 1, 0, l.refunded_in_full)
    ) AS c (metric, label, count, amount, counts)
    WHERE c.counts
    GROUP BY c.metric, c.label
)
SELECT n FROM applied
