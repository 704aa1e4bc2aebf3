//! A TCP connection whose every byte is paid for before it leaves.
//!
//! Always: what is above it (HTTP heads, TLS, photos) is paid for alike, a packet's headers included, at the moment at which
//! the kernel has room to send it; what the kernel sends by itself (acknowledgements, what it sends again) is found by
//! looking, and paid for by the next. Never: bytes that were paid for waiting in a buffer, from which they could leave in a
//! burst later.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, Sleep, sleep};

use super::tcp::{self, TcpInfo};
use super::{LATELY, Pacer, Paid};

/// How long a connection whose congestion window is full waits before it looks again.
const ROOM_PAUSE: Duration = Duration::from_millis(5);

/// Whose turn it is on the way to the bucket; readable while a photo is being sent. To wait for the pacer is not to stall,
/// and neither is to be slow: as long as the other side acknowledges bytes, something moves.
#[derive(Debug, Clone, Default)]
pub struct Turn(Arc<Mutex<Option<Instant>>>);

impl Turn {
    /// Something moved, and the link and the store are to move next.
    pub fn is_theirs(&self) {
        *self.get() = Some(Instant::now());
    }

    /// The drain itself is to move.
    pub fn is_ours(&self) {
        *self.get() = None;
    }

    /// Since when the link and the store are waited for.
    pub fn theirs_since(&self) -> Option<Instant> {
        *self.get()
    }

    /// They moved, if it is their turn.
    fn moved(&self) {
        if let Some(since) = &mut *self.get() {
            *since = Instant::now();
        }
    }

    /// They are waited for, from now on unless they were before.
    fn waits_for_them(&self) {
        self.get().get_or_insert_with(Instant::now);
    }

