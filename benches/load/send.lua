-- The requests of a bench: `-- METHOD PATH TYPE PAUSE FILE…` sends the files as bodies, one after another and from the start
-- again, each made ready once. A `*` in PATH stands for the request's number, so that each has a path of its own.
-- Each connection pauses for PAUSE milliseconds on average before a request, if that is not 0.
-- At the end one line of JSON says what came of it; latencies are in microseconds.
local requests, at = {}, 0

function init(args)
  local pause = tonumber(args[4])
  if pause > 0 then
    function delay()
      return math.floor(math.random() * 2 * pause)
    end
  end
  for n = 5, #args do
    local file = assert(io.open(args[n], "rb"))
    local head = { ["Content-Type"] = args[3], ["X-Device-Id"] = "cam-0001" } -- for bodies that do not say it
    requests[#requests + 1] = wrk.format(args[1], args[2], head, file:read("*a"))
    file:close()
  end
  if args[2]:find("*", 1, true) then
    local before, after = {}, {}
    for n, made in ipairs(requests) do
      local star = made:find("*", 1, true)
      before[n], after[n] = made:sub(1, star - 1), made:sub(star + 1)
    end
    function request()
      at = at + 1
      local n = at % #requests + 1
      return before[n] .. at .. after[n]
    end
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"answers":%d,"refused":%d,"broken":%d,"microseconds":%d,"p50":%d,"p99":%d}\n',
    summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration, latency:percentile(50), latency:percentile(99)))
end
