//! What left in the last second, and what is about to leave.
//!
//! Always: a slice is in every second from when it was paid for until it has left, and in the second behind that. Never: a second
//! that forgets what left in it because the rate has changed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::lock;

/// The time over which the allowance holds.
pub(super) const WINDOW: Duration = Duration::from_secs(1);
/// How often to look whether the slices that are in the way have left.
const LEAVING_LOOK: Duration = Duration::from_millis(5);

/// What left in the last second, slice by slice.
#[derive(Default)]
pub(super) struct Window {
    slices: VecDeque<(Instant, u64)>,
    bytes: u64,
    /// Paid for, and not known to have left.
    pub(super) leaving_bytes: u64,
}

/// What wants to go out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slice {
    pub(super) bytes: u64,
    /// So long it waits until there is room for all of it…
    pub(super) patience: Duration,
    /// …before it goes out as far as there is room, if that is so much at least.
    pub(super) worth_bytes: u64,
}

impl Window {
    /// When `bytes` may go out at the earliest, if not now.
    pub(super) fn earliest(&mut self, now: Instant, bytes: u64, window_bytes: u64) -> Option<Instant> {
        while let Some((at, gone)) = self.slices.front().copied() {
            if at + WINDOW > now {
                break;
            }
            self.bytes -= gone;
            self.slices.pop_front();
        }
        let held = self.bytes + self.leaving_bytes;
        let excess = (held + bytes).checked_sub(window_bytes).filter(|excess| *excess > 0)?;
        // a slice larger than the window goes out alone
        let mut excess = excess.min(held);
        for (at, gone) in &self.slices {
            excess = excess.saturating_sub(*gone);
            if excess == 0 {
                return Some(*at + WINDOW);
            }
        }
        // what is in the way is about to leave
        (excess > 0).then_some(now + LEAVING_LOOK)
    }

    /// When a slice that is not due before `due` may go out, and how much of it.
    pub(super) fn next(&mut self, now: Instant, due: Instant, slice: Slice, window_bytes: u64) -> (Instant, u64) {
        let all_at = self.earliest(now, slice.bytes, window_bytes).map_or(due, |at| at.max(due));
        if all_at > due + slice.patience {
            let room = self.room_at(due, window_bytes);
            if room >= slice.worth_bytes {
                return (due, room);
            }
        }
        (all_at, slice.bytes)
    }

    /// The room that there is at `at` if nothing more leaves or is paid for until then.
    fn room_at(&self, at: Instant, window_bytes: u64) -> u64 {
        let past = self.slices.iter().take_while(|(left, _)| *left + WINDOW <= at);
        let past_bytes: u64 = past.map(|(_, bytes)| bytes).sum();
        window_bytes.saturating_sub(self.bytes - past_bytes + self.leaving_bytes)
    }

    /// Paid for, and about to leave.
    pub(super) fn leaves(&mut self, bytes: u64) {
        self.leaving_bytes += bytes;
    }

    /// Has left, no later than now.
    pub(super) fn left(&mut self, now: Instant, bytes: u64) {
        self.leaving_bytes -= bytes;
        self.record(now, bytes);
    }

    /// Left at `now` without having been paid for, or announced by [`Window::leaves`].
    pub(super) fn record(&mut self, now: Instant, bytes: u64) {
        self.slices.push_back((now, bytes));
        self.bytes += bytes;
    }
}

/// A slice that was paid for. Whoever has it lets it leave, and drops it when it has left: a machine that is busy or a kernel
/// that paces by itself may hold it up in between, and until then the slice is in every second.
#[must_use = "a slice that is dropped has left"]
pub struct Paid {
    pub(super) bytes: u64,
    pub(super) window: Arc<Mutex<Window>>,
}

impl Paid {
    /// Of how many bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of it has left but so many bytes at most.
    pub(super) fn all_left_but(&mut self, bytes: u64) {
        let gone = self.bytes.saturating_sub(bytes);
        if gone > 0 {
            self.bytes -= gone;
            // the moment is taken under the lock, so that what left stays in order
            let mut window = lock(&self.window);
            window.left(Instant::now(), gone);
        }
    }

