//! The byte budget: whatever goes out is paid for here first, in small equal slices, first come first served.
//!
//! Two rules hold at once. *Smoothness* is GCRA, by governor: slices leave in an even stream, and a stream that a late timer
//! held up may catch up by some milliseconds. *The limit* is a window over what was paid for in the last second: whatever
//! happens, no second holds more than the allowance. A token bucket alone could not do both: it lets its rate and its burst
//! through in one second, so it would have to run slower by all that it may catch up.
//!
//! Always: bytes are paid for before they enter a socket, headers and re-sent bytes included; what the kernel sends by itself
//! is charged within [`LOOK`] or a little more, and a last acknowledgement or farewell within [`LOOK_ALL`]. Never: a second above the
//! allowance, or a burst at start, after idling or after a change of rate; and no byte once the right to pour has run out,
//! however long the process was held.
//!
//! `limiter.rs` is the even stream, `window.rs` the limit. `connection.rs` is the way to pay: a TCP connection that does so by
//! itself. `tcp.rs` is what the kernel knows of one.

mod connection;
mod limiter;
mod tcp;
mod window;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as BlockingMutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::sync::{Mutex, Notify, watch};
use tokio::time::Instant;

pub use self::connection::{Meter, PacedConnection, Turn};
use self::limiter::{Limiter, Plan, SLICE_BYTES_MIN};
use self::tcp::TcpInfo;
pub use self::window::Paid;
use self::window::Window;
use crate::units::Rate;

/// How often each connection is looked at on which something moves, unless it was within [`LATELY`].
const LOOK: Duration = Duration::from_millis(20);
/// A slice wakes the process anyway: from so long after a look on, the next is taken with it. Far less than [`LOOK`], so that a look
/// hardly ever has to wake the process by itself.
const LOOK_WITH_SLICE: Duration = Duration::from_millis(5);
/// What was seen of a connection so lately is still so, but for what has been acknowledged.
const LATELY: Duration = Duration::from_millis(1);
/// How often all are, as the others may send a farewell, or an acknowledgement that the kernel had put off.
const LOOK_ALL: Duration = Duration::from_millis(200);

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

    /// Waits until one slice of up to `bytes` may go out, and all at once; of how many bytes. It is fewer where the second has
    /// no room for more, and when the rate fell while it was waited for: no second of a low rate may hold a slice of a high
    /// one. Dropped while waiting, it has paid only for what left unpaid before.
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

    /// How much of `bytes` of payload makes the next slice: they leave in as few as the allowance lets, all alike, in full packets if a
    /// slice has more than one. A short rest would cost as much as a whole slice.
    fn slice_of(&self, bytes: u64, info: &TcpInfo) -> u64 {
        let slice_bytes = self.inner.plan.borrow().map_or(SLICE_BYTES_MIN, |plan| plan.slice_bytes);
        let (segment_bytes, packet_bytes) = (info.segment_bytes.max(1), info.segment_bytes + info.header_bytes);
        let packets = slice_bytes / packet_bytes.max(1);
        let payload_max = match packets {
            0 => slice_bytes.saturating_sub(info.header_bytes).max(1),
            packets => packets * segment_bytes,
        };
        let alike = bytes.div_ceil(bytes.div_ceil(payload_max).max(1));
        match packets {
            0 | 1 => alike,
            _ => alike.next_multiple_of(segment_bytes).min(bytes),
        }
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
    let mut looked = Instant::now();
    let (mut looked_at_all, mut anything_moves) = (looked, true);
    loop {
        let all_due = looked_at_all + LOOK_ALL;
        let mut due = if anything_moves { all_due.min(looked + LOOK) } else { all_due };
        while tokio::time::timeout_at(due, something_leaves.notified()).await.is_ok() {
            if looked.elapsed() >= LOOK_WITH_SLICE {
                break;
            }
            due = all_due.min(looked + LOOK);
        }
        looked = Instant::now();
        let all = looked >= all_due;
        if all {
            looked_at_all = looked;
        }
        let Some(inner) = inner.upgrade() else { return };
        let pacer = Pacer { inner };
        // a meter may be dropped here, which settles too, so not under the lock
        let open: Vec<Arc<Meter>> = pacer.connections().open.iter().filter_map(Weak::upgrade).collect();
        anything_moves = false;
        for meter in open.iter().filter(|meter| all || meter.moves()) {
            // one whose slice woke us was looked at as it left
            let has_just_been = !all && meter.looked_lately().is_some();
            anything_moves |= has_just_been || meter.settle().is_on_its_way();
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    async fn pay_all(pacer: &Pacer, bytes: u64) {
        let mut left = bytes;
        while left > 0 {
            left -= pacer.pay(left).await.bytes();
        }
    }

    proptest! {
        #[test]
        fn bytes_leave_in_as_few_slices_as_the_allowance_lets(
            allowance in 1u64..50_000_000, bytes in 1u64..2_000_000, segment_bytes in 500u64..70_000,
        ) {
            let pacer = Pacer::new(Rate(allowance));
            let info = TcpInfo { segment_bytes, header_bytes: 66, ..TcpInfo::default() };
            let slice_bytes = Plan::new(Rate(allowance)).slice_bytes;
            let packets = slice_bytes / (segment_bytes + 66);
            let most = if packets == 0 { slice_bytes - 66 } else { packets * segment_bytes };
            let (mut left, mut slices) = (bytes, 0);
            while left > 0 {
                let slice = pacer.slice_of(left, &info);
                prop_assert!(slice > 0 && slice <= left && info.on_the_wire(slice) <= slice_bytes);
                prop_assert!(packets < 2 || slice == left || slice.is_multiple_of(segment_bytes), "full packets");
                left -= slice;
                slices += 1;
            }
            prop_assert_eq!(slices, bytes.div_ceil(most));
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

    #[tokio::test]
    async fn what_is_paid_is_counted_to_the_byte() {
        let pacer = Pacer::new(Rate(50_000_000));
        for bytes in [1, 511, 70_000, 123_457] {
            pay_all(&pacer, bytes).await;
        }
        assert_eq!(pacer.paid_bytes(), 1 + 511 + 70_000 + 123_457);
    }
}
