//! What the kernel knows of one TCP connection, and the options that keep its buffers from hiding bytes.
//!
//! Always: read from the socket itself (`TCP_INFO`), so that what is sent again, acknowledgements and headers are counted as
//! they left. Never: a failure because a kernel does not know an option; then what is missing is estimated or done without.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use tokio::net::{TcpSocket, TcpStream};

/// The header of an Ethernet frame, as network interfaces count it.
const ETHERNET_HEADER_BYTES: u64 = 14;
const IPV4_HEADER_BYTES: u64 = 20;
const IPV6_HEADER_BYTES: u64 = 40;
const TCP_HEADER_BYTES: u64 = 20;
const TCP_TIMESTAMP_BYTES: u64 = 12;
/// The flag of `tcpi_options` that says that each segment carries a timestamp.
const OPTION_TIMESTAMPS: u8 = 1;
/// `TCP_CLOSE` in `tcpi_state`.
const STATE_CLOSED: u8 = 7;
/// A segment's payload where the kernel does not say: Ethernet, IPv4, timestamps.
const SEGMENT_BYTES_USUAL: u64 = 1448;

/// Bytes that may wait in the kernel before a connection counts as blocked: what is paid for must leave now, not later.
const UNSENT_BYTES_MAX: libc::c_int = 4096;
/// The longest pause between two attempts of the kernel to send something again: after a stall the way may be free long
/// before the minutes to which these pauses grow by themselves. From Linux 6.15 on.
const RESEND_PAUSE_MS_MAX: libc::c_int = 4000;
const TCP_RTO_MAX_MS: libc::c_int = 44;
/// Congestion controls that go by loss, the better one first; the last is allowed everywhere. One that goes by the rate at
/// which bytes arrive (BBR) takes a connection that is handed no more than there is room for to be idle for the most part,
/// never ends its start, and floods a slow link: twice the bytes left for those that arrived.
const CONGESTION_CONTROLS: [&[u8]; 2] = [b"cubic", b"reno"];

/// One look at a connection. Counts are since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Payload bytes that left, each time they left.
    pub sent_bytes: u64,
    /// Those that left again, because they were lost.
    pub resent_bytes: u64,
    /// Payload bytes that were handed over and have not left yet.
    pub unsent_bytes: u64,
    /// Packets that left, acknowledgements included.
    pub segments: u64,
    /// Payload bytes that the other side has acknowledged, and that it has sent.
    pub acked_bytes: u64,
    pub received_bytes: u64,
    /// The most payload of one packet.
    pub segment_bytes: u64,
    /// Payload bytes that the kernel would let leave now: what the congestion window and the other side's window have room for.
    pub room_bytes: u64,
    /// The headers of one packet: Ethernet, IP, TCP.
    pub header_bytes: u64,
}

impl TcpInfo {
    /// Looks at a connection whose IP headers have so many bytes. None when the kernel does not say, or it was reset: what it had
    /// in hand is gone then.
    pub fn of(tcp: &TcpStream, ip: u64) -> Option<TcpInfo> {
        let (raw, length) = read(tcp).ok().filter(|(raw, _)| raw.state != STATE_CLOSED)?;
        let timestamps = if raw.options & OPTION_TIMESTAMPS == 0 { 0 } else { TCP_TIMESTAMP_BYTES };
        let segment_bytes = u64::from(raw.snd_mss).max(1);
        Some(TcpInfo {
            sent_bytes: raw.bytes_sent,
            resent_bytes: raw.bytes_retrans,
            unsent_bytes: raw.notsent_bytes.into(),
            segments: raw.segs_out.into(),
            acked_bytes: raw.acked_payload_bytes(),
            received_bytes: raw.bytes_received,
            segment_bytes,
            room_bytes: raw.room_bytes(length),
            header_bytes: ETHERNET_HEADER_BYTES + ip + TCP_HEADER_BYTES + timestamps,
        })
    }

    /// With its packets counted on from a look `before`: the kernel counts them with 32 bits, and begins again with none.
    pub fn counted_on(self, before: &TcpInfo) -> TcpInfo {
        let since = (self.segments as u32).wrapping_sub(before.segments as u32);
        // one that went back, which no kernel is known for, is no debt of 283 GB
        let since = if since > u32::MAX / 2 { 0 } else { since };
        TcpInfo { segments: before.segments + u64::from(since), ..self }
    }

    /// What a connection is taken for whose kernel does not say: `written_bytes` in full packets.
    pub fn estimated(written_bytes: u64) -> TcpInfo {
        TcpInfo {
            sent_bytes: written_bytes,
            segments: written_bytes.div_ceil(SEGMENT_BYTES_USUAL),
            segment_bytes: SEGMENT_BYTES_USUAL,
            room_bytes: u64::MAX,
            header_bytes: ETHERNET_HEADER_BYTES + IPV4_HEADER_BYTES + TCP_HEADER_BYTES + TCP_TIMESTAMP_BYTES,
            ..TcpInfo::default()
        }
    }

