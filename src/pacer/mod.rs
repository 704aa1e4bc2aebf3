//! The byte budget: whatever goes out is paid for here first, in small equal slices, first come first served.
//!
//! Two rules hold at once. *Smoothness* is GCRA, by governor: slices leave in an even stream, and a stream that a late timer
//! held up may catch up by [`CATCH_UP`]. *The limit* is a window over what was paid for in the last second: whatever
//! happens, no second holds more than the allowance. A token bucket alone could not do both: it lets its rate and its burst
//! through in one second, so it would have to run slower by all that it may catch up.
//!
//! Always: bytes are paid for before they enter a socket, headers and re-sent bytes included; what the kernel sends by itself
//! is charged within [`LOOK`], as long as anything is on its way. Never: a second above the allowance, or a burst at start, after idling or after a change of
//! rate; and no byte once the right to pour has run out, however long the process was held.
//!
//! `connection.rs` is the way to pay: a TCP connection that does so by itself. `tcp.rs` is what the kernel knows of one.

mod connection;
mod tcp;

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as BlockingMutex, MutexGuard, Weak};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::Instant;

pub use self::connection::{Meter, PacedConnection, Turn};
use self::tcp::TcpInfo;
use crate::units::Rate;

/// A slice is what the allowance brings in this time…
const SLICE_TIME: Duration = Duration::from_millis(4);
/// …within these limits: below, headers would outweigh what they carry; above, steps would be coarse.
const SLICE_BYTES_MIN: u64 = 1514;
const SLICE_BYTES_MAX: u64 = 64 * 1024;
/// By how much a timer may wake late without the rate suffering for it.
const CATCH_UP: Duration = Duration::from_millis(50);
/// The time over which the allowance holds, and the part of it that is used: what the kernel sends by itself is found up to
/// [`LOOK`] later, and must still find room in the second in which it left.
const WINDOW: Duration = Duration::from_secs(1);
const WINDOW_PERMILLE: u64 = 993;
/// The even stream runs a little below that, so that the window is the exception.
const STREAM_PERMILLE: u64 = 991;
/// A cell of the limiter is what the rate brings in this time, or a byte: long enough that rounding a cell's time to
/// whole nanoseconds does not matter.
const CELL_TIME_NANOS: u64 = 20_000;
/// How often to look whether the slices that are in the way have left.
const LEAVING_LOOK: Duration = Duration::from_millis(1);
/// How often all connections are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// The same while nothing is on its way: then only the farewells of connections leave.
const LOOK_IDLE: Duration = Duration::from_millis(200);

/// The budget of one drain. Cheap to clone; all clones share it.
#[derive(Clone)]
pub struct Pacer {
    inner: Arc<Inner>,
}

struct Inner {
    /// Whoever holds this pays next. A tokio mutex is fair: waiters get it in the order in which they asked.
    turn: Mutex<Limiter>,
    /// None while nothing may leave.
    plan: watch::Sender<Option<Plan>>,
    /// Nothing may leave from this moment on.
    until: watch::Sender<Option<Instant>>,
    /// What left in the last second, paid for or not.
    window: Arc<BlockingMutex<Window>>,
    /// What left without having been paid for.
    debt_bytes: AtomicU64,
    paid_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    arrived_bytes: AtomicU64,
    resent_bytes: AtomicU64,
    waiting: AtomicUsize,
    connections: BlockingMutex<Connections>,
    /// Told with every slice.
    something_leaves: Arc<Notify>,
}

#[derive(Default)]
struct Connections {
    open: Vec<Weak<Meter>>,
    /// Somebody looks at them again and again.
    looked_at: bool,
}

impl Pacer {
    /// A budget of `allowance`, empty at first.
    pub fn new(allowance: Rate) -> Pacer {
        let first = Plan::new(allowance);
        let (plan, plans) = watch::channel(Some(first));
        let (until, untils) = watch::channel(None);
        let window = Arc::new(BlockingMutex::new(Window::default()));
        Pacer {
            inner: Arc::new(Inner {
                turn: Mutex::new(Limiter::new(first, plans, untils, window.clone())),
                window,
                plan,
                until,
                debt_bytes: AtomicU64::new(0),
                paid_bytes: AtomicU64::new(0),
                sent_bytes: AtomicU64::new(0),
                arrived_bytes: AtomicU64::new(0),
                resent_bytes: AtomicU64::new(0),
                waiting: AtomicUsize::new(0),
                connections: BlockingMutex::default(),
                something_leaves: Arc::default(),
            }),
        }
    }

