#!/usr/bin/env bash
# The most photos a second, as a closed model: CONNECTIONS (64) each send the same photo of PHOTO_BYTES (250000) again as
# soon as the last one was answered, for DURATION (30s), to URL. Without an upload_id, each is an upload of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/common.sh"
url=${URL:-http://127.0.0.1:8080/}
bytes=${PHOTO_BYTES:-250000}
require_loopback "$url"
[[ $bytes =~ ^[0-9]+$ ]] && ((bytes >= 1000 && bytes <= 10485760)) ||
  fail "PHOTO_BYTES: expected from 1000 to 10485760, found \"$bytes\""

oha=$(command -v oha || echo "$tools/bin/oha")
if [[ ! -x $oha ]]; then
  command -v cargo >/dev/null || fail 'oha is not installed, and there is no cargo to build it with'
  cargo install --quiet --locked --root "$tools" oha || fail 'oha is not installed, and cargo cannot build it'
fi
require_answer "$url"

body=$(mktemp)
trap 'rm -f "$body"' EXIT

# The small JPEG, made as large as asked with comments of noise after its first 20 bytes (SOI and the JFIF header).
photo() {
  local left=$((bytes - $(stat -c %s "$here/photo.jpg"))) segment
  head -c 20 "$here/photo.jpg"
  while ((left > 0)); do
    segment=$((left < 65537 ? left : 65537))
    ((left - segment > 0 && left - segment < 4)) && segment=$((segment - 4))
    printf '\xff\xfe'"\\x$(printf %02x $(((segment - 2) >> 8)))\\x$(printf %02x $(((segment - 2) & 255)))"
    head -c $((segment - 4)) /dev/urandom
    left=$((left - segment))
  done
  tail -c +21 "$here/photo.jpg"
}
{
  printf '{"device_id":"cam-0001","image":"'
  photo | base64 -w 0
  printf '"}'
} >"$body"

summary=$("$oha" --no-tui --redirect 0 -z "${DURATION:-30s}" -c "${CONNECTIONS:-64}" \
  -m POST -T application/json -D "$body" "$@" "$url")
printf '%s\n' "$summary"
# oha itself is content with any answer
others=$(sed -n '/^Status code distribution/,/^$/p' <<<"$summary" | grep -E '^ *\[[0-9]+\]' | grep -vF '[201]' || true)
grep -qF '[201]' <<<"$summary" || fail 'no photo was accepted'
[[ -z $others ]] || fail "not every photo was accepted:$others"
