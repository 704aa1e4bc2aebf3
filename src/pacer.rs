//! The byte budget: whatever goes out is paid for here first, in small equal slices, first come first served.
//!
//! Two rules hold at once. *Smoothness* is GCRA, by governor: slices leave in an even stream, and a stream that a late timer
//! held up may catch up by [`CATCH_UP`]. *The limit* is a window over what was paid for in the last second: whatever
//! happens, no second holds more than the allowance. A token bucket alone could not do both: it lets its rate and its burst
//! through in one second, so it would have to run slower by all that it may catch up.
//!
//! Always: bytes are paid for before they enter a socket, re-sent bytes again. Never: a second above the allowance, or a
//! burst at start, after idling or after a change of rate.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use crate::units::Rate;

/// A slice is what the allowance brings in this time…
const SLICE_TIME: Duration = Duration::from_millis(4);
/// …within these limits: below, headers would outweigh what they carry; above, steps would be coarse.
const SLICE_BYTES_MIN: u64 = 512;
const SLICE_BYTES_MAX: u64 = 64 * 1024;
/// By how much a timer may wake late without the rate suffering for it.
const CATCH_UP: Duration = Duration::from_millis(50);
/// The even stream runs a little below the limit, so that the window is the exception.
const STREAM_PERMILLE: u64 = 995;
/// The time over which the allowance holds.
const WINDOW: Duration = Duration::from_secs(1);
/// A cell of the limiter is what the rate brings in this time, or a byte: long enough that rounding a cell's time to
/// whole nanoseconds does not matter.
const CELL_TIME_NANOS: u64 = 20_000;

/// The budget of one drain. Cheap to clone; all clones share it.
#[derive(Clone)]
pub struct Pacer {
    inner: Arc<Inner>,
}

struct Inner {
    /// Whoever holds this pays next. A tokio mutex is fair: waiters get it in the order in which they asked.
    turn: Mutex<Limiter>,
    /// None while nothing may be paid.
    allowance: watch::Sender<Option<Rate>>,
    slice_bytes: AtomicU64,
    paid_bytes: AtomicU64,
}

impl Pacer {
    /// A budget of `allowance`, empty at first.
    pub fn new(allowance: Rate) -> Pacer {
        let plan = Plan::new(allowance);
        Pacer {
            inner: Arc::new(Inner {
                turn: Mutex::new(Limiter::new(plan)),
                allowance: watch::Sender::new(Some(allowance)),
                slice_bytes: AtomicU64::new(plan.slice_bytes),
                paid_bytes: AtomicU64::new(0),
            }),
        }
    }

    /// What may go out per second now; none while nothing may be paid.
    pub fn allowance(&self) -> Option<Rate> {
        *self.inner.allowance.borrow()
    }

    /// From the next slice on.
    pub fn set_allowance(&self, allowance: Option<Rate>) {
        if let Some(rate) = allowance {
            self.inner.slice_bytes.store(Plan::new(rate).slice_bytes, Ordering::Relaxed);
        }
        self.inner.allowance.send_replace(allowance);
    }

    /// How much goes out in one step.
    pub fn slice_bytes(&self) -> usize {
        self.inner.slice_bytes.load(Ordering::Relaxed) as usize
    }