    /// What may go out per second now; none when nothing may.
    pub fn allowance(&self) -> Option<Rate> {
        self.inner.plan.borrow().map(|plan| plan.allowance)
    }

    /// Changes the allowance, for those who wait too; with none, nothing goes out until there is one again.
    pub fn set_allowance(&self, allowance: Option<Rate>) {
        let plan = allowance.map(Plan::new);
        self.inner.plan.send_if_modified(|current| {
            let changed = *current != plan;
            *current = plan;
            changed
        });
    }

    /// Lets bytes go out until `until` only, unless this is said again with a later moment.
    pub fn pour_until(&self, until: Instant) {
        self.inner.until.send_replace(Some(until));
    }

    /// Everything that was paid for since the start.
    pub fn paid_bytes(&self) -> u64 {
        self.inner.paid_bytes.load(Ordering::Relaxed)
    }

    /// Everything that left over its connections since the start, with all headers, as the kernel counts it.
    pub fn sent_bytes(&self) -> u64 {
        self.inner.sent_bytes.load(Ordering::Relaxed)
    }

    /// Payload that the other sides have acknowledged since the start: what is lost and sent again counts once.
    pub fn arrived_bytes(&self) -> u64 {
        self.inner.arrived_bytes.load(Ordering::Relaxed)
    }

    /// Payload that the kernel sent again since the start, because it was lost.
    pub fn resent_bytes(&self) -> u64 {
        self.inner.resent_bytes.load(Ordering::Relaxed)
    }

    /// How many wait to pay: when nobody does, the allowance is not what limits.
    pub fn waiting(&self) -> usize {
        self.inner.waiting.load(Ordering::Relaxed)
    }

    /// Waits until one slice of up to `bytes` may go out, and all at once; of how many bytes. It is fewer when the rate fell
    /// while it was waited for: no second of a low rate may hold a slice of a high one. Dropped while waiting, it has paid
    /// only for what left unpaid before.
    pub async fn pay(&self, bytes: u64) -> Paid {
        let _waits = Waits::new(&self.inner.waiting);
        let mut limiter = self.inner.turn.lock().await;
        limiter.debt_bytes += self.inner.debt_bytes.swap(0, Ordering::Relaxed);
        while limiter.debt_bytes > 0 {
            let debt_bytes = limiter.debt_bytes;
            let paid = limiter.stream(debt_bytes).await;
            limiter.debt_bytes -= paid;
            self.inner.paid_bytes.fetch_add(paid, Ordering::Relaxed);
        }
        let paid = limiter.pay_slice(bytes).await;
        self.inner.paid_bytes.fetch_add(paid.bytes, Ordering::Relaxed);
        paid
    }

