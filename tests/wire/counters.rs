//! What went over interfaces, from the kernel's own counters, and what that was per second.
//!
//! Always: every Ethernet frame counts with its head of 14 bytes; a sample bears the moment at which it was read, and windows
//! are measured by those moments, never by when a sample was due.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::namespace::{Namespace, be_urgent};

const EVERY: Duration = Duration::from_millis(100);
/// A window may be shorter than asked for by this much, as samples are some microseconds early or late.
const SLACK: Duration = Duration::from_millis(50);
/// A reading that took longer is done again: its moment is not known well enough.
const READING_MAX: Duration = Duration::from_millis(1);
/// The largest frame: an MTU of 1500, and the head.
const FRAME_BYTES_MAX: u64 = 1514;
pub const FRAME_HEAD_BYTES: u64 = 14;
/// Less within one sample is no payload: addresses being asked for, connections being closed.
const PAYLOAD_BYTES: u64 = 4_000;

/// One counter of one interface.
#[derive(Clone)]
pub struct Counter {
    pub interface: String,
    /// What it sent, not what it received.
    pub sent: bool,
    /// A TUN device has no Ethernet, so its frames' heads are added.
    pub adds_heads: bool,
}

struct Sample {
    at: Instant,
    bytes: Vec<u64>,
}

/// Reads counters until it is dropped.
pub struct Sampler {
    samples: Arc<Mutex<Vec<Sample>>>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Sampler {
    /// Of interfaces that are all in one namespace.
    pub fn start(namespace: &Namespace, counters: Vec<Counter>) -> Sampler {
        let (samples, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (of_thread, stops) = (samples.clone(), stop.clone());
        // a thread begins in the namespace of the one that starts it
        let thread = namespace.within(|| std::thread::spawn(move || sample(&counters, &of_thread, &stops)));
        Sampler { samples, stop, thread }
    }

    /// All its counters together so far.
    pub fn trace(&self) -> Trace {
        self.traced(|bytes| bytes.iter().sum())
    }

    /// One counter so far.
    pub fn trace_of(&self, counter: usize) -> Trace {
        self.traced(|bytes| bytes[counter])
    }

    fn traced(&self, pick: impl Fn(&[u64]) -> u64) -> Trace {
        assert!(!self.thread.is_finished(), "the counters cannot be read any more");
        Trace(self.samples.lock().unwrap().iter().map(|sample| (sample.at, pick(&sample.bytes))).collect())
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn sample(counters: &[Counter], samples: &Mutex<Vec<Sample>>, stop: &AtomicBool) {
    be_urgent();
    let mut due = Instant::now();
    let mut before: Vec<(u64, u64)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let (at, read) = loop {
            let began = Instant::now();
            let Some(read) = read(counters) else { return };
            if began.elapsed() < READING_MAX {
                break (began + began.elapsed() / 2, read);
            }
        };
        for ((bytes, frames), (bytes_before, frames_before)) in read.iter().zip(&before) {
            let most = (frames - frames_before) * FRAME_BYTES_MAX;
            assert!(bytes - bytes_before <= most, "larger frames than a wire has: the interface cuts them up itself");
        }
        samples.lock().unwrap().push(Sample { at, bytes: read.iter().map(|(bytes, _)| *bytes).collect() });
        before = read;
        due += EVERY;
        match due.checked_duration_since(Instant::now()) {
            Some(left) => std::thread::sleep(left),
            None => due = Instant::now(),
        }
    }
}

/// Bytes and frames of each counter now.
fn read(counters: &[Counter]) -> Option<Vec<(u64, u64)>> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    counters
        .iter()
        .map(|counter| {
            let (_, numbers) = table
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.trim() == counter.interface)?;
            let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect();
            let first = if counter.sent { 8 } else { 0 };
            let (bytes, frames) = (*numbers.get(first)?, *numbers.get(first + 1)?);
            Some((bytes + if counter.adds_heads { frames * FRAME_HEAD_BYTES } else { 0 }, frames))
        })
        .collect()
}

/// A counter's way through time.
pub struct Trace(Vec<(Instant, u64)>);

impl Trace {
    /// What lies between two moments.
    pub fn between(&self, from: Instant, until: Instant) -> Trace {
        Trace(self.0.iter().copied().filter(|(at, _)| *at >= from && *at <= until).collect())
    }

    pub fn since(&self, from: Instant) -> Trace {
        Trace(self.0.iter().copied().filter(|(at, _)| *at >= from).collect())
    }

    pub fn bytes(&self) -> u64 {
        self.0.last().zip(self.0.first()).map_or(0, |(last, first)| last.1 - first.1)
    }

    /// Bytes per second over all of it.
    pub fn mean(&self) -> f64 {
        let Some(((until, _), (from, _))) = self.0.last().zip(self.0.first()) else { return 0.0 };
        self.bytes() as f64 / (*until - *from).as_secs_f64().max(1e-9)
    }

    /// The highest bytes per second of any window of this many seconds. One that is some microseconds too short is taken as
    /// if it were whole: its bytes went out within one that is.
    pub fn highest(&self, seconds: u64) -> f64 {
        // a trace without a window says nothing, and nothing may pass by it
        let windows = self.windows(seconds).map(|(bytes, took)| bytes / took.max(seconds as f64));
        windows.max_by(f64::total_cmp).unwrap_or(f64::INFINITY)
    }

    /// When the highest window of this many seconds ended.
    pub fn highest_ends(&self, seconds: u64) -> Option<Instant> {
        self.ends(seconds).max_by(|(_, one, _), (_, other, _)| one.total_cmp(other)).map(|(at, ..)| at)
    }

    /// The lowest; none when it is shorter than a window.
    pub fn lowest(&self, seconds: u64) -> Option<f64> {
        self.windows(seconds).map(|(bytes, took)| bytes / took).min_by(f64::total_cmp)
    }

    /// The end of the first window at or above this rate.
    pub fn reaches(&self, bytes_per_second: f64, seconds: u64) -> Option<Instant> {
        self.ends(seconds).find(|(_, bytes, took)| bytes / took >= bytes_per_second).map(|(at, ..)| at)
    }

    /// The last moment before so many bytes had gone.
    pub fn until_bytes(&self, bytes: u64) -> Option<Instant> {
        let first = self.0.first()?.1;
        self.0.iter().take_while(|(_, so_far)| so_far - first <= bytes).last().map(|(at, _)| *at)
    }

    /// The first sample in which payload went: when it began and when it ended.
    pub fn first_payload(&self) -> Option<(Instant, Instant)> {
        let pair = self.0.windows(2).find(|pair| pair[1].1 - pair[0].1 >= PAYLOAD_BYTES)?;
        Some((pair[0].0, pair[1].0))
    }

    fn windows(&self, seconds: u64) -> impl Iterator<Item = (f64, f64)> {
        self.ends(seconds).map(|(_, bytes, took)| (bytes, took))
    }

    /// For each sample the window that begins there: its end, bytes and seconds.
    fn ends(&self, seconds: u64) -> impl Iterator<Item = (Instant, f64, f64)> {
        let least = Duration::from_secs(seconds) - SLACK;
        let mut last = 0;
        self.0.iter().map_while(move |(from, bytes)| {
            while self.0.get(last)?.0 - *from < least {
                last += 1;
            }
            let (until, bytes_until) = self.0[last];
            Some((until, (bytes_until - bytes) as f64, (until - *from).as_secs_f64()))
        })
    }
}
