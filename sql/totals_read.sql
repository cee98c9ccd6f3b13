-- The totals as of one moment.
SELECT metric, label, sum(count)::bigint AS count, sum(amount) AS amount
FROM (
    SELECT metric, label, count, amount FROM totals
    UNION ALL
    SELECT metric, label, count, amount FROM total_changes
) AS each_of_both
GROUP BY metric, label