    /// Takes `bytes` into account that left already: in the second in which they left, and for the next who pays.
    fn charge(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        lock(&self.inner.window).record(Instant::now(), bytes);
        self.inner.debt_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn count(&self, sent_bytes: u64, arrived_bytes: u64, resent_bytes: u64) {
        self.inner.sent_bytes.fetch_add(sent_bytes, Ordering::Relaxed);
        self.inner.resent_bytes.fetch_add(resent_bytes, Ordering::Relaxed);
        self.inner.arrived_bytes.fetch_add(arrived_bytes, Ordering::Relaxed);
    }

    /// How much of `bytes` of payload makes one slice, in full packets if there is more than one.
    fn slice_of(&self, bytes: u64, info: &TcpInfo) -> u64 {
        let slice_bytes = self.inner.plan.borrow().map_or(SLICE_BYTES_MIN, |plan| plan.slice_bytes);
        let packet_bytes = info.segment_bytes + info.header_bytes;
        let payload_bytes = match slice_bytes / packet_bytes.max(1) {
            0 => slice_bytes.saturating_sub(info.header_bytes).max(1),
            packets => packets * info.segment_bytes,
        };
        bytes.min(payload_bytes)
    }

    /// Looks at a connection again and again for as long as it is open.
    fn watch(&self, meter: &Arc<Meter>) {
        let mut connections = self.connections();
        connections.open.push(Arc::downgrade(meter));
        if !std::mem::replace(&mut connections.looked_at, true) {
            tokio::spawn(look(Arc::downgrade(&self.inner), self.inner.something_leaves.clone()));
        }
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        lock(&self.inner.connections)
    }
}

fn lock<T>(mutex: &BlockingMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Settles with every connection from time to time, until there is none.
async fn look(inner: Weak<Inner>, something_leaves: Arc<Notify>) {
    let mut on_its_way = true;
    loop {
        if on_its_way {
            tokio::time::sleep(LOOK).await;
        } else {
            let _ = tokio::time::timeout(LOOK_IDLE, something_leaves.notified()).await;
        }
        let Some(inner) = inner.upgrade() else { return };
        let pacer = Pacer { inner };
        // a meter may be dropped here, which settles too, so not under the lock
        let open: Vec<Arc<Meter>> = pacer.connections().open.iter().filter_map(Weak::upgrade).collect();
        on_its_way = false;
        for meter in &open {
            on_its_way |= meter.settle().is_on_its_way();
        }
        drop(open);
        let mut connections = pacer.connections();
        connections.open.retain(|meter| meter.strong_count() > 0);
        if connections.open.is_empty() {
            connections.looked_at = false;
            return;
        }
    }
}

/// A slice that was paid for. Whoever has it lets it leave, and drops it when it has left: a machine that is busy may hold
/// them up in between, and until then the slice is in every second.
#[must_use = "a slice that is dropped has left"]
pub struct Paid {
    bytes: u64,
    window: Arc<BlockingMutex<Window>>,
}

impl Paid {
    /// Of how many bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Paid {
    fn drop(&mut self) {
        // the moment is taken under the lock, so that the slices stay in order
        let mut window = lock(&self.window);
        window.left(Instant::now(), self.bytes);
    }
}

/// Counts one who waits.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Waits<'a> {
        waiting.fetch_add(1, Ordering::Relaxed);
        Waits(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The numbers that follow from an allowance.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    allowance: Rate,
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
            allowance,
            slice_bytes,
            window_bytes: (allowance.0 * WINDOW_PERMILLE / 1000).max(slice_bytes),
            cell_bytes,
            cell_time: Duration::from_nanos((cell_bytes * 1_000_000_000).div_ceil(stream)),
            burst_cells: burst_bytes.div_ceil(cell_bytes).clamp(1, u64::from(u32::MAX)) as u32,
        }
    }
}

struct Limiter {
    plans: watch::Receiver<Option<Plan>>,
    untils: watch::Receiver<Option<Instant>>,
    plan: Plan,
    cells: DefaultDirectRateLimiter,
    clock: DefaultClock,
    window: Arc<BlockingMutex<Window>>,
    /// Bytes paid for beyond what the slices so far needed: cells are whole, slices are not.
    credit_bytes: u64,
    /// What left without having been paid for, and is paid for before anything else leaves.
    debt_bytes: u64,
}

/// What left in the last second, slice by slice.
#[derive(Default)]
struct Window {
    slices: VecDeque<(Instant, u64)>,
    bytes: u64,
    /// Paid for, and not known to have left.
    leaving_bytes: u64,
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
        // what is in the way is just about to leave
        (excess > 0).then_some(now + LEAVING_LOOK)
    }

    /// Paid for, and about to leave.
    fn leaves(&mut self, bytes: u64) {
        self.leaving_bytes += bytes;
    }

    /// Has left, no later than now.
    fn left(&mut self, now: Instant, bytes: u64) {
        self.leaving_bytes -= bytes;
        self.record(now, bytes);
    }

    fn record(&mut self, now: Instant, bytes: u64) {
        self.slices.push_back((now, bytes));
        self.bytes += bytes;
    }
}

