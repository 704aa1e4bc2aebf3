//! A photo as a request body whose every slice is paid for before it is handed to the socket.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http_body::{Body, Frame, SizeHint};
use sync_wrapper::SyncStream;

use crate::pacer::Pacer;
use crate::telemetry::metrics;

/// The body. Its length is known from the start, so that it is sent with a `Content-Length`.
pub struct PacedBody {
    slices: SyncStream<Pin<Box<dyn Stream<Item = Bytes> + Send>>>,
    left: u64,
}

/// How many bytes of a body were handed over; readable while it is being sent.
#[derive(Clone, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl PacedBody {
    pub fn new(photo: Bytes, pacer: Pacer, progress: Progress) -> Self {
        let left = photo.len() as u64;
        let slices = stream::unfold(photo, move |mut photo| {
            let (pacer, progress) = (pacer.clone(), progress.clone());
            async move {
                if photo.is_empty() {
                    return None;
                }
                let slice = photo.split_to(pacer.slice_bytes().min(photo.len()));
                pacer.pay(slice.len() as u64).await;
                metrics().sent(slice.len() as u64);
                progress.0.fetch_add(slice.len() as u64, Ordering::Relaxed);
                Some((slice, photo))
            }
        });
        PacedBody { slices: SyncStream::new(Box::pin(slices)), left }
    }
}

impl Body for PacedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let body = self.get_mut();
        Pin::new(&mut body.slices).poll_next(cx).map(|slice| {
            slice.map(|slice| {
                body.left -= slice.len() as u64;
                Ok(Frame::data(slice))
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
