"""SQL text, read through importlib.resources as the package `eci_pay.sql`."""
