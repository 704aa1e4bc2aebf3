//! The byte budget: whatever goes out is paid for here first, in small equal slices, first come first served.
//!
//! The arithmetic is GCRA, by governor. A limiter of rate `r` and burst `b` lets through at most `r + b` bytes in any
//! second, so the limiter runs at `allowance - b`: no one-second window is above the allowance, and the mean is short of it
//! by `b` a second. `b` is one slice plus what the rate brings in the time by which a timer may be late; without that
//! second part every late wake-up would be lost for good.
//!
//! Always: bytes are paid for before they enter a socket, re-sent bytes again. Never: a burst at start, after idling or after
//! a change of rate beyond that `b`.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::sync::Mutex;

use crate::units::Rate;

/// A slice is what the allowance brings in this time…
const SLICE_TIME: Duration = Duration::from_millis(4);
/// …within these limits: below, headers would outweigh what they carry; above, steps would be coarse.
const SLICE_BYTES_MIN: u64 = 512;
const SLICE_BYTES_MAX: u64 = 64 * 1024;
/// By how much a timer may wake late without the rate suffering for it.
const TIMER_LAG: Duration = Duration::from_millis(3);
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
    allowance: AtomicU64,
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
                allowance: AtomicU64::new(allowance.0),
                slice_bytes: AtomicU64::new(plan.slice_bytes),
                paid_bytes: AtomicU64::new(0),
            }),
        }
    }

    /// What may go out per second now.
    pub fn allowance(&self) -> Rate {
        Rate(self.inner.allowance.load(Ordering::Relaxed))
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
        let burst_cells = (slice_bytes + bytes_in(TIMER_LAG)).div_ceil(cell_bytes).clamp(1, u64::from(u32::MAX));
        let burst_bytes = burst_cells * cell_bytes;
        // a very slow link keeps half of its rate, whatever the burst
        let sustained = allowance.0.saturating_sub(burst_bytes).max(allowance.0 / 2).max(1);
        let cell_nanos = (u128::from(cell_bytes) * 1_000_000_000).div_ceil(u128::from(sustained));
        Plan {
            slice_bytes,
            cell_bytes,
            cell_time: Duration::from_nanos(cell_nanos as u64),
            burst_cells: burst_cells as u32,
        }
    }
}

struct Limiter {
    plan: Plan,
    cells: DefaultDirectRateLimiter,
    clock: DefaultClock,
    /// Bytes paid for beyond what the slices so far needed: cells are whole, slices are not.
    credit_bytes: u64,
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
        Limiter { plan, cells, clock: DefaultClock::default(), credit_bytes: 0 }
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Over any second: what the burst lets through at once, and what the rate brings.
        #[test]
        fn no_second_is_above_the_allowance(allowance in 20_000u64..=12_500_000_000) {
            let plan = Plan::new(Rate(allowance));
            let burst = u64::from(plan.burst_cells) * plan.cell_bytes;
            let cells_a_second = 1_000_000_000 / plan.cell_time.as_nanos() as u64;
            prop_assert!(burst + cells_a_second * plan.cell_bytes <= allowance);
        }

        #[test]
        fn the_mean_is_at_least_98_percent_from_half_a_megabyte_a_second(allowance in 500_000u64..=12_500_000_000) {
            let plan = Plan::new(Rate(allowance));
            let sustained = plan.cell_bytes as f64 / plan.cell_time.as_secs_f64();
            prop_assert!(sustained >= 0.98 * allowance as f64, "{sustained} of {allowance}");
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