    /// How much of `bytes` of payload would leave at once: nothing while something waits in the kernel, or if it were less than
    /// a packet.
    pub fn room_for(&self, bytes: u64) -> u64 {
        let waits = self.unsent_bytes >= self.segment_bytes;
        if waits || self.room_bytes < bytes.min(self.segment_bytes) { 0 } else { self.room_bytes.min(bytes) }
    }

    /// Something was handed over that the other side has not acknowledged yet.
    pub fn is_on_its_way(&self) -> bool {
        self.unsent_bytes > 0 || self.acked_bytes < self.sent_bytes.saturating_sub(self.resent_bytes)
    }

    /// Bytes on the wire so far.
    pub fn wire_bytes(&self) -> u64 {
        self.sent_bytes + self.segments * self.header_bytes
    }

    /// Bytes on the wire once all that was handed over has left.
    pub fn owed_bytes(&self) -> u64 {
        self.wire_bytes() + self.on_the_wire(self.unsent_bytes)
    }

    /// What `payload_bytes` take on the wire.
    pub fn on_the_wire(&self, payload_bytes: u64) -> u64 {
        payload_bytes + payload_bytes.div_ceil(self.segment_bytes.max(1)) * self.header_bytes
    }
}

/// Sets what keeps handed-over bytes from piling up in the kernel and on the link, and what brings a connection back soon
/// after a stall. For a socket that is not connected yet: one that began with BBR paces by itself whatever follows it.
pub fn prepare(tcp: &TcpSocket) {
    let _ = tcp.set_nodelay(true);
    let set = |option, value: &[u8]| set(tcp, libc::IPPROTO_TCP, option, value);
    let _ = set(libc::TCP_NOTSENT_LOWAT, &UNSENT_BYTES_MAX.to_ne_bytes());
    let _ = set(TCP_RTO_MAX_MS, &RESEND_PAUSE_MS_MAX.to_ne_bytes());
    let _ = CONGESTION_CONTROLS.iter().find(|name| set(libc::TCP_CONGESTION, name).is_ok());
}

/// Bytes of the IP header of each of its packets.
pub fn ip_header_bytes(tcp: &TcpStream) -> u64 {
    match tcp.peer_addr() {
        Ok(std::net::SocketAddr::V6(_)) => IPV6_HEADER_BYTES,
        _ => IPV4_HEADER_BYTES,
    }
}

/// The start of Linux's `struct tcp_info` (`include/uapi/linux/tcp.h`), as of 5.4; later kernels only append, and those from
/// 4.19 on end before `dsack_dups` or after.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawTcpInfo {
    state: u8,
    ca_state: u8,
    retransmits: u8,
    probes: u8,
    backoff: u8,
    options: u8,
    window_scales: u8,
    flags: u8,
    rto: u32,
    ato: u32,
    snd_mss: u32,
    rcv_mss: u32,
    unacked: u32,
    sacked: u32,
    lost: u32,
    retrans: u32,
    fackets: u32,
    last_data_sent: u32,
    last_ack_sent: u32,
    last_data_recv: u32,
    last_ack_recv: u32,
    pmtu: u32,
    rcv_ssthresh: u32,
    rtt: u32,
    rttvar: u32,
    snd_ssthresh: u32,
    snd_cwnd: u32,
    advmss: u32,
    reordering: u32,
    rcv_rtt: u32,
    rcv_space: u32,
    total_retrans: u32,
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    notsent_bytes: u32,
    min_rtt: u32,
    data_segs_in: u32,
    data_segs_out: u32,
    delivery_rate: u64,
    busy_time: u64,
    rwnd_limited: u64,
    sndbuf_limited: u64,
    delivered: u32,
    delivered_ce: u32,
    bytes_sent: u64,
    bytes_retrans: u64,
    dsack_dups: u32,
    reord_seen: u32,
    rcv_ooopack: u32,
    snd_wnd: u32,
}

impl RawTcpInfo {
    /// `bytes_acked` counts the SYN of whoever opened the connection.
    fn acked_payload_bytes(&self) -> u64 {
        self.bytes_acked.saturating_sub(1)
    }

    /// What the congestion window and the other side's window have room for, where the kernel has said so many bytes of this.
    fn room_bytes(&self, length: usize) -> u64 {
        let segment_bytes = u64::from(self.snd_mss).max(1);
        let in_flight = (self.unacked + self.retrans).saturating_sub(self.sacked + self.lost);
        let congestion_bytes = u64::from(self.snd_cwnd.saturating_sub(in_flight)) * segment_bytes;
        let once_sent_bytes = self.bytes_sent.saturating_sub(self.bytes_retrans);
        let unacked_bytes = once_sent_bytes.saturating_sub(self.acked_payload_bytes());
        // beyond the other side's window bytes that were paid for would wait, and leave together a round trip later
        let window_bytes = match u64::from(self.snd_wnd) {
            _ if length < OFFSET_OF_SND_WND + size_of::<u32>() => u64::MAX, // a kernel before 5.4
            // something must wait for the kernel to ask whether a window that was shut is open again
            window if unacked_bytes == 0 => window.max(segment_bytes),
            window => window.saturating_sub(unacked_bytes),
        };
        congestion_bytes.min(window_bytes)
    }
}

