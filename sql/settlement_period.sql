-- The days (UTC) of which a file has lines, the second one exclusive; NULL where it has none. A day at either end with no more
-- than a hundredth of the lines of the fullest one is not counted: a few lines come late.
WITH day AS (
    SELECT date_trunc('day', settled_at, 'UTC') AS day, count(*) AS lines
    FROM settlement_lines
    GROUP BY 1
)
SELECT coalesce(sum(lines), 0)::bigint AS lines,
       min(day) FILTER (WHERE counts) AS period_from,
       max(day) FILTER (WHERE counts) + interval '1 day' AS period_to
FROM (SELECT day, lines, lines * 100 > max(lines) OVER () AS counts FROM day) AS counted
