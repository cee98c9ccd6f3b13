-- What the gateway did after it was booked as never happened, and what is still to be put right of it.
SELECT 'taken_late' AS check_name, payment_id, refund_id, coalesce(last_result, 'not looked at yet') AS detail,
       count(*) OVER () AS count
FROM recoveries
WHERE state = 'LATE'
ORDER BY recovery_id
LIMIT %(count_max)s::bigint
