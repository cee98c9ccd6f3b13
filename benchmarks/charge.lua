-- wrk: every request charges an order of its own, under a key of its own.
-- With DELAY_MS, a connection waits about that long before each, so that the load is less than there could be.
local base = tonumber(os.getenv("FIRST_ORDER_ID") or "0")
local wait = tonumber(os.getenv("DELAY_MS") or "0")
local threads = 0

function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

function init()
    charged = 0
    math.randomseed(number + 1)
end

function request()
    charged = charged + 1
    local order = base + number * 100000000 + charged
    local body = string.format(
        '{"order_id":%d,"user_id":7,"amount":"100.00","payment_method":"UPI"}', order)
    return wrk.format("POST", "/v1/payments/charge",
        {["Content-Type"] = "application/json", ["Idempotency-Key"] = "bench-" .. order}, body)
end

if wait > 0 then
    function delay()
        return math.floor(2 * wait * math.random())
    end
end
