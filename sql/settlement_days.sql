-- How many lines and operations of each day (UTC) are matched, pending and different.
SELECT (at AT TIME ZONE 'UTC')::date AS day,
       count(*) FILTER (WHERE class = 'matched') AS matched,
       count(*) FILTER (WHERE class = 'pending') AS pending,
       count(*) FILTER (WHERE class NOT IN ('matched', 'pending')) AS different
FROM settlement_findings
GROUP BY day
ORDER BY day
