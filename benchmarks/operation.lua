-- wrk: what OPERATION says, of the PAYMENTS that were charged before: orders and payments 1 to PAYMENTS.
local operation = os.getenv("OPERATION")
local payments = tonumber(os.getenv("PAYMENTS"))

function init()
    done = 0
    math.randomseed(1)
end

local function charge(order)
    local body = string.format(
        '{"order_id":%d,"user_id":7,"amount":"100.00","payment_method":"UPI"}', order)
    return wrk.format("POST", "/v1/payments/charge",
        {["Content-Type"] = "application/json", ["Idempotency-Key"] = "bench-" .. order}, body)
end

local function refund(payment)
    return wrk.format("POST", "/v1/payments/" .. payment .. "/refund",
        {["Content-Type"] = "application/json", ["Idempotency-Key"] = "refund-" .. payment},
        '{"reason":"benchmark"}')
end

function request()
    done = done + 1
    local any = math.random(payments)
    if operation == "read" then
        return wrk.format("GET", "/v1/payments/" .. any)
    elseif operation == "page" then
        return wrk.format("GET", "/v1/payments?page_size=20&status=COMPLETED&cursor=" .. any + 1)
    elseif operation == "replay" then
        return charge(any)
    elseif operation == "refund" then
        return refund(done)
    end
end
