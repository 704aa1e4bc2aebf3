// A fleet of devices, as an open model: photos come at their rate whether or not the earlier ones were answered, as
// cameras do. Started by loadtest/run.
//
// Every photo is a real JPEG of PHOTO_BYTES, with bytes and an upload_id that no other photo has.
import http from 'k6/http';
import exec from 'k6/execution';
import { SharedArray } from 'k6/data';
import { b64encode } from 'k6/encoding';
import { check } from 'k6';

const DEVICES = whole('DEVICES', 1000, 1, 9999);
const PER_MINUTE = whole('PER_MINUTE', 2, 1, 600);
const PHOTO_BYTES = whole('PHOTO_BYTES', 250000, 1000, 10 * 1024 * 1024);
const DURATION = __ENV.DURATION || '60s';
const URL = __ENV.URL || 'http://127.0.0.1:8080/';

if (!/^https?:\/\/(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?(\/|$)/.test(URL) && __ENV.ALLOW_REMOTE !== '1') {
  throw new Error(`${URL} is not on this machine: set ALLOW_REMOTE=1 if that is where the load is meant to go`);
}

// What the photo's own comment says, padded; a multiple of 3, so that its base64 can be put in between two others.
const MARK_BYTES = 60;

export const options = {
  scenarios: {
    fleet: {
      executor: 'constant-arrival-rate',
      rate: DEVICES * PER_MINUTE,
      timeUnit: '1m',
      duration: DURATION,
      // one waits for each answer: enough for answers that take three seconds, before which p(99) has long failed
      preAllocatedVUs: Math.max(10, Math.ceil((DEVICES * PER_MINUTE) / 60)),
      maxVUs: Math.max(20, Math.ceil((DEVICES * PER_MINUTE) / 20)),
      gracefulStop: '30s',
    },
  },
  // a redirect would lead away from the host that was checked
  maxRedirects: 0,
  summaryTrendStats: ['avg', 'med', 'p(95)', 'p(99)', 'max'],
  thresholds: {
    checks: ['rate==1'],
    http_req_failed: ['rate==0'],
    http_req_duration: ['p(99)<1000'],
    // a photo that was not sent on time would flatter the figures
    dropped_iterations: ['count==0'],
  },
};

// Made once for all: the base64 before and after the mark.
const base = new SharedArray('photo', () => {
  const jpeg = new Uint8Array(open('./photo.jpg', 'b'));
  const head = 20; // SOI and the JFIF header, which wants to be first; with the mark's own 4 bytes, a multiple of 3
  const photo = new Uint8Array(PHOTO_BYTES);
  photo.set(jpeg.subarray(0, head));
  photo.set([0xff, 0xfe, 0, MARK_BYTES + 2], head);
  let at = head + 4 + MARK_BYTES;
  const end = PHOTO_BYTES - (jpeg.length - head);
  let noise = 0x9e3779b9; // so that nothing on the way can compress the photo
  while (at < end) {
    let segment = Math.min(end - at, 0xffff + 2);
    if (end - at - segment > 0 && end - at - segment < 4) segment -= 4; // the last one needs room for its own head
    photo.set([0xff, 0xfe, (segment - 2) >> 8, (segment - 2) & 0xff], at);
    for (let i = at + 4; i < at + segment; i++) {
      noise ^= noise << 13;
      noise ^= noise >>> 17;
      noise ^= noise << 5;
      photo[i] = noise;
    }
    at += segment;
  }
  photo.set(jpeg.subarray(head), end);
  return [b64encode(photo.slice(0, head + 4).buffer), b64encode(photo.slice(head + 4 + MARK_BYTES).buffer)];
});
const [before, after] = [base[0], base[1]];

export function setup() {
  // a second run is made of new photos, not of retries of the first one's
  return { run: Date.now().toString(36) };
}

export default function ({ run }) {
  const n = exec.scenario.iterationInTest;
  const device = `cam-${String((n % DEVICES) + 1).padStart(4, '0')}`;
  const upload = `${run}-${n}`;
  const mark = b64encode(`${device} ${upload}`.padEnd(MARK_BYTES));
  // put together by hand: JSON.stringify would look at every character of the photo for one to escape
  const body = `{"device_id":"${device}","upload_id":"${upload}","image":"${before}${mark}${after}"}`;
  const answer = http.post(URL, body, { headers: { 'Content-Type': 'application/json' }, timeout: '30s' });
  check(answer, {
    'is accepted (201)': (r) => r.status === 201,
    'all of the photo is acknowledged': (r) => r.status === 201 && r.json('size_bytes') === PHOTO_BYTES,
  });
}

function whole(name, otherwise, min, max) {
  const value = Number(__ENV[name] || otherwise);
  if (!Number.isInteger(value) || value < min || value > max) {
    throw new Error(`${name}: expected a whole number from ${min} to ${max}, found "${__ENV[name]}"`);
  }
  return value;
}
