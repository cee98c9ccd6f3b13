-- Finds the class of each line of a refund.
--
-- A refund that was answered has the gateway's reference in our books. The others, whose outcome was never learnt, are
-- paired with lines of the same payment and amount, one by one: without a reference nothing else tells them apart.
WITH known AS (
    SELECT l.*, p.payment_id, p.order_id, p.currency AS our_currency, p.captured_at,
           row_number() OVER same AS nth,
           first_value(l.line) OVER same AS first_line
    FROM settlement_lines l
    LEFT JOIN payments p ON p.transaction_id = l.transaction_id
    WHERE l.operation = 'refund'
    WINDOW same AS (PARTITION BY l.transaction_id, l.gateway_reference ORDER BY l.status <> 'settled', l.line)
),
named AS (
    SELECT k.*, f.refund_id, f.amount AS our_amount, f.status AS our_status, f.gateway_reference AS our_reference,
           f.completed_at, f.created_at, returned.state AS late_state, returned.amount AS late_amount,
           returned.currency AS late_currency
    FROM known k
    LEFT JOIN refunds f
        ON f.payment_id = k.payment_id AND f.gateway_reference = k.gateway_reference AND k.nth = 1
    LEFT JOIN (
        SELECT payment_id, state, amount, currency, returned_reference
        FROM recoveries
        WHERE returned_reference IS NOT NULL
    ) returned ON returned.payment_id = k.payment_id AND returned.returned_reference = k.gateway_reference
),
nameless_line AS (
    SELECT line, payment_id, amount,
           row_number() OVER (PARTITION BY payment_id, amount ORDER BY status <> 'settled', line) AS number
    FROM named
    WHERE nth = 1 AND payment_id IS NOT NULL AND refund_id IS NULL AND late_state IS NULL
),
nameless_refund AS (
    SELECT f.refund_id, f.payment_id, f.amount, f.status, f.completed_at, f.created_at,
           row_number() OVER (
               PARTITION BY f.payment_id, f.amount ORDER BY f.status <> 'COMPLETED', f.status <> 'PROCESSING', f.refund_id
           ) AS number
    FROM refunds f
    WHERE f.gateway_reference IS NULL AND f.payment_id IN (SELECT payment_id FROM nameless_line)
),
paired AS (
    SELECT l.line, f.refund_id, f.amount, f.status, f.completed_at, f.created_at
    FROM nameless_line l
    JOIN nameless_refund f USING (payment_id, amount, number)
),
held AS (
    SELECT n.line, n.gateway_reference, n.transaction_id, n.operation, n.amount, n.currency, n.status, n.settled_at,
           n.payment_id, n.order_id, n.our_currency, n.captured_at, n.first_line, n.our_reference,
           n.late_state, n.late_amount, n.late_currency,
           coalesce(n.refund_id, d.refund_id) AS refund_id,
           coalesce(n.our_amount, d.amount) AS our_amount,
           coalesce(n.our_status, d.status) AS our_status,
           coalesce(n.completed_at, d.completed_at) AS completed_at,
           coalesce(n.created_at, d.created_at) AS created_at,
           CASE
               WHEN n.nth > 1 THEN 'again'
               WHEN n.late_state IS NOT NULL THEN 'late'
               WHEN n.refund_id IS NULL AND d.refund_id IS NULL THEN 'nothing'
               ELSE 'ours'
           END AS about
    FROM named n
    LEFT JOIN paired d USING (line)
)
INSERT INTO settlement_findings
SELECT CASE about
           WHEN 'again' THEN 'duplicate_at_gateway'
           WHEN 'nothing' THEN 'refund_missing_in_our_books'
           WHEN 'late' THEN CASE
               WHEN status <> 'settled' THEN 'status_differs'
               WHEN currency <> late_currency THEN 'currency_differs'
               WHEN amount > late_amount THEN 'amount_over'
               WHEN amount < late_amount THEN 'amount_under'
               ELSE 'matched'
           END
           ELSE CASE
               WHEN our_status = 'PROCESSING' AND created_at > %(unknown_since)s::timestamptz THEN 'pending'
               WHEN status = 'pending' AND completed_at > %(pending_since)s::timestamptz THEN 'pending'
               WHEN status = 'failed' AND our_status = 'FAILED' THEN 'matched'
               WHEN status <> 'settled' OR our_status <> 'COMPLETED' OR captured_at IS NULL THEN 'status_differs'
               WHEN currency <> our_currency THEN 'currency_differs'
               WHEN amount > our_amount THEN 'amount_over'
               WHEN amount < our_amount THEN 'amount_under'
               ELSE 'matched'
           END
       END,
       operation, line, payment_id, order_id, refund_id, transaction_id, gateway_reference,
       CASE WHEN about = 'late' THEN gateway_reference ELSE our_reference END,
       amount,
       CASE WHEN about = 'late' THEN late_amount ELSE our_amount END,
       currency,
       CASE WHEN about = 'late' THEN late_currency ELSE our_currency END,
       status, our_status,
       (about = 'ours' AND our_status = 'COMPLETED' AND captured_at IS NOT NULL) OR about = 'late',
       settled_at,
       CASE about
           WHEN 'again' THEN 'line ' || first_line || ' settles the same operation'
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
FROM held
