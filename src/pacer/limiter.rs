//! The even stream of slices within the window: what an allowance means for the next slice, and the wait for it.
//!
//! Always: one payer at a time; a change of what may leave is heeded by whoever waits already. Never: a slice larger than the rate
//! of the moment allows.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::sync::watch;
use tokio::time::Instant;

use super::lock;
use super::window::{Paid, Slice, Window};
use crate::units::Rate;

/// A slice is what the allowance brings in this time at most…
const SLICE_TIME: Duration = Duration::from_millis(15);
/// …within these limits: below, headers would outweigh what they carry; above, steps would be coarse.
pub(super) const SLICE_BYTES_MIN: u64 = 1514;
const SLICE_BYTES_MAX: u64 = 128 * 1024;
/// Whole slices leave some of the window over. This part of one is worth to leave by itself; less would cut slices into ever
/// smaller ones…
const PART_WORTH: u64 = 2;
/// …as would cutting one for which there is room in a moment. So it waits first, for this part of the time in which the allowance
/// brings it.
const PATIENCE_PART: u64 = 4;
/// By how much a timer may wake late without the rate suffering for it.
const CATCH_UP: Duration = Duration::from_millis(50);
/// The part of the allowance of one [`super::window::WINDOW`] that is used: what the kernel sends by itself is found some [`super::LOOK`] later, and
/// must still find room in the second in which it left.
const WINDOW_PERMILLE: u64 = 993;
/// The even stream runs a little below that, so that the window is the exception.
const STREAM_PERMILLE: u64 = 991;
/// A cell of the limiter is what the rate brings in this time, or a byte: long enough that rounding a cell's time to
/// whole nanoseconds does not matter.
const CELL_TIME_NANOS: u64 = 20_000;

/// The numbers that follow from an allowance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) allowance: Rate,
    pub(super) slice_bytes: u64,
    /// What may go out in one [`super::window::WINDOW`].
    window_bytes: u64,
    cell_bytes: u64,
    /// Time for one cell, rounded up, so that rounding never makes it faster.
    cell_time: Duration,
    burst_cells: u32,
}

impl Plan {
    pub(super) fn new(allowance: Rate) -> Plan {
        let bytes_in = |time: Duration| (u128::from(allowance.0) * time.as_nanos() / 1_000_000_000) as u64;
        let slice_bytes = bytes_in(SLICE_TIME).clamp(SLICE_BYTES_MIN, SLICE_BYTES_MAX);
        let cell_bytes = (allowance.0 * CELL_TIME_NANOS / 1_000_000_000).max(1);
        let burst_bytes = slice_bytes + bytes_in(CATCH_UP);
        let stream = (allowance.0 * STREAM_PERMILLE / 1000).max(1);
        Plan {
            allowance,
            slice_bytes,
            window_bytes: (allowance.0 * WINDOW_PERMILLE / 1000).max(slice_bytes),
            cell_bytes,
            cell_time: Duration::from_nanos((cell_bytes * 1_000_000_000).div_ceil(stream)),
            burst_cells: burst_bytes.div_ceil(cell_bytes).clamp(1, u64::from(u32::MAX)) as u32,
        }
    }

    /// What a slice of so many bytes asks of the window.
    fn slice(&self, bytes: u64) -> Slice {
        Slice {
            bytes,
            patience: Duration::from_nanos(bytes * 1_000_000_000 / self.allowance.0.max(1) / PATIENCE_PART),
            worth_bytes: SLICE_BYTES_MIN.max(bytes / PART_WORTH),
        }
    }
}

/// Who holds it pays next.
pub(super) struct Limiter {
    plans: watch::Receiver<Option<Plan>>,
    untils: watch::Receiver<Option<Instant>>,
    plan: Plan,
    cells: DefaultDirectRateLimiter,
    clock: DefaultClock,
    window: Arc<Mutex<Window>>,
    /// Bytes paid for beyond what the slices so far needed: cells are whole, slices are not.
    credit_bytes: u64,
    /// What left without having been paid for, and is paid for before anything else leaves.
    pub(super) debt_bytes: u64,
}

impl Limiter {
    pub(super) fn new(
        plan: Plan,
        plans: watch::Receiver<Option<Plan>>,
        untils: watch::Receiver<Option<Instant>>,
        window: Arc<Mutex<Window>>,
    ) -> Limiter {
        Limiter {
            plans,
            untils,
            plan,
            cells: cells(plan),
            clock: DefaultClock::default(),
            window,
            credit_bytes: 0,
            debt_bytes: 0,
        }
    }

