-- Moves a payment that payment_lock has locked to another status, with its audit row and its messages.
WITH message AS (
    SELECT *
    FROM unnest(
        %(message_number)s::bigint[], %(message_destination)s::text[], %(message_event)s::text[],
        %(message_payload)s::text[]
    ) AS m (number, destination, event, payload)
),
changed AS (
    UPDATE payments p SET
        status = %(status)s::text,
        gateway_response = coalesce(%(gateway_response)s::text, p.gateway_response),
        completed_at = CASE WHEN %(status)s::text = 'COMPLETED' THEN %(at)s::timestamptz ELSE p.completed_at END,
        updated_at = %(at)s::timestamptz,
        last_sequence = p.last_sequence + %(message_count)s::bigint
    WHERE p.payment_id = %(payment_id)s::bigint
    RETURNING p.payment_id, p.amount, p.currency, p.last_sequence - %(message_count)s::bigint AS sequence_before
),
audited AS (
    INSERT INTO transactions (payment_id, transaction_type, amount, status, description, created_at, actor)
    SELECT payment_id, 'PAYMENT', amount, %(status)s::text, %(description)s::text, %(at)s::timestamptz, %(actor)s::text
    FROM changed
),
counted AS (
    INSERT INTO total_changes (metric, label, count, amount)
    SELECT c.metric, c.label, c.count, c.amount
    FROM changed
    CROSS JOIN LATERAL (VALUES
        ('status', %(status_before)s::text, -1, 0, true),
        ('status', %(status)s::text, 1, 0, true),
        ('completed', changed.currency, 1, changed.amount, %(status)s::text = 'COMPLETED'),
        ('failed', '', 1, 0, %(status)s::text = 'FAILED')
    ) AS c (metric, label, count, amount, counts)
    WHERE c.counts
)
INSERT INTO outbox (payment_id, sequence, destination, event, payload, request_id, traceparent, created_at)
SELECT c.payment_id, c.sequence_before + m.number, m.destination, m.event, m.payload::jsonb,
       %(request_id)s::text, %(traceparent)s::text, %(at)s::timestamptz
FROM changed c
CROSS JOIN message m
