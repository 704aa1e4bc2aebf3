# Sourced by run and oha.sh: where load may go, and where its tools are kept.

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# The whole host must match, so that http://127.0.0.1@elsewhere/ does not pass.
require_loopback() {
  local here='^https?://(localhost|127\.[0-9]+\.[0-9]+\.[0-9]+|\[::1\])(:[0-9]+)?(/|$)'
  [[ $1 =~ $here || ${ALLOW_REMOTE:-} == 1 ]] ||
    fail "$1 is not on this machine: set ALLOW_REMOTE=1 if that is where the load is meant to go"
}

# A stopped stack would otherwise look like one that fails every photo.
require_answer() {
  local status
  [[ $1 =~ ^https?://[^/]+ ]] || fail "URL: expected http://host:port/, found \"$1\""
  status=$(curl -s -o /dev/null -m 5 -w '%{http_code}' "${BASH_REMATCH[0]}/livez") || true
  [[ $status == 200 ]] || fail "nothing is ready at $1 (/livez: ${status:-no answer}); start it first, or set URL"
}

tools=${LOADTEST_TOOLS:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/target/tools}
