-- Finds the class of each line of a refund.
--
-- A refund that was answered has the gateway's reference in our books. The others, whose outcome was never learnt, are
-- paired with lines of the same payment and amount, one by one: without a reference nothing else tells them apart. Failed
-- lines are paired from the other end, so that they meet what failed by our books as well.
WITH nameless_line AS (
    SELECT line, payment_id, amount, status = 'failed' AS failed,
           row_number() OVER (
               PARTITION BY payment_id, amount, status = 'failed' ORDER BY status <> 'settled', line
           ) AS number,
           count(*) FILTER (WHERE status <> 'failed') OVER (PARTITION BY payment_id, amount) AS others
    FROM settlement_refund_lines
    WHERE nth = 1 AND payment_id IS NOT NULL AND refund_id IS NULL AND recovery_id IS NULL
),
nameless_refund AS (
    SELECT f.refund_id, f.payment_id, f.amount, f.status, f.completed_at, f.created_at,
           row_number() OVER from_front AS from_front,
           count(*) OVER (PARTITION BY f.payment_id, f.amount) + 1 - row_number() OVER from_front AS from_end,
           count(*) OVER (PARTITION BY f.payment_id, f.amount) AS refunds
    FROM refunds f
    WHERE f.gateway_reference IS NULL AND f.payment_id IN (SELECT payment_id FROM nameless_line)
    WINDOW from_front AS (
        PARTITION BY f.payment_id, f.amount
        ORDER BY array_position(ARRAY['COMPLETED', 'PROCESSING', 'FAILED'], f.status::text), f.refund_id
    )
),
paired AS (
    SELECT l.line, f.*
    FROM nameless_line l
    JOIN nameless_refund f
        ON f.payment_id = l.payment_id AND f.amount = l.amount
       AND l.number = CASE WHEN l.failed THEN f.from_end ELSE f.from_front END
    WHERE NOT l.failed OR l.number <= f.refunds - l.others
),
held AS (
    SELECT n.line, n.gateway_reference, n.transaction_id, n.operation, n.amount, n.currency, n.status, n.settled_at,
           n.payment_id, n.order_id, n.our_currency, n.captured_at, n.first_line, n.our_reference,
           n.recovery_id, n.late_amount, n.late_currency, n.ended_at,
           coalesce(n.refund_id, d.refund_id) AS refund_id,
           coalesce(n.our_amount, d.amount) AS our_amount,
           coalesce(n.our_status, d.status) AS our_status,
           coalesce(n.completed_at, d.completed_at) AS completed_at,
           coalesce(n.created_at, d.created_at) AS created_at,
           CASE
               WHEN n.refund_id IS NOT NULL THEN 'ours'
               WHEN n.nth > 1 AND n.status <> 'settled' THEN 'superseded'
               WHEN n.nth > 1 THEN 'again'
               WHEN n.recovery_id IS NOT NULL THEN 'late'
               WHEN d.refund_id IS NOT NULL THEN 'ours'
               ELSE 'nothing'
           END AS about
    FROM settlement_refund_lines n
    LEFT JOIN paired d USING (line)
),
judged AS (
    SELECT h.*,
           CASE
               WHEN about = 'superseded' THEN 'matched'
               WHEN about = 'again' THEN 'duplicate_at_gateway'
               WHEN about = 'nothing' THEN
                   CASE WHEN status = 'failed' THEN 'matched' ELSE 'refund_missing_in_our_books' END
               WHEN about = 'late' THEN CASE
                   WHEN status <> 'settled' THEN 'status_differs'
                   WHEN currency <> late_currency THEN 'currency_differs'
                   WHEN amount > late_amount THEN 'amount_over'
                   WHEN amount < late_amount THEN 'amount_under'
                   ELSE 'matched'
               END
               WHEN our_status = 'PROCESSING' AND created_at > %(unknown_since)s::timestamptz THEN 'pending'
               WHEN status = 'pending' AND completed_at > %(pending_since)s::timestamptz THEN 'pending'
               WHEN status = 'failed' AND our_status = 'FAILED' THEN 'matched'
               WHEN status <> 'settled' OR our_status <> 'COMPLETED' OR captured_at IS NULL THEN 'status_differs'
               WHEN currency <> our_currency THEN 'currency_differs'
               WHEN amount > our_amount THEN 'amount_over'
               WHEN amount < our_amount THEN 'amount_under'
               ELSE 'matched'
           END AS class
    FROM held h
)
INSERT INTO settlement_findings
SELECT class,
       operation, line, payment_id, order_id, refund_id, recovery_id, transaction_id, gateway_reference,
       CASE WHEN about = 'late' THEN gateway_reference ELSE our_reference END,
       amount,
       CASE WHEN about = 'late' THEN late_amount ELSE our_amount END,
       currency,
       CASE WHEN about = 'late' THEN late_currency ELSE our_currency END,
       status, our_status,
       CASE WHEN about = 'late' THEN 'L' || recovery_id
            WHEN about = 'ours' AND our_status = 'COMPLETED' AND captured_at IS NOT NULL THEN 'R' || refund_id END,
       CASE WHEN about = 'late' THEN ended_at ELSE completed_at END,
       settled_at,
       -- In words for what is not matched alone: it is most of the work.
       CASE WHEN class = 'matched' THEN '' ELSE
           CASE about
               WHEN 'again' THEN 'line ' || first_line || ' settles the same operation'
               WHEN 'superseded' THEN 'superseded by line ' || first_line
               WHEN 'nothing' THEN CASE
                   WHEN payment_id IS NULL THEN 'we know no payment with this transaction id'
                   ELSE 'payment ' || payment_id || ' has no such refund'
               END
               WHEN 'late' THEN 'the return of money that was taken too late'
               ELSE CASE
                   WHEN captured_at IS NULL THEN 'our books say that no gateway took the money'
                   WHEN status = 'settled' AND our_status = 'COMPLETED'
                   THEN 'the gateway has ' || amount || ' ' || currency || ', our books have ' || our_amount || ' '
                        || our_currency
                   ELSE 'the gateway says ' || status || ', our books say ' || our_status
               END
           END
       END
FROM judged
