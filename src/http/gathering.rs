//! A device's connection whose bodies are fetched in large pieces.
//!
//! Always: while a body comes, whoever reads it is woken when the kernel has gathered a piece worth the waking, or all that
//! is to come; a photo that comes packet by packet would cost a wake-up for each otherwise. What does not fill a piece in
//! time is fetched, and the rest of that body as it comes. Never: a head held up, or a wait for more than is to come, but
//! once for a client that sends its next request before it has its answer.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// What is worth waking up for: few wake-ups a photo, and still in the processor's cache when it is decoded.
const PIECE_BYTES: u64 = 64 * 1024;
/// How long a piece may gather. The kernel acknowledges a lone packet late as long as nobody reads it, so a device that has
/// never more than one on its way is held up by this once a photo, and a device that is slower than this gains nothing.
const GATHER_MAX: Duration = Duration::from_millis(500);

/// The connection.
pub struct Gathering {
    tcp: TcpStream,
    expected: Expected,
    /// How many bytes the kernel gathers before it wakes anyone.
    low_water: u64,
    /// When what there is of a piece is fetched.
    late: Option<Pin<Box<Sleep>>>,
}

/// How many bytes of a body are still to come over a connection, at least. Whoever has read a head says so.
#[derive(Clone, Default)]
pub struct Expected(Arc<Counts>);

#[derive(Default)]
struct Counts {
    to_come: AtomicU64,
    /// Bytes read since the last answer: a request's head, and what came of its body with it.
    read: AtomicU64,
}

impl Expected {
    /// A head was read, and a body of so many bytes belongs to it, some of which may have been read with the head.
    pub fn body(&self, bytes: u64) {
        // the head counts as body here: less is expected than is to come, never more
        let read = self.0.read.load(Ordering::Relaxed);
        self.0.to_come.store(bytes.saturating_sub(read), Ordering::Relaxed);
    }

    fn came(&self, bytes: u64) {
        let to_come = self.0.to_come.load(Ordering::Relaxed);
        self.0.to_come.store(to_come.saturating_sub(bytes), Ordering::Relaxed);
        self.0.read.fetch_add(bytes, Ordering::Relaxed);
    }

    fn answered(&self) {
        self.0.read.store(0, Ordering::Relaxed);
    }

    /// Whatever comes now is to be read as it comes.
    pub fn nothing(&self) {
        self.0.to_come.store(0, Ordering::Relaxed);
    }
}

impl Gathering {
    pub fn new(tcp: TcpStream) -> Gathering {
        Gathering { tcp, expected: Expected::default(), low_water: 1, late: None }
    }

    /// Where its bodies are announced.
    pub fn expected(&self) -> Expected {
        self.expected.clone()
    }

    fn gather(&mut self, bytes: u64) {
        // a kernel that does not know the option wakes at every byte, as ever
        if bytes != self.low_water && set_low_water(&self.tcp, bytes).is_ok() {
            self.low_water = bytes;
        }
    }
}

impl AsyncRead for Gathering {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let before = into.filled().len();
            if let Poll::Ready(read) = Pin::new(&mut this.tcp).poll_read(cx, into) {
                this.late = None;
                let read_bytes = (into.filled().len() - before) as u64;
                this.expected.came(read_bytes);
                return Poll::Ready(read);
            }
            // the kernel wakes at once when there is as much by now
            this.gather(this.expected.0.to_come.load(Ordering::Relaxed).clamp(1, PIECE_BYTES));
            if this.low_water == 1 {
                return Poll::Pending;
            }
            let late = this.late.get_or_insert_with(|| Box::pin(sleep(GATHER_MAX)));
            if late.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            this.late = None;
            this.expected.nothing();
            this.gather(1);
        }
    }
}

impl AsyncWrite for Gathering {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.expected.answered();
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.expected.answered();
        Pin::new(&mut self.tcp).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

fn set_low_water(tcp: &TcpStream, bytes: u64) -> io::Result<()> {
    let bytes = bytes as libc::c_int;
    // SAFETY: the file descriptor is open as long as `tcp` is borrowed, and the kernel only reads `bytes`, by its size.
    let done = unsafe {
        let size = size_of_val(&bytes) as libc::socklen_t;
        libc::setsockopt(tcp.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, std::ptr::from_ref(&bytes).cast(), size)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn connected() -> (Gathering, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        far.set_nodelay(true).unwrap();
        (Gathering::new(listener.accept().await.unwrap().0), far)
    }

    /// Reads `bytes`, and says how many came at each read.
    async fn reads(near: &mut Gathering, bytes: usize) -> Vec<usize> {
        let (mut taken, mut reads) = (vec![0; bytes], Vec::new());
        while reads.iter().sum::<usize>() < bytes {
            reads.push(near.read(&mut taken).await.unwrap());
        }
        reads
    }

    #[tokio::test]
    async fn what_comes_packet_by_packet_is_fetched_piece_by_piece() {
        let (mut near, mut far) = connected().await;
        far.write_all(b"head").await.unwrap();
        assert_eq!(reads(&mut near, 4).await, [4], "a head is read as it comes");
        near.expected().body(200_000);
        let sending = tokio::spawn(async move {
            for packet in [7; 200_000].chunks(1000) {
                far.write_all(packet).await.unwrap();
                tokio::task::yield_now().await;
            }
            far
        });
        let pieces = reads(&mut near, 200_000).await;
        // four, unless the kernel is short of memory for what it gathers
        assert!(pieces.len() <= 10, "{pieces:?}");

        let mut far = sending.await.unwrap();
        near.write_all(b"answer").await.unwrap();
        far.write_all(b"next").await.unwrap();
        assert_eq!((reads(&mut near, 4).await, near.low_water), (vec![4], 1), "and so is the next");
    }

    #[tokio::test]
    async fn what_does_not_fill_a_piece_is_fetched_after_a_while() {
        let (mut near, mut far) = connected().await;
        near.expected().body(100_000);
        let began = tokio::time::Instant::now();
        let (reads, sent) = tokio::join!(reads(&mut near, 4), far.write_all(b"slow"));
        sent.unwrap();
        assert_eq!(reads, [4]);
        assert!(began.elapsed() >= GATHER_MAX);
        assert_eq!(near.expected().0.to_come.load(Ordering::Relaxed), 0, "the rest is fetched as it comes");
    }

    #[tokio::test]
    async fn the_end_of_a_connection_is_heard_at_once() {
        let (mut near, far) = connected().await;
        near.expected().body(100_000);
        let mut nothing = [0; 8];
        let (read, ()) = tokio::join!(near.read(&mut nothing), async { drop(far) });
        assert_eq!(read.unwrap(), 0);
        assert_eq!(near.low_water, PIECE_BYTES, "before a piece was given up");
    }
}
