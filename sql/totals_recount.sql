-- What the totals lack, or have too much, by a count of the books; and notes it as a change, unless it is only asked for.
-- Books and totals are seen as of one moment, and each change commits both: so what goes on meanwhile is in both, or in
-- neither. Unexpected errors are in no book.
WITH counted (metric, label, count, amount) AS (
    SELECT 'status', status, count(*), 0::numeric FROM payments GROUP BY status
    UNION ALL
    SELECT 'method', payment_method, count(*), 0 FROM payments GROUP BY payment_method
    UNION ALL
    SELECT 'completed', currency, count(*), sum(amount) FROM payments
    WHERE status IN ('COMPLETED', 'REFUNDED') GROUP BY currency
    UNION ALL
    SELECT 'failed', '', count(*), 0 FROM transactions WHERE transaction_type = 'PAYMENT' AND status = 'FAILED'
    UNION ALL
    SELECT 'refunds', p.currency, count(*), sum(f.amount) FROM refunds f JOIN payments p USING (payment_id)
    WHERE f.status = 'COMPLETED' GROUP BY p.currency
),
lacking AS (
    SELECT metric, label, sum(count)::bigint AS count, sum(amount) AS amount
    FROM (
        SELECT metric, label, count, amount FROM counted
        UNION ALL
        SELECT metric, label, -count, -amount FROM totals
        UNION ALL
        SELECT metric, label, -count, -amount FROM total_changes
    ) AS each_of_them
    WHERE metric <> 'errors'
    GROUP BY metric, label
    HAVING sum(count) <> 0 OR sum(amount) <> 0
),
noted AS (
    INSERT INTO total_changes (metric, label, count, amount)
    SELECT metric, label, count, amount FROM lacking WHERE %(notes)s::boolean
)
SELECT metric, label, count, amount FROM lacking ORDER BY metric, label