    /// Everything that was paid for since the start.
    pub fn paid_bytes(&self) -> u64 {
        self.inner.paid_bytes.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` may go out. Dropped while waiting, it has paid only for the slices that were due.
    pub async fn pay(&self, bytes: u64) {
        let mut left = bytes;
        while left > 0 {
            let mut limiter = self.inner.turn.lock().await;
            let mut allowed = self.inner.allowance.subscribe();
            // the sender is in the same place as this, so it is there
            let Ok(Some(rate)) = allowed.wait_for(Option::is_some).await.map(|rate| *rate) else { return };
            if limiter.plan != Plan::new(rate) {
                let window = std::mem::take(&mut limiter.window);
                *limiter = Limiter { window, ..Limiter::new(Plan::new(rate)) };
            }
            let slice = left.min(limiter.plan.slice_bytes);
            limiter.pay(slice).await;
            self.inner.paid_bytes.fetch_add(slice, Ordering::Relaxed);
            left -= slice;
        }
    }
}

/// The numbers that follow from an allowance.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    slice_bytes: u64,
    /// What may go out in one [`WINDOW`].
    window_bytes: u64,
    cell_bytes: u64,
    /// Time for one cell, rounded up, so that rounding never makes it faster.
    cell_time: Duration,
    burst_cells: u32,
}

impl Plan {
    fn new(allowance: Rate) -> Plan {
        let bytes_in = |time: Duration| (u128::from(allowance.0) * time.as_nanos() / 1_000_000_000) as u64;
        let slice_bytes = bytes_in(SLICE_TIME).clamp(SLICE_BYTES_MIN, SLICE_BYTES_MAX);
        let cell_bytes = (allowance.0 * CELL_TIME_NANOS / 1_000_000_000).max(1);
        let burst_bytes = slice_bytes + bytes_in(CATCH_UP);
        let stream = (allowance.0 * STREAM_PERMILLE / 1000).max(1);
        Plan {
            slice_bytes,
            window_bytes: allowance.0.max(slice_bytes),
            cell_bytes,
            cell_time: Duration::from_nanos((cell_bytes * 1_000_000_000).div_ceil(stream)),
            burst_cells: burst_bytes.div_ceil(cell_bytes).clamp(1, u64::from(u32::MAX)) as u32,
        }
    }
}

struct Limiter {
    plan: Plan,
    cells: DefaultDirectRateLimiter,
    clock: DefaultClock,
    window: Window,
    /// Bytes paid for beyond what the slices so far needed: cells are whole, slices are not.
    credit_bytes: u64,
}

/// What was paid for in the last second, slice by slice.
#[derive(Default)]
struct Window {
    slices: VecDeque<(Instant, u64)>,
    bytes: u64,
}

impl Window {
    /// When `bytes` may go out at the earliest, if not now.
    fn earliest(&mut self, now: Instant, bytes: u64, window_bytes: u64) -> Option<Instant> {
        while let Some((at, gone)) = self.slices.front().copied() {
            if at + WINDOW > now {
                break;
            }
            self.bytes -= gone;
            self.slices.pop_front();
        }
        let mut excess = (self.bytes + bytes).checked_sub(window_bytes).filter(|excess| *excess > 0)?;
        for (at, gone) in &self.slices {
            excess = excess.saturating_sub(*gone);
            if excess == 0 {
                return Some(*at + WINDOW);
            }
        }
        None // a slice larger than the window: it goes out alone
    }

    fn record(&mut self, now: Instant, bytes: u64) {
        self.slices.push_back((now, bytes));
        self.bytes += bytes;
    }
}

impl Limiter {
    fn new(plan: Plan) -> Limiter {
        let burst = NonZeroU32::new(plan.burst_cells).unwrap_or(NonZeroU32::MIN);
        // with_period is None only for a period of zero
        let quota = Quota::with_period(plan.cell_time.max(Duration::from_nanos(1)))
            .unwrap_or(Quota::per_second(NonZeroU32::MIN))
            .allow_burst(burst);
        let cells = RateLimiter::direct(quota);
        // a new limiter is full; empty it, or every change would let a burst through
        let _ = cells.check_n(burst);
        Limiter { plan, cells, clock: DefaultClock::default(), window: Window::default(), credit_bytes: 0 }
    }

    async fn pay(&mut self, bytes: u64) {
        let owed = bytes.saturating_sub(self.credit_bytes);
        let cells = owed.div_ceil(self.plan.cell_bytes) as u32;
        if let Some(cells) = NonZeroU32::new(cells) {
            // a slice never exceeds the burst, so the other error cannot be
            while let Ok(Err(not_yet)) = self.cells.check_n(cells) {
                tokio::time::sleep(not_yet.wait_time_from(self.clock.now())).await;
            }
        }
        self.credit_bytes = self.credit_bytes + u64::from(cells) * self.plan.cell_bytes - bytes;
        while let Some(at) = self.window.earliest(Instant::now(), bytes, self.plan.window_bytes) {
            tokio::time::sleep_until(at).await;
        }
        self.window.record(Instant::now(), bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However late its payers wake up, and however they come.
        #[test]
        fn no_second_holds_more_than_the_allowance(
            allowance in 1_000u64..1_000_000,
            steps in proptest::collection::vec((0u64..300, 1u64..1_000), 1..400),
        ) {
            let (start, mut window, mut gone) = (Instant::now(), Window::default(), Vec::new());
            let mut now = start;
            for (pause_ms, bytes) in steps {
                now += Duration::from_millis(pause_ms);
                while let Some(at) = window.earliest(now, bytes, allowance) {
                    prop_assert!(at > now, "it always moves on");
                    now = at;
                }
                window.record(now, bytes);
                gone.push((now, bytes));
                let in_the_last_second: u64 =
                    gone.iter().filter(|(at, _)| *at + WINDOW > now).map(|(_, bytes)| bytes).sum();
                prop_assert!(in_the_last_second <= allowance);
            }
        }

        #[test]
        fn the_stream_runs_just_below_the_allowance(allowance in 100_000u64..=12_500_000_000) {
            let plan = Plan::new(Rate(allowance));
            let stream = plan.cell_bytes as f64 / plan.cell_time.as_secs_f64();
            prop_assert!((0.99..0.9951).contains(&(stream / allowance as f64)), "{stream} of {allowance}");
        }

        #[test]
        fn a_slice_always_fits_into_the_burst(allowance in 1u64..=12_500_000_000) {
            let plan = Plan::new(Rate(allowance));
            prop_assert!(plan.slice_bytes.div_ceil(plan.cell_bytes) <= u64::from(plan.burst_cells));
            prop_assert!(plan.cell_time > Duration::ZERO);
        }
    }

    #[tokio::test]
    async fn those_who_wait_are_served_in_turn() {
        let pacer = Pacer::new(Rate(2_000_000));
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for n in 0..20 {
            let (pacer, order) = (pacer.clone(), order.clone());
            waiting.push(tokio::spawn(async move {
                pacer.pay(4_000).await;
                order.lock().unwrap().push(n);
            }));
            tokio::task::yield_now().await;
        }
        for task in waiting {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn what_is_paid_is_counted_to_the_byte() {
        let pacer = Pacer::new(Rate(50_000_000));
        for bytes in [1, 511, 70_000, 123_457] {
            pacer.pay(bytes).await;
        }
        assert_eq!(pacer.paid_bytes(), 1 + 511 + 70_000 + 123_457);
    }
}
