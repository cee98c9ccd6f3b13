-- Adds up what has changed since the last time. Whoever does so at the same moment finds the rows gone.
WITH taken AS (
    DELETE FROM total_changes
    RETURNING metric, label, count, amount
)
INSERT INTO totals AS t (metric, label, count, amount)
SELECT metric, label, sum(count), sum(amount)
FROM taken
GROUP BY metric, label
ORDER BY metric, label
ON CONFLICT (metric, label) DO UPDATE SET
    count = t.count + EXCLUDED.count,
    amount = t.amount + EXCLUDED.amount
