-- Tells what time it is by the one clock that everybody shares.
SELECT now() AS now
