//! Network namespaces without names, and what is done within them.
//!
//! Always: a namespace lives for as long as a process in it or the file that stands for it, so that nothing of it outlives the
//! harness, however that ends; its interfaces go with it. The only place of this test with the kernel's raw calls.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

/// A network namespace.
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// A new one, with its loopback up.
    pub fn new() -> Namespace {
        in_thread(|| {
            unshare();
            Namespace::here()
        })
    }

    /// That of this thread.
    pub fn here() -> Namespace {
        Namespace { file: File::open("/proc/thread-self/ns/net").unwrap() }
    }

    /// The same one once more.
    pub fn again(&self) -> Namespace {
        Namespace { file: self.file.try_clone().unwrap() }
    }

    /// A file by which other processes enter it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    /// Does `work` in a thread within it, and waits for it.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            self.enter();
            work()
        })
    }

    /// Moves this thread, and no other, into it.
    pub fn enter(&self) {
        // SAFETY: the file is open; nothing but this thread's namespace changes
        let entered = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(entered, 0, "cannot enter a network namespace: {}", io::Error::last_os_error());
    }
}

fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

/// Moves this thread, and the threads and processes that it starts from now on, into a new namespace.
pub fn unshare() {
    // SAFETY: nothing but this thread's namespace changes
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(unshared, 0, "cannot make a network namespace: {}", io::Error::last_os_error());
    // frames that nobody asked for would be counted; and each connection is to begin as if it were the first
    for (setting, value) in [
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
        ("ipv4/tcp_no_metrics_save", "1"),
    ] {
        let _ = std::fs::write(format!("/proc/sys/net/{setting}"), value);
    }
    run("ip link set lo up");
}

/// Runs a command of words without spaces in this thread's namespace.
pub fn run(command: &str) {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    let done = Command::new(program).args(words).output();
    let done = done.unwrap_or_else(|error| panic!("{program}: {error}; run tests/install-parts"));
    assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A new TUN device in this thread's namespace: whoever has the file has the other end of its line, a packet at a time. The
/// device is gone when the file is.
pub fn tun(name: &str) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun");
    let file = file.unwrap_or_else(|error| panic!("/dev/net/tun: {error}"));
    // SAFETY: zeroes are a valid ifreq
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    assert_eq!(made, 0, "cannot make a TUN device: {}", io::Error::last_os_error());
    file
}

/// Waits up to 100 ms until there is something to read.
pub fn readable(file: &File) -> bool {
    let mut asked = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives on
    unsafe { libc::poll(&mut asked, 1, 100) == 1 }
}

/// Has this thread run before all that is not urgent: others keep the machine busy, and what it measures must not show that.
pub fn be_urgent() {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is this thread. Where it is not allowed, it goes without.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter) };
}

/// Jiffies of all processors since the machine was started: those that its host took for others, and all.
pub fn stolen() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let words = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    // user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in user
    let jiffies: Vec<f64> = words.take(8).filter_map(|word| word.parse().ok()).collect();
    (jiffies.get(7).copied().unwrap_or_default(), jiffies.iter().sum())
}

/// Processor time that a process has used so far, in milliseconds.
pub fn cpu_ms(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    // the 14th and 15th field, the state being the third
    let ticks = [11, 12].iter().filter_map(|place| after_name.get(*place)?.parse::<f64>().ok()).sum::<f64>();
    // SAFETY: no pointers
    ticks * 1000.0 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}