    fn get(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The connection.
pub struct PacedConnection {
    meter: Arc<Meter>,
    paying: Option<Paying>,
    room: Option<Pin<Box<Sleep>>>,
}

/// A payment under way, for so much payload, of so many bytes on the wire.
struct Paying {
    payload_bytes: u64,
    due_bytes: u64,
    payment: Pin<Box<dyn Future<Output = Paid> + Send>>,
}

/// What is known of one connection: by itself, by the pacer that looks at all of them, and by whoever sends over it.
pub struct Meter {
    tcp: TcpStream,
    ip_header_bytes: u64,
    pacer: Pacer,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Payload handed to the kernel.
    written_bytes: u64,
    /// What was paid for it, headers included.
    paid_bytes: u64,
    /// Was paid for and handed to the kernel, which has not sent all of it yet: it may pace by itself, or wait for acknowledgements.
    leaving: Option<Paid>,
    /// The last look, which the pacer has counted, and when it was taken.
    counted: TcpInfo,
    looked_at: Option<Instant>,
    /// What the other side had acknowledged and sent when it was last settled.
    moved_bytes: u64,
    /// It was written to or read from since it was last settled, or something was on its way then.
    moves: bool,
    /// Whose upload it carries.
    turn: Turn,
}

impl PacedConnection {
    /// Opens one, for as long as it takes.
    ///
    /// # Errors
    /// Nobody answers there, or no socket is to be had.
    pub async fn connect(to: SocketAddr, pacer: Pacer) -> io::Result<PacedConnection> {
        let socket = match to {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        tcp::prepare(&socket);
        Ok(PacedConnection::new(socket.connect(to).await?, pacer))
    }

    fn new(tcp: TcpStream, pacer: Pacer) -> PacedConnection {
        let ip_header_bytes = tcp::ip_header_bytes(&tcp);
        let meter = Arc::new(Meter { tcp, ip_header_bytes, pacer, seen: Mutex::default() });
        meter.pacer.watch(&meter);
        PacedConnection { meter, paying: None, room: None }
    }

    /// Its meter, for whoever sends over it.
    pub fn meter(&self) -> Arc<Meter> {
        self.meter.clone()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, buffers: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let bytes: u64 = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        if bytes == 0 {
            return Poll::Ready(Ok(0));
        }
        loop {
            let paying = match &mut self.paying {
                Some(paying) => paying,
                None => {
                    let (payload_bytes, info) = ready!(self.poll_room(cx, bytes))?;
                    let due_bytes = self.meter.due_for(payload_bytes, &info);
                    let pacer = self.meter.pacer.clone();
                    let payment = Box::pin(async move { pacer.pay(due_bytes).await });
                    self.paying.insert(Paying { payload_bytes, due_bytes, payment })
                }
            };
            let Poll::Ready(paid) = paying.payment.as_mut().poll(cx) else {
                self.meter.seen().turn.is_ours();
                return Poll::Pending;
            };
            // after a fall of the rate less is paid for than was asked; headers are as many as for all of it at most
            let unpaid_bytes = paying.due_bytes - paid.bytes();
            let paid_payload_bytes = paying.payload_bytes.min(bytes).saturating_sub(unpaid_bytes);
            self.paying = None;
            // there may be less room by now; what would only wait in the kernel would be missing to everyone else
            let payload_bytes = self.meter.settle().room_for(paid_payload_bytes);
            if payload_bytes == 0 {
                // not even the headers; what was paid is forfeit
                continue;
            }
            match self.meter.write(&first_of(buffers, payload_bytes), paid_payload_bytes, paid) {
                Ok(written) => return Poll::Ready(Ok(written)),
                // what was paid for could not leave; it is paid for again when it can, so that no burst can be saved up
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Waits until the kernel would send something at once; how many bytes of `bytes` to pay for, and what was seen of the
    /// connection lately.
    fn poll_room(&mut self, cx: &mut Context<'_>, bytes: u64) -> Poll<io::Result<(u64, TcpInfo)>> {
        loop {
            if let Some(pause) = &mut self.room {
                ready!(pause.as_mut().poll(cx));
                self.room = None;
            }
            if self.meter.tcp.poll_write_ready(cx)?.is_pending() {
                self.meter.seen().turn.waits_for_them();
                return Poll::Pending;
            }
            // as a rule the slice before has just left; what had no room then may have some by now
            let info = self.meter.looked_lately().filter(|info| info.room_for(bytes) > 0);
            let info = info.unwrap_or_else(|| self.meter.settle());
            let room_bytes = info.room_for(bytes);
            if room_bytes > 0 {
                let payload_bytes = self.meter.pacer.slice_of(bytes, &info).min(room_bytes);
                return Poll::Ready(Ok((payload_bytes, info)));
            }
            self.meter.seen().turn.waits_for_them();
            self.room = Some(Box::pin(sleep(ROOM_PAUSE)));
        }
    }
}

impl Meter {
    /// Says whose upload the connection carries from now on.
    pub fn carry(&self, turn: &Turn) {
        self.seen().turn = turn.clone();
    }

    /// What is to be paid before so much payload may leave, less what was paid too much so far. What was paid too little is charged
    /// when it is settled.
    fn due_for(&self, payload_bytes: u64, info: &TcpInfo) -> u64 {
        let paid_too_much = self.seen().paid_bytes.saturating_sub(info.owed_bytes());
        info.on_the_wire(payload_bytes).saturating_sub(paid_too_much)
    }

    /// It is in use: more than a late acknowledgement may leave by the kernel's own doing.
    pub(super) fn moves(&self) -> bool {
        self.seen().moves
    }

    /// The last look, if it was taken within [`LATELY`].
    pub(super) fn looked_lately(&self) -> Option<TcpInfo> {
        let seen = self.seen();
        seen.looked_at.filter(|at| at.elapsed() <= LATELY).map(|_| seen.counted)
    }

    /// Hands over payload, of no more than the bytes that were paid for; how many were taken.
    fn write(&self, payload: &[IoSlice<'_>], paid_payload_bytes: u64, paid: Paid) -> io::Result<usize> {
        // nobody may look between the write and the booking: the slice would be charged once more
        let mut seen = self.seen();
        let written = self.tcp.try_write_vectored(payload)?;
        let paid_bytes = paid.bytes();
        seen.written_bytes += written as u64;
        seen.moves = true;
        match &mut seen.leaving {
            Some(leaving) => leaving.append(paid),
            None => seen.leaving = Some(paid),
        }
        let info = self.look(&mut seen);
        // what was paid for and was not taken is forfeit; headers that were not needed are not
        let owed_bytes = if written as u64 == paid_payload_bytes { u64::MAX } else { info.owed_bytes() };
        seen.paid_bytes = (seen.paid_bytes + paid_bytes).min(owed_bytes.max(seen.paid_bytes));
        seen.turn.is_theirs();
        self.pacer.inner.something_leaves.notify_one();
        Ok(written)
    }

    /// Has the pacer charge what left without having been paid for, and sees whether anything moved.
    pub(super) fn settle(&self) -> TcpInfo {
        let mut seen = self.seen();
        let info = self.look(&mut seen);
        let moved_bytes = info.acked_bytes + info.received_bytes;
        if moved_bytes != seen.moved_bytes {
            seen.moved_bytes = moved_bytes;
            seen.turn.moved();
        }
        seen.moves = info.is_on_its_way();
        let unpaid_bytes = info.owed_bytes().saturating_sub(seen.paid_bytes);
        seen.paid_bytes += unpaid_bytes;
        self.pacer.charge(unpaid_bytes);
        info
    }

    fn look(&self, seen: &mut Seen) -> TcpInfo {
        // a connection that was reset says nothing any more, and has sent what it had sent
        let looked = TcpInfo::of(&self.tcp, self.ip_header_bytes).map(|info| info.counted_on(&seen.counted));
        let info = looked.unwrap_or_else(|| match seen.counted.segments {
            0 => TcpInfo::estimated(seen.written_bytes),
            _ => TcpInfo { unsent_bytes: 0, ..seen.counted },
        });
        if let Some(leaving) = &mut seen.leaving {
            leaving.all_left_but(info.on_the_wire(info.unsent_bytes));
            if info.unsent_bytes == 0 {
                seen.leaving = None;
            }
        }
        seen.looked_at = Some(Instant::now());
        let past = std::mem::replace(&mut seen.counted, info);
        self.pacer.count(
            info.wire_bytes().saturating_sub(past.wire_bytes()),
            info.acked_bytes.saturating_sub(past.acked_bytes),
            info.resent_bytes.saturating_sub(past.resent_bytes),
        );
        info
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.settle();
    }
}

/// A connection that is given up in the middle must not go on sending: the kernel would bring out what it has in hand, again
/// and again on a bad link, and nobody would count it.
impl Drop for PacedConnection {
    fn drop(&mut self) {
        let info = self.meter.settle();
        if info.is_on_its_way() {
            let _ = rustix::net::sockopt::set_socket_linger(&self.meter.tcp, Some(Duration::ZERO));
        }
    }
}

/// The first `bytes` of `buffers`.
fn first_of<'a>(buffers: &'a [IoSlice<'a>], bytes: u64) -> Vec<IoSlice<'a>> {
    let mut left = bytes as usize;
    let parts = buffers.iter().map(|buffer| {
        let part = &buffer[..buffer.len().min(left)];
        left -= part.len();
        IoSlice::new(part)
    });
    parts.filter(|part| !part.is_empty()).collect()
}

impl AsyncWrite for PacedConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[IoSlice::new(buffer)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        use rustix::net::{Shutdown, shutdown};
        Poll::Ready(shutdown(&self.meter.tcp, Shutdown::Write).map_err(io::Error::from))
    }
}

impl AsyncRead for PacedConnection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.meter.tcp.poll_read_ready(cx))?;
            match self.meter.tcp.try_read(into.initialize_unfilled()) {
                Ok(read) => {
                    self.meter.seen().moves = true;
                    into.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::lock;
    use super::*;
    use crate::units::Rate;

    async fn connected(pacer: &Pacer) -> (PacedConnection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = PacedConnection::connect(listener.local_addr().unwrap(), pacer.clone()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        (near, far)
    }

    #[tokio::test]
    async fn what_leaves_is_paid_for_with_its_headers_and_answers_with_their_acknowledgements() {
        let pacer = Pacer::new(Rate(20_000_000));
        let (mut near, mut far) = connected(&pacer).await;
        let answering = tokio::spawn(async move {
            let mut taken = vec![0; 1_000_000];
            far.read_exact(&mut taken).await.unwrap();
            far.write_all(&taken).await.unwrap();
            far
        });
        near.write_all(&vec![7; 1_000_000]).await.unwrap();
        near.read_exact(&mut vec![0; 1_000_000]).await.unwrap();
        let _far = answering.await.unwrap();
        near.meter.settle();
        near.write_all(b"and the next pays for the acknowledgements").await.unwrap();
        near.meter.settle();
        let (paid, sent) = (pacer.paid_bytes(), pacer.sent_bytes());
        assert!(sent > 1_000_000 + 1_000_000 / 65_483 * 66, "{sent}");
        assert!(paid.abs_diff(sent) < 5_000, "paid {paid}, sent {sent}");
    }

    #[tokio::test]
    async fn no_second_of_a_low_rate_holds_a_slice_of_a_high_one() {
        let pacer = Pacer::new(Rate(25_000_000));
        let (mut near, mut far) = connected(&pacer).await;
        // the slice is chosen while the high rate is in force, and waits
        pacer.pour_until(Instant::now());
        let writing = tokio::spawn(async move { near.write_all(&vec![7; 1_000_000]).await });
        while pacer.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        pacer.set_allowance(Some(Rate(10_000)));
        pacer.pour_until(Instant::now() + Duration::from_secs(3600));
        let mut taken = [0; 65_536];
        for _ in 0..5 {
            let taken = far.read(&mut taken).await.unwrap();
            assert!((1..=1514).contains(&taken), "{taken} at once, of 10,000 a second");
        }
        writing.abort();
    }

    #[tokio::test]
    async fn nothing_is_paid_for_a_connection_that_does_not_move() {
        let pacer = Pacer::new(Rate(1_000_000_000));
        let (mut near, far) = connected(&pacer).await;
        let turn = Turn::default();
        near.meter.carry(&turn);
        let photo = vec![7; 64 << 20];
        assert!(tokio::time::timeout(Duration::from_millis(500), near.write_all(&photo)).await.is_err());
        assert!(turn.theirs_since().is_some(), "the other side is waited for");
        let (paid, sent) = (pacer.paid_bytes(), pacer.sent_bytes());
        assert!(paid < 32 << 20 && paid.abs_diff(sent) < 200_000, "paid {paid}, sent {sent}");
        drop(far);
    }

    #[tokio::test]
    async fn what_the_kernel_holds_up_counts_until_it_has_left() {
        let pacer = Pacer::new(Rate(100_000_000));
        let (mut near, mut far) = connected(&pacer).await;
        // TCP paces by itself from the eleventh packet on, as it does with BBR
        tcp::set(&near.meter.tcp, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &1_000_000_u32.to_ne_bytes()).unwrap();
        let leaving_bytes = || lock(&pacer.inner.window).leaving_bytes;
        let reading = tokio::spawn(async move { far.read_exact(&mut vec![0; 800_000]).await });
        near.write_all(&vec![7; 800_000]).await.unwrap();
        assert!(leaving_bytes() > 0, "a packet of loopback takes 65 ms at 1 MB/s");
        reading.await.unwrap().unwrap();
        near.meter.settle();
        assert_eq!(leaving_bytes(), 0);
    }

    #[tokio::test]
    async fn what_lost_its_room_while_it_waited_for_the_pacer_is_not_handed_over() {
        let pacer = Pacer::new(Rate(1_000_000_000));
        let (mut near, _far) = connected(&pacer).await;
        let meter = near.meter();
        pacer.pour_until(Instant::now());
        let writing = tokio::spawn(async move { near.write_all(&[7; 10_000]).await });
        while pacer.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        // nobody reads, so this fills the other side's window
        while meter.settle().room_for(10_000) > 0 {
            let _ = meter.tcp.try_write(&[7; 10_000]);
            tokio::task::yield_now().await;
        }
        assert_eq!(pacer.paid_bytes(), 0);
        pacer.pour_until(Instant::now() + Duration::from_secs(3600));
        while pacer.waiting() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(pacer.paid_bytes() > 10_000, "its slice was paid for");
        assert_eq!(meter.seen().written_bytes, 0);
        writing.abort();
    }

    #[tokio::test]
    async fn a_look_is_believed_for_a_moment_only() {
        let (near, _far) = connected(&Pacer::new(Rate(1_000_000))).await;
        tokio::time::pause();
        let seen = near.meter.settle();
        assert_eq!(near.meter.looked_lately(), Some(seen));
        tokio::time::advance(LATELY + Duration::from_millis(1)).await;
        assert_eq!(near.meter.looked_lately(), None);
    }

    #[tokio::test]
    async fn who_waits_for_the_pacer_waits_for_nobody_else() {
        let pacer = Pacer::new(Rate(1_000));
        let (mut near, _far) = connected(&pacer).await;
        let turn = Turn::default();
        near.meter.carry(&turn);
        turn.is_theirs();
        assert!(tokio::time::timeout(Duration::from_millis(100), near.write_all(&[7; 100_000])).await.is_err());
        assert_eq!(turn.theirs_since(), None);
    }
}