impl Limiter {
    fn new(
        plan: Plan,
        plans: watch::Receiver<Option<Plan>>,
        untils: watch::Receiver<Option<Instant>>,
        window: Arc<BlockingMutex<Window>>,
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

    /// Pays for one slice of up to `bytes`, which leaves now.
    async fn pay_slice(&mut self, bytes: u64) -> Paid {
        let mut slice = self.stream(bytes).await;
        loop {
            self.may_pour().await;
            if slice > self.plan.slice_bytes {
                // the rate fell while the window had no room
                slice = self.stream(bytes).await;
                continue;
            }
            let now = Instant::now();
            let earliest = {
                let mut window = lock(&self.window);
                let earliest = window.earliest(now, slice, self.plan.window_bytes);
                if earliest.is_none() {
                    window.leaves(slice);
                }
                earliest
            };
            match earliest {
                Some(at) => self.unless_changed(tokio::time::sleep_until(at)).await,
                None => return Paid { bytes: slice, window: self.window.clone() },
            }
        }
    }

    /// Waits until the even stream has come to a slice of up to `bytes`; how many.
    async fn stream(&mut self, bytes: u64) -> u64 {
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
        /// However late its payers wake up, however they come, and however late what they paid for leaves.
        #[test]
        fn no_second_holds_more_than_the_allowance(
            allowance in 1_000u64..1_000_000,
            steps in proptest::collection::vec((0u64..300, 1u64..1_000, 0u64..200), 1..200),
        ) {
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
            for (pause_ms, bytes, late_ms) in steps {
                now += Duration::from_millis(pause_ms);
                until(now, &mut window, &mut leaving, &mut gone);
                while let Some(at) = window.earliest(now, bytes, allowance) {
                    prop_assert!(at > now, "it always moves on");
                    now = at;
                    until(now, &mut window, &mut leaving, &mut gone);
                }
                window.leaves(bytes);
                leaving.push((now + Duration::from_millis(late_ms), bytes));
            }
            until(now + WINDOW, &mut window, &mut leaving, &mut gone);
            for (from, _) in &gone {
                let second = gone.iter().filter(|(at, _)| at >= from && *at < *from + WINDOW);
                prop_assert!(second.map(|(_, bytes)| bytes).sum::<u64>() <= allowance);
            }
        }

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

    async fn pay_all(pacer: &Pacer, bytes: u64) {
        let mut left = bytes;
        while left > 0 {
            left -= pacer.pay(left).await.bytes();
        }
    }

    #[tokio::test]
    async fn who_waited_while_the_rate_fell_gets_a_slice_of_the_new_one() {
        let pacer = Pacer::new(Rate(25_000_000));
        pacer.set_allowance(None);
        let payer = pacer.clone();
        let paying = tokio::spawn(async move { payer.pay(64_000).await });
        while pacer.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        pacer.set_allowance(Some(Rate(100_000)));
        assert_eq!(paying.await.unwrap().bytes(), SLICE_BYTES_MIN);
    }

    #[tokio::test]
    async fn those_who_wait_are_served_in_turn() {
        let pacer = Pacer::new(Rate(2_000_000));
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for n in 0..20 {
            let (pacer, order) = (pacer.clone(), order.clone());
            waiting.push(tokio::spawn(async move {
                drop(pacer.pay(4_000).await);
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
    async fn nothing_is_paid_while_nothing_may_leave() {
        let pacer = Pacer::new(Rate(1_000_000));
        pacer.set_allowance(None);
        let payer = pacer.clone();
        let mut paying = tokio::spawn(async move { payer.pay(1000).await });
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut paying).await.is_err());
        assert_eq!((pacer.paid_bytes(), pacer.waiting()), (0, 1));
        pacer.set_allowance(Some(Rate(1_000_000)));
        drop(paying.await.unwrap());
        assert_eq!((pacer.paid_bytes(), pacer.waiting()), (1000, 0));
    }

    #[tokio::test]
    async fn nothing_is_paid_once_the_right_to_pour_has_run_out() {
        let pacer = Pacer::new(Rate(1_000_000));
        pacer.pour_until(Instant::now());
        let payer = pacer.clone();
        let mut paying = tokio::spawn(async move { payer.pay(1000).await });
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut paying).await.is_err());
        assert_eq!(pacer.paid_bytes(), 0);
        pacer.pour_until(Instant::now() + Duration::from_secs(60));
        drop(paying.await.unwrap());
    }

    #[tokio::test]
    async fn who_waits_for_a_slow_rate_is_served_at_once_when_it_rises() {
        let pacer = Pacer::new(Rate(1));
        let payer = pacer.clone();
        let paying = tokio::spawn(async move { pay_all(&payer, 1000).await });
        while pacer.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        pacer.set_allowance(Some(Rate(10_000_000)));
        tokio::time::timeout(Duration::from_secs(5), paying)
            .await
            .expect("it would take a quarter of an hour")
            .unwrap();
        assert_eq!(pacer.allowance(), Some(Rate(10_000_000)));
    }

    #[tokio::test]
    async fn what_left_unpaid_is_paid_by_the_next() {
        let pacer = Pacer::new(Rate(50_000_000));
        pacer.charge(300_000);
        drop(pacer.pay(1000).await);
        assert_eq!(pacer.paid_bytes(), 301_000);
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

    #[tokio::test]
    async fn what_is_paid_is_counted_to_the_byte() {
        let pacer = Pacer::new(Rate(50_000_000));
        for bytes in [1, 511, 70_000, 123_457] {
            pay_all(&pacer, bytes).await;
        }
        assert_eq!(pacer.paid_bytes(), 1 + 511 + 70_000 + 123_457);
    }
}