    /// Is one with `other`, which leaves behind it.
    pub(super) fn append(&mut self, mut other: Paid) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Paid {
    fn drop(&mut self) {
        self.all_left_but(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However late its payers wake up, however they come, and however late what they paid for leaves.
        #[test]
        fn no_second_holds_more_than_the_allowance(
            allowance in 1_000u64..1_000_000,
            steps in proptest::collection::vec((0u64..300, 1u64..1_000, 0u64..200, 0u64..50), 1..200),
            worth_bytes in 1u64..1_500,
            patience_ms in 0u64..100,
        ) {
            let patience = Duration::from_millis(patience_ms);
            let (mut window, mut now) = (Window::default(), Instant::now());
            let (mut leaving, mut gone) = (Vec::new(), Vec::new());
            let until = |now: Instant, window: &mut Window, leaving: &mut Vec<(Instant, u64)>, gone: &mut Vec<_>| {
                leaving.sort();
                while leaving.first().is_some_and(|(at, _)| *at <= now) {
                    let (at, bytes) = leaving.remove(0);
                    window.left(at, bytes);
                    gone.push((at, bytes));
                }
            };
            for (pause_ms, bytes, late_ms, due_ms) in steps {
                now += Duration::from_millis(pause_ms);
                until(now, &mut window, &mut leaving, &mut gone);
                let due = now + Duration::from_millis(due_ms);
                let bytes = loop {
                    let (at, room) = window.next(now, due, Slice { bytes, patience, worth_bytes }, allowance);
                    prop_assert!(at >= due && (1..=bytes).contains(&room));
                    match (at, room) {
                        (at, room) if at <= now => break room,
                        (at, _) => {
                            now = at;
                            until(now, &mut window, &mut leaving, &mut gone);
                        }
                    }
                };
                window.leaves(bytes);
                leaving.push((now + Duration::from_millis(late_ms), bytes));
            }
            until(now + WINDOW, &mut window, &mut leaving, &mut gone);
            for (from, _) in &gone {
                let second = gone.iter().filter(|(at, _)| at >= from && *at < *from + WINDOW);
                prop_assert!(second.map(|(_, bytes)| bytes).sum::<u64>() <= allowance);
            }
        }
    }

    fn slice(bytes: u64, patience_ms: u64, worth_bytes: u64) -> Slice {
        Slice { bytes, patience: Duration::from_millis(patience_ms), worth_bytes }
    }

    #[test]
    fn the_room_that_whole_slices_leave_is_used_if_it_is_worth_a_slice_of_its_own() {
        let (now, mut window) = (Instant::now(), Window::default());
        (0..9).for_each(|_| window.record(now, 100));
        assert_eq!(window.next(now, now, slice(100, 0, 30), 950), (now, 50));
        assert_eq!(window.next(now, now, slice(100, 0, 51), 950), (now + WINDOW, 100));
        assert_eq!(window.next(now, now, slice(100, 0, 51), 1000), (now, 100), "all of it");
    }

    #[test]
    fn a_slice_is_not_cut_for_which_there_is_room_in_a_moment() {
        let (now, mut window) = (Instant::now(), Window::default());
        (0..9).for_each(|_| window.record(now, 100));
        let due = now + WINDOW - Duration::from_millis(3);
        assert_eq!(window.next(now, due, slice(100, 3, 30), 950), (now + WINDOW, 100));
        assert_eq!(window.next(now, due, slice(100, 2, 30), 950), (due, 50));
    }

    #[test]
    fn what_will_have_left_the_second_when_a_slice_is_due_leaves_room_for_it() {
        let (now, mut window) = (Instant::now(), Window::default());
        window.record(now, 60);
        window.record(now + Duration::from_millis(10), 40);
        let due = now + WINDOW + Duration::from_millis(5);
        assert_eq!(window.next(now + Duration::from_millis(20), due, slice(80, 0, 50), 100), (due, 60));
    }

    #[test]
    fn after_a_fall_of_the_rate_the_second_behind_it_counts() {
        let (now, mut window) = (Instant::now(), Window::default());
        window.record(now, 900);
        window.record(now + Duration::from_millis(10), 100);
        let later = now + Duration::from_millis(20);
        assert_eq!(window.earliest(later, 50, 100), Some(now + Duration::from_millis(10) + WINDOW));
        assert_eq!(window.earliest(later, 500, 100), Some(now + Duration::from_millis(10) + WINDOW), "larger than all");
    }
}
