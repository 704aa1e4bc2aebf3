//! In which order uploads leave, and how the fresh ones and the backlog share what leaves.
//!
//! Always: what counts is the bytes that left, so a lane that had nothing to send is owed nothing. Never: I/O; which device
//! is next is the queue's to know.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::Share;
use crate::upload::named;

named! {
    /// In which order uploads of one priority class leave.
    #[derive(Default)]
    Order {
        /// The oldest of all first.
        Oldest = "oldest",
        /// The newest of all first.
        Newest = "newest",
        /// Devices take turns; a share goes to each device's newest photos, the rest to its oldest.
        #[default]
        Balanced = "balanced",
    }
}

/// Which end of the devices' lines an upload is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The newest photos.
    Fresh,
    /// The oldest.
    Backlog,
}

/// Says which lane is next, so that bytes go by the set share at every moment.
#[derive(Debug, Clone)]
pub struct Lanes {
    fresh_share: Share,
    /// Bytes that the fresh lane should have had of all that left so far, less those that it had.
    owed_to_fresh: i64,
}

impl Lanes {
    pub fn new(fresh_share: Share) -> Self {
        Lanes { fresh_share, owed_to_fresh: 0 }
    }

    /// The lane that is owed the next upload.
    pub fn next(&self) -> Lane {
        match self.owed_to_fresh >= 0 && self.fresh_share != Share::NONE {
            true => Lane::Fresh,
            false => Lane::Backlog,
        }
    }

    /// So many bytes left by `lane`.
    pub fn took(&mut self, lane: Lane, bytes: u64) {
        let had = if lane == Lane::Fresh { bytes } else { 0 };
        self.owed_to_fresh += self.fresh_share.of(bytes) as i64 - had as i64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uploads of these sizes leave; what each lane had: fresh, backlog.
    fn had(fresh_share: Share, sizes: impl Iterator<Item = u64>) -> (u64, u64) {
        let mut lanes = Lanes::new(fresh_share);
        let (mut fresh, mut backlog) = (0, 0);
        for bytes in sizes {
            let lane = lanes.next();
            match lane {
                Lane::Fresh => fresh += bytes,
                Lane::Backlog => backlog += bytes,
            }
            lanes.took(lane, bytes);
        }
        (fresh, backlog)
    }

    #[test]
    fn bytes_go_by_the_share_at_every_moment() {
        for percent in ["10%", "50%", "75%", "99%"] {
            let share: Share = percent.parse().unwrap();
            let sizes = || (0..1000u64).map(|n| 1_000 + n * 7919 % 100_000);
            for many in 1..1000 {
                let (fresh, backlog) = had(share, sizes().take(many));
                let wanted = (fresh + backlog) as f64 * share.fraction();
                assert!((fresh as f64 - wanted).abs() <= 102_000.0, "{percent}: {fresh} and {backlog} of {many}");
            }
        }
    }

    #[test]
    fn all_or_nothing_is_a_share_too() {
        assert_eq!(had(Share::NONE, [5, 7, 9].into_iter()), (0, 21));
        assert_eq!(had(Share::WHOLE, [5, 7, 9].into_iter()), (21, 0));
    }

    #[test]
    fn each_order_has_its_name_and_balanced_is_the_usual_one() {
        for order in Order::ALL {
            assert_eq!(order.as_str().parse(), Ok(*order));
        }
        assert_eq!(Order::default(), Order::Balanced);
        assert!("fair".parse::<Order>().unwrap_err().contains("balanced"));
    }
}
