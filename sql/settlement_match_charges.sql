-- Finds the class of each line of a charge.
--
-- A payment has one transaction id for all its attempts, so the gateway's reference tells which of them a line is about.
-- One that our books do not hold is a duplicate where the file has the one that they do hold as well. Money that
-- came too late and was given back is in the books too: as a recovery. A line that is not settled moves no money: it is
-- superseded by one that is.
WITH late AS (
    SELECT r.recovery_id, r.payment_id, r.state, r.amount, r.currency, r.late_reference, r.looked_at, r.found_at
    FROM recoveries r
    JOIN payments p USING (payment_id)
    WHERE r.refund_id IS NULL AND r.late_reference IS NOT NULL
      AND left(r.late_reference, 50) IS DISTINCT FROM p.authorization_code
),
-- Few payments have several lines, and only theirs are sorted.
repeated AS (
    SELECT transaction_id
    FROM settlement_lines
    WHERE operation = 'charge'
    GROUP BY transaction_id
    HAVING count(*) > 1
),
place AS (
    SELECT l.line,
           row_number() OVER same AS nth,
           first_value(l.line) OVER same AS first_line,
           bool_or(l.reference = p.authorization_code) OVER payment AS has_ours,
           row_number() OVER (payment ORDER BY l.status <> 'settled', late.state IS NOT NULL, l.line) AS nth_of_payment
    FROM repeated
    JOIN settlement_lines l ON l.transaction_id = repeated.transaction_id AND l.operation = 'charge'
    LEFT JOIN payments p ON p.transaction_id = l.transaction_id
    LEFT JOIN late ON late.payment_id = p.payment_id AND left(late.late_reference, 50) = l.reference
    WINDOW payment AS (PARTITION BY l.transaction_id),
           same AS (
               PARTITION BY l.transaction_id, l.reference
               ORDER BY array_position(ARRAY['settled', 'failed', 'pending'], l.status), l.line < 0, l.line
           )
),
known AS (
    SELECT l.*, p.payment_id, p.order_id, p.amount AS our_amount, p.currency AS our_currency, p.status AS our_status,
           p.authorization_code, p.captured_at, p.updated_at,
           late.recovery_id, late.state AS late_state, late.amount AS late_amount, late.currency AS late_currency,
           coalesce(place.nth, 1) AS nth, place.first_line, coalesce(place.has_ours, false) AS has_ours,
           coalesce(place.nth_of_payment, 1) AS nth_of_payment
    FROM settlement_lines l
    LEFT JOIN payments p ON p.transaction_id = l.transaction_id
    LEFT JOIN late ON late.payment_id = p.payment_id AND left(late.late_reference, 50) = l.reference
    LEFT JOIN place USING (line)
    WHERE l.operation = 'charge'
),
-- What a line is about: first whether our books hold it, then which class it is in.
held AS (
    SELECT k.*,
           CASE
               WHEN nth > 1 AND status <> 'settled' THEN 'superseded'
               WHEN nth > 1 THEN 'again'
               WHEN payment_id IS NULL THEN 'nothing'
               WHEN late_state IS NOT NULL THEN 'late'
               WHEN authorization_code = reference THEN 'ours'
               WHEN authorization_code IS NOT NULL THEN 'another'
               WHEN nth_of_payment > 1 AND status = 'settled' THEN 'again'
               ELSE 'ours'
           END AS about
    FROM known k
),
judged AS (
    SELECT h.*,
           CASE
               WHEN about = 'superseded' THEN 'matched'
               WHEN about = 'again' THEN 'duplicate_at_gateway'
               WHEN about IN ('nothing', 'another') AND status = 'failed' THEN 'matched'
               WHEN about = 'nothing' THEN 'missing_in_our_books'
               WHEN about = 'another' THEN
                   CASE WHEN has_ours THEN 'duplicate_at_gateway' ELSE 'missing_in_our_books' END
               WHEN about = 'late' THEN CASE
                   WHEN status <> 'settled' OR late_state <> 'DONE' THEN 'status_differs'
                   WHEN currency <> late_currency THEN 'currency_differs'
                   WHEN amount > late_amount THEN 'amount_over'
                   WHEN amount < late_amount THEN 'amount_under'
                   ELSE 'matched'
               END
               WHEN our_status = 'PROCESSING' AND updated_at > %(unknown_since)s::timestamptz THEN 'pending'
               WHEN status = 'pending' AND captured_at > %(pending_since)s::timestamptz THEN 'pending'
               WHEN status = 'failed' AND captured_at IS NULL AND our_status <> 'PROCESSING' THEN 'matched'
               WHEN status <> 'settled' OR captured_at IS NULL THEN 'status_differs'
               WHEN currency <> our_currency THEN 'currency_differs'
               WHEN amount > our_amount THEN 'amount_over'
               WHEN amount < our_amount THEN 'amount_under'
               ELSE 'matched'
           END AS class
    FROM held h
)
INSERT INTO settlement_findings
SELECT class,
       operation, line, payment_id, order_id, NULL, CASE WHEN about = 'late' THEN recovery_id END, transaction_id,
       gateway_reference,
       CASE WHEN about = 'late' THEN gateway_reference ELSE authorization_code END,
       amount,
       CASE WHEN about = 'late' THEN late_amount ELSE our_amount END,
       currency,
       CASE WHEN about = 'late' THEN late_currency ELSE our_currency END,
       status, our_status,
       CASE WHEN about = 'ours' AND captured_at IS NOT NULL THEN 'P' || payment_id
            WHEN about = 'late' AND late_state = 'DONE' THEN 'T' || recovery_id END,
       captured_at,
       settled_at,
       -- In words for what is not matched alone: it is most of the work.
       CASE WHEN class = 'matched' THEN '' ELSE
           CASE about
               WHEN 'again' THEN CASE WHEN nth > 1 THEN 'line ' || first_line || ' settles the same operation'
                                      ELSE 'another line settles the same payment under another reference' END
               WHEN 'superseded' THEN 'superseded by line ' || first_line
               WHEN 'nothing' THEN 'we know no payment with this transaction id'
               WHEN 'another' THEN 'payment ' || payment_id || ' was taken under the reference ' || authorization_code
               WHEN 'late' THEN 'taken too late: ' || CASE WHEN late_state = 'DONE' THEN 'put right by recovery'
                                                           ELSE 'not yet put right by recovery' END
               ELSE CASE
                   WHEN captured_at IS NULL AND our_status IN ('COMPLETED', 'REFUNDED')
                   THEN 'our books say that no gateway took the money'
                   WHEN status = 'settled' AND captured_at IS NOT NULL
                   THEN 'the gateway has ' || amount || ' ' || currency || ', our books have ' || our_amount || ' '
                        || our_currency
                   ELSE 'the gateway says ' || status || ', our books say ' || our_status
               END
           END
       END
FROM judged
