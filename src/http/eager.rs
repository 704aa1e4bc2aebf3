//! A future that is polled again at once when it woke itself.
//!
//! A connection's future wakes itself between two pieces of a body: its reading half waits until the one who handles the request
//! has taken the piece before, and both are one task. Left to the runtime each of these would put the task behind all others and
//! call another thread to help, for a few microseconds of work whose bytes are in this processor's cache.
//!
//! Always: whoever wakes it is heard, and it yields after a bounded number of polls; what tokio lets one task read in a row bounds it
//! too. Never: polled again in place when nobody woke it meanwhile.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Polls in a row: some more than a photo of 250 kB has pieces when all of it is there already.
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
        // while it is polled, whoever polls it looks for this afterwards; after the first call another changes nothing
        if self.state.swap(WOKEN, Ordering::AcqRel) == WAITS {
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

    /// Wakes itself `times` before it is ready, and twice each time, as a connection does that is done with reading and writing.
    fn wakes_itself(times: u32) -> impl Future<Output = ()> {
        let mut left = times;
        poll_fn(move |cx| match left {
            0 => Poll::Ready(()),
            _ => {
                left -= 1;
                cx.waker().wake_by_ref();
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
    }

    #[test]
    fn what_wakes_itself_is_polled_again_at_once_and_its_task_is_not_woken() {
        assert_eq!(polled(&mut Eager::new(wakes_itself(5))), (Poll::Ready(()), 0));
    }

    #[test]
    fn what_never_ceases_to_wake_itself_yields() {
        let mut future = Eager::new(wakes_itself(POLLS_MAX + 1));
        assert_eq!(polled(&mut future), (Poll::Pending, 1));
        assert_eq!(polled(&mut future), (Poll::Ready(()), 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_else_wakes_it_is_heard_each_time() {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
        let received = tokio::spawn(Eager::new(async move {
            let mut sum = 0;
            while let Some(number) = receiver.recv().await {
                sum += number;
            }
            sum
        }));
        let sent = async {
            for number in 0..10_000u64 {
                sender.send(number).await.unwrap();
            }
            drop(sender);
        };
        let all = async { tokio::join!(sent, received).1.unwrap() };
        let sum = tokio::time::timeout(std::time::Duration::from_secs(60), all).await;
        assert_eq!(sum, Ok((0..10_000).sum()));
    }
}