const LENGTH_MIN: usize = std::mem::offset_of!(RawTcpInfo, dsack_dups);
const OFFSET_OF_SND_WND: usize = std::mem::offset_of!(RawTcpInfo, snd_wnd);

/// What the kernel says, and how many bytes of it.
fn read(tcp: &TcpStream) -> io::Result<(RawTcpInfo, usize)> {
    let mut info = RawTcpInfo::default();
    let mut length = size_of::<RawTcpInfo>() as libc::socklen_t;
    // SAFETY: the file descriptor is open as long as `tcp` is borrowed; `info` is plain integers, valid for any bytes, and
    // the kernel writes at most `length` of them.
    let done = unsafe {
        let into = std::ptr::from_mut(&mut info).cast();
        libc::getsockopt(tcp.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, &mut length)
    };
    match done {
        0 if length as usize >= LENGTH_MIN => Ok((info, length as usize)),
        0 => Err(io::Error::from(io::ErrorKind::Unsupported)), // a kernel before 4.19
        _ => Err(io::Error::last_os_error()),
    }
}

pub(super) fn set(tcp: &impl AsRawFd, level: libc::c_int, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the file descriptor is open as long as `tcp` is borrowed, and the kernel only reads `value`, by its length.
    let done = unsafe {
        let length = value.len() as libc::socklen_t;
        libc::setsockopt(tcp.as_raw_fd(), level, option, value.as_ptr().cast(), length)
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

    #[tokio::test]
    async fn what_left_is_counted_with_its_headers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let before = TcpInfo::of(&near, ip_header_bytes(&near)).unwrap();
        assert!(before.sent_bytes == 0 && before.segments >= 2, "the handshake left: {before:?}");
        near.write_all(&[7; 10_000]).await.unwrap();
        far.read_exact(&mut [0; 10_000]).await.unwrap();
        let after = TcpInfo::of(&near, ip_header_bytes(&near)).unwrap();
        assert_eq!((after.sent_bytes, after.unsent_bytes, after.header_bytes), (10_000, 0, 14 + 20 + 32));
        assert!(after.wire_bytes() >= before.wire_bytes() + 10_000 + after.header_bytes);
    }

    #[test]
    fn packets_are_counted_on_where_the_kernel_begins_again() {
        let packets = |segments| TcpInfo { segments, ..TcpInfo::default() };
        assert_eq!(packets(7).counted_on(&packets(5)), packets(7));
        let many = packets(u64::from(u32::MAX) - 1);
        let more = packets(3).counted_on(&many);
        assert_eq!(more, packets((1 << 32) + 3));
        assert_eq!(packets(2).counted_on(&packets((1 << 33) - 1)), packets((1 << 33) + 2));
        assert!(more.wire_bytes() >= many.wire_bytes());
        assert_eq!(packets(5).counted_on(&packets(7)), packets(7));
    }

    #[test]
    fn there_is_room_for_what_both_windows_let_leave() {
        let whole = size_of::<RawTcpInfo>();
        let raw = RawTcpInfo { snd_mss: 1000, snd_cwnd: 20, snd_wnd: 50_000, bytes_acked: 1, ..RawTcpInfo::default() };
        assert_eq!(raw.room_bytes(whole), 20_000, "by the congestion window");
        let raw = RawTcpInfo { unacked: 5, bytes_sent: 5_000, snd_wnd: 8_000, ..raw };
        assert_eq!(raw.room_bytes(whole), 3_000, "by the other side's window, less what is on its way");
        assert_eq!(raw.room_bytes(LENGTH_MIN), 15_000, "a kernel that does not say");
        let shut = RawTcpInfo { unacked: 0, bytes_acked: 5_001, snd_wnd: 0, ..raw };
        assert_eq!(shut.room_bytes(whole), 1_000, "for what asks whether it is open again");
    }

    #[test]
    fn less_than_a_packet_waits_unless_it_is_all() {
        let info = TcpInfo { segment_bytes: 1000, room_bytes: 700, ..TcpInfo::default() };
        assert_eq!((info.room_for(5_000), info.room_for(700), info.room_for(300)), (0, 700, 300));
        let waits = TcpInfo { unsent_bytes: 1000, room_bytes: 9_000, ..info };
        assert_eq!(waits.room_for(300), 0);
    }

    #[test]
    fn a_payload_takes_a_header_a_packet() {
        let info = TcpInfo { segment_bytes: 1448, header_bytes: 66, ..TcpInfo::default() };
        assert_eq!(info.on_the_wire(0), 0);
        assert_eq!(info.on_the_wire(1448), 1514);
        assert_eq!(info.on_the_wire(1449), 1449 + 2 * 66);
    }
}
