-- wrk: every request charges an order of its own, under a key of its own.
local base = tonumber(os.getenv("FIRST_ORDER_ID"))
local threads = 0

function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

function init()
    charged = 0
end

function request()
    charged = charged + 1
    local order = base + number * 100000000 + charged
    local body = string.format(
        '{"order_id":%d,"user_id":7,"amount":"100.00","payment_method":"UPI"}', order)
    return wrk.format("POST", "/v1/payments/charge",
        {["Content-Type"] = "application/json", ["Idempotency-Key"] = "bench-" .. order}, body)
end
