//! A photo as a request body whose every slice is paid for before it is handed to the socket.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http_body::{Body, Frame, SizeHint};
use sync_wrapper::SyncStream;
use tokio::time::Instant;

use crate::pacer::Pacer;
use crate::telemetry::metrics;

/// The body. Its length is known from the start, so that it is sent with a `Content-Length`.
pub struct PacedBody {
    slices: SyncStream<Pin<Box<dyn Stream<Item = Bytes> + Send>>>,
    left: u64,
}

/// Whose turn it is on the way to the bucket; readable while a photo is being sent. To wait for the pacer is not to stall.
#[derive(Debug, Clone, Default)]
pub struct Turn(Arc<Mutex<Option<Instant>>>);

impl Turn {
    /// Something was handed over: the link and the store are to move.
    pub fn is_theirs(&self) {
        self.set(Some(Instant::now()));
    }

    /// The drain itself is to move.
    pub fn is_ours(&self) {
        self.set(None);
    }

    /// Since when the link and the store are waited for.
    pub fn theirs_since(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = since;
    }
}

impl PacedBody {
    pub fn new(photo: Bytes, pacer: Pacer, turn: Turn) -> Self {
        let left = photo.len() as u64;
        let slices = stream::unfold(photo, move |mut photo| {
            let (pacer, turn) = (pacer.clone(), turn.clone());
            async move {
                if photo.is_empty() {
                    return None;
                }
                turn.is_ours();
                let slice = photo.split_to(pacer.slice_bytes().min(photo.len()));
                pacer.pay(slice.len() as u64).await;
                metrics().sent(slice.len() as u64);
                turn.is_theirs();
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
