-- The lines of refunds, with the refund of ours that each names by its reference, or the return of late money.
CREATE TEMPORARY TABLE settlement_refund_lines ON COMMIT DROP AS
WITH known AS (
    SELECT l.*, p.payment_id, p.order_id, p.currency AS our_currency, p.captured_at,
           row_number() OVER same AS nth,
           first_value(l.line) OVER same AS first_line
    FROM settlement_lines l
    LEFT JOIN payments p ON p.transaction_id = l.transaction_id
    WHERE l.operation = 'refund'
    WINDOW same AS (
        PARTITION BY l.transaction_id, l.reference
        ORDER BY array_position(ARRAY['settled', 'failed', 'pending'], l.status), l.line < 0, l.line
    )
),
named AS (
    SELECT refund_id, payment_id, left(gateway_reference, 50) AS reference, amount, status, completed_at, created_at,
           gateway_reference,
           row_number() OVER (PARTITION BY payment_id, left(gateway_reference, 50) ORDER BY refund_id) AS nth
    FROM refunds
    WHERE gateway_reference IS NOT NULL AND payment_id IN (SELECT payment_id FROM known)
)
SELECT k.line, k.reference, k.gateway_reference, k.transaction_id, k.operation, k.amount, k.currency, k.status,
       k.settled_at, k.payment_id, k.order_id, k.our_currency, k.captured_at, k.nth, k.first_line,
       f.refund_id, f.amount AS our_amount, f.status AS our_status, f.gateway_reference AS our_reference,
       f.completed_at, f.created_at,
       returned.recovery_id, returned.amount AS late_amount, returned.currency AS late_currency, returned.ended_at
FROM known k
LEFT JOIN named f ON f.payment_id = k.payment_id AND f.reference = k.reference AND f.nth = k.nth
LEFT JOIN (
    SELECT recovery_id, payment_id, amount, currency, ended_at, left(returned_reference, 50) AS reference
    FROM recoveries
    WHERE returned_reference IS NOT NULL
) returned ON returned.payment_id = k.payment_id AND returned.reference = k.reference AND k.nth = 1
