//! A future that is polled again at once when it woke itself.
//!
//! A connection's future wakes itself between two pieces of a body: its reading half waits until the one who handles the request
//! has taken the piece before, and both are one task. Left to the runtime each of these would put the task behind all others and
//! call another thread to help, for a few microseconds of work whose bytes are in this processor's cache.
//!
//! Always: whoever wakes it is heard, and it yields after a bounded number of polls. Never: polled when nobody woke it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Polls in a row: some more than a photo has pieces when all of it is there already.
const POLLS_MAX: u32 = 32;

const WAITS: u8 = 0;
const POLLED: u8 = 1;
const WOKEN: u8 = 2;

/// The future.
pub struct Eager<F> {
    future: Pin<Box<F>>,
    wakes: Arc<Wakes>,
    waker: Waker,
}

/// Whoever wants to wake it.
struct Wakes {
    state: AtomicU8,
    task: AtomicWaker,
}

impl<F> Eager<F> {
    pub fn new(future: F) -> Self {
        let wakes = Arc::new(Wakes { state: AtomicU8::new(WAITS), task: AtomicWaker::new() });
        Eager { future: Box::pin(future), waker: wakes.clone().into(), wakes }
    }
}

impl<F: Future> Future for Eager<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Eager { future, wakes, waker } = self.get_mut();
        wakes.task.register(cx.waker());
        for _ in 0..POLLS_MAX {
            // whatever was woken before is seen by this poll
            wakes.state.swap(POLLED, Ordering::AcqRel);
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(waker)) {
                return Poll::Ready(output);
            }
            if wakes.state.compare_exchange(POLLED, WAITS, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // while it is polled, whoever polls it looks for this afterwards
        if self.state.swap(WOKEN, Ordering::AcqRel) != POLLED {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls `future` once, and says how often its task was woken by that.
    fn polled<F: Future + Unpin>(future: &mut F) -> (Poll<F::Output>, u32) {
        let count = Arc::new(Count::default());
        let polled = Pin::new(future).poll(&mut Context::from_waker(&count.clone().into()));
        (polled, count.0.load(Ordering::Relaxed))
    }

    /// Wakes itself `times` before it is ready.
    fn wakes_itself(times: u32) -> impl Future<Output = ()> {
        let mut left = times;
        poll_fn(move |cx| match left {
            0 => Poll::Ready(()),
            _ => {
                left -= 1;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
    }

    #[test]
    fn what_wakes_itself_is_polled_again_at_once() {
        assert_eq!(polled(&mut Eager::new(wakes_itself(5))), (Poll::Ready(()), 0));
    }

    #[test]
    fn what_never_stops_to_wake_itself_yields() {
        let mut future = Eager::new(wakes_itself(POLLS_MAX + 1));
        assert_eq!(polled(&mut future), (Poll::Pending, 1));
        assert_eq!(polled(&mut future), (Poll::Ready(()), 0));
    }

    #[tokio::test]
    async fn who_waits_for_another_is_woken_by_it() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let waiting = tokio::spawn(Eager::new(receiver));
        tokio::task::yield_now().await;
        sender.send(7).unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(7));
    }
}