    /// Pays for one slice of up to `bytes`, which leaves now; for less where the window has room for no more.
    pub(super) async fn pay_slice(&mut self, bytes: u64) -> Paid {
        // the slice to which the even stream has come, whose cells are taken, and when
        let mut come: Option<(u64, Instant)> = None;
        loop {
            self.may_pour().await;
            let most = bytes.min(self.plan.slice_bytes);
            // the rate may have fallen while the window had no room
            come = come.filter(|(slice, _)| *slice <= most);
            let now = Instant::now();
            let (slice, due) = match come {
                Some(come) => come,
                None => match self.take_cells(most) {
                    Ok(()) => *come.insert((most, now)),
                    Err(wait) => (most, now + wait),
                },
            };
            let slice = self.plan.slice(slice);
            // one sleep for both rules, not one after the other
            let at = {
                let mut window = lock(&self.window);
                let (at, room) = window.next(now, due, slice, self.plan.window_bytes);
                if come.is_some() && at <= now {
                    window.leaves(room);
                    self.credit_bytes += slice.bytes - room;
                    return Paid { bytes: room, window: self.window.clone() };
                }
                at
            };
            self.unless_changed(tokio::time::sleep_until(at)).await;
        }
    }

    /// Waits until the even stream has come to a slice of up to `bytes`; how many.
    pub(super) async fn stream(&mut self, bytes: u64) -> u64 {
        loop {
            self.may_pour().await;
            let slice = bytes.min(self.plan.slice_bytes);
            match self.take_cells(slice) {
                Ok(()) => return slice,
                Err(wait) => self.unless_changed(tokio::time::sleep(wait)).await,
            }
        }
    }

    /// Waits while nothing may leave, and takes over a changed plan. What left before the change stays in the window.
    async fn may_pour(&mut self) {
        loop {
            let plan = *self.plans.borrow_and_update();
            let over = self.untils.borrow_and_update().is_some_and(|until| Instant::now() >= until);
            match plan {
                Some(plan) if !over => {
                    if plan != self.plan {
                        (self.plan, self.cells, self.credit_bytes) = (plan, cells(plan), 0);
                    }
                    return;
                }
                _ => self.unless_changed(std::future::pending()).await,
            }
        }
    }

    /// Waits for `event`, or until what may leave has changed since it was looked at.
    async fn unless_changed(&mut self, event: impl Future<Output = ()>) {
        tokio::select! {
            () = event => {}
            _ = self.plans.changed() => {}
            _ = self.untils.changed() => {}
        }
    }

    /// Takes the cells of a slice, or says how long they are not due yet.
    fn take_cells(&mut self, bytes: u64) -> Result<(), Duration> {
        let cells = bytes.saturating_sub(self.credit_bytes).div_ceil(self.plan.cell_bytes) as u32;
        if let Some(cells) = NonZeroU32::new(cells) {
            // a slice never exceeds the burst, so the other error cannot be
            if let Ok(Err(not_yet)) = self.cells.check_n(cells) {
                return Err(not_yet.wait_time_from(self.clock.now()));
            }
        }
        self.credit_bytes = self.credit_bytes + u64::from(cells) * self.plan.cell_bytes - bytes;
        Ok(())
    }
}

/// The limiter of a plan, empty: a new one is full, and would let a burst through with every change.
fn cells(plan: Plan) -> DefaultDirectRateLimiter {
    let burst = NonZeroU32::new(plan.burst_cells).unwrap_or(NonZeroU32::MIN);
    // with_period is None only for a period of zero
    let quota = Quota::with_period(plan.cell_time.max(Duration::from_nanos(1)))
        .unwrap_or(Quota::per_second(NonZeroU32::MIN))
        .allow_burst(burst);
    let cells = RateLimiter::direct(quota);
    let _ = cells.check_n(burst);
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_stream_runs_just_below_the_allowance(allowance in 100_000u64..=12_500_000_000) {
            let plan = Plan::new(Rate(allowance));
            let stream = plan.cell_bytes as f64 / plan.cell_time.as_secs_f64();
            prop_assert!((0.985..0.9911).contains(&(stream / allowance as f64)), "{stream} of {allowance}");
        }

        #[test]
        fn a_slice_always_fits_into_the_burst(allowance in 1u64..=12_500_000_000) {
            let plan = Plan::new(Rate(allowance));
            prop_assert!(plan.slice_bytes.div_ceil(plan.cell_bytes) <= u64::from(plan.burst_cells));
            prop_assert!(plan.cell_time > Duration::ZERO);
        }
    }
}
