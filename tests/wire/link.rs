//! Links between the site and the far end, where the store is.
//!
//! Always: the far end has one address, [`STORE`], by whichever link; MTU 1500, and no offload, so that what the interface counts
//! is what a wire would carry. Never: two links to the site at once.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::counters::Counter;
use crate::namespace::{Namespace, be_urgent, readable, run, tun};

/// Where the store is, at the far end.
pub const STORE: &str = "10.99.0.1";

/// A plain link as fast as the machine, from a namespace to the far end. Gone when dropped.
pub struct Veth {
    near: Namespace,
    pub near_interface: String,
    pub far_interface: String,
}

impl Veth {
    pub fn new(near: Namespace, far: &Namespace) -> Veth {
        let (number, near_interface, far_interface) = names();
        let peer = far.path();
        near.within(|| {
            run(&format!(
                "ip link add {near_interface} mtu 1500 type veth peer name {far_interface} mtu 1500 netns {}",
                peer.display()
            ));
        });
        let offloads = "tso off gso off gro off";
        far.within(|| {
            run(&format!("ethtool -K {far_interface} {offloads}"));
            run(&format!("ip addr add 10.98.{number}.2/24 dev {far_interface}"));
            run(&format!("ip link set {far_interface} up"));
        });
        near.within(|| {
            run(&format!("ethtool -K {near_interface} {offloads}"));
            run(&format!("ip addr add 10.98.{number}.1/24 dev {near_interface}"));
            run(&format!("ip link set {near_interface} up"));
            run(&format!("ip route replace {STORE} via 10.98.{number}.2"));
        });
        Veth { near, near_interface, far_interface }
    }

    /// What leaves the site by it.
    pub fn counter(&self) -> Counter {
        Counter { interface: self.near_interface.clone(), sent: true, adds_heads: false }
    }

    /// The same, as it arrives at the far end.
    pub fn counter_at_far_end(&self) -> Counter {
        Counter { interface: self.far_interface.clone(), sent: false, adds_heads: false }
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        // where even this fails, it goes with its namespace
        self.near.within(|| {
            let _ = std::process::Command::new("ip").args(["link", "del", &self.near_interface]).output();
        });
    }
}

/// What a link is like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// From one end to the other.
    pub delay: Duration,
    /// Bytes of packets per second on the way to the far end; none is as fast as the machine.
    pub rate: Option<u64>,
}

/// What waits before a link that has a rate, at most; what comes beyond is dropped.
const QUEUE: Duration = Duration::from_millis(200);

/// A link that is made of two TUN devices and threads that carry packets between them. Gone when dropped.
pub struct Emulated {
    pub interface: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Everything is dropped.
    stalled: AtomicBool,
    stop: AtomicBool,
    dropped: AtomicU64,
}

impl Emulated {
    /// From this thread's namespace to the far end.
    pub fn new(far: &Namespace, shape: Shape) -> Emulated {
        let (number, near_interface, far_interface) = names();
        let set_up = |name: &str, address: &str, peer: &str| {
            let device = tun(name);
            run(&format!("ip link set {name} mtu 1500 up"));
            run(&format!("ip addr add {address} peer {peer} dev {name}"));
            Arc::new(device)
        };
        let (near_address, far_address) = (format!("10.98.{number}.1"), format!("10.98.{number}.2"));
        let near_device = set_up(&near_interface, &near_address, &far_address);
        run(&format!("ip route replace {STORE} dev {near_interface} src {near_address}"));
        let far_device = far.within(|| set_up(&far_interface, &far_address, &near_address));
        let state = Arc::new(State::default());
        carry(near_device.clone(), far_device.clone(), shape, state.clone());
        carry(far_device, near_device, Shape { rate: None, ..shape }, state.clone());
        Emulated { interface: near_interface, state }
    }

    /// Drops everything from now on, or no longer.
    pub fn stall(&self, stalled: bool) {
        self.state.stalled.store(stalled, Ordering::Relaxed);
    }

    /// Packets that found no room or met a stall.
    pub fn dropped(&self) -> u64 {
        self.state.dropped.load(Ordering::Relaxed)
    }

    /// What leaves the site by it.
    pub fn counter(&self) -> Counter {
        Counter { interface: self.interface.clone(), sent: true, adds_heads: true }
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
    }
}

/// Carries packets one way, in order, until it is stopped.
fn carry(from: Arc<File>, to: Arc<File>, shape: Shape, state: Arc<State>) {
    let (sender, receiver) = std::sync::mpsc::channel::<(Instant, Vec<u8>)>();
    std::thread::spawn(move || {
        be_urgent();
        let mut packet = [0; 2048];
        // when all that was taken so far will have left
        let mut free_at = Instant::now();
        while !state.stop.load(Ordering::Relaxed) {
            if !readable(&from) {
                continue;
            }
            let Ok(length) = (&*from).read(&mut packet) else { return };
            let now = Instant::now();
            free_at = free_at.max(now);
            if state.stalled.load(Ordering::Relaxed) || free_at - now > QUEUE {
                state.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if let Some(rate) = shape.rate {
                free_at += Duration::from_secs_f64(length as f64 / rate as f64);
            }
            if sender.send((free_at + shape.delay, packet[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        be_urgent();
        for (due, packet) in receiver {
            if let Some(left) = due.checked_duration_since(Instant::now()) {
                std::thread::sleep(left);
            }
            // an end that is gone takes nothing
            let _ = (&*to).write(&packet);
        }
    });
}

/// A number of its own and two names of interfaces.
fn names() -> (u32, String, String) {
    static LINKS: AtomicU32 = AtomicU32::new(1);
    let number = LINKS.fetch_add(1, Ordering::Relaxed);
    (number, format!("up{number}"), format!("down{number}"))
}
