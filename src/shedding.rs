//! What is given up when the disk is full, if anything: the policies, and the choice of what goes.
//!
//! Always: a series is thinned evenly in time, and devices are thinned towards the same length. Never: I/O; who is queued is
//! the queue's to know, and how full the disk is the spool's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::upload::named;

named! {
    /// What happens when the disk is full.
    #[derive(Default)]
    WhenFull {
        /// New photos are refused; devices keep them.
        #[default]
        Refuse = "refuse",
        /// The oldest queued uploads of the lowest class are given up.
        ShedOldest = "shed-oldest",
        /// Queued uploads of the devices that have most are given up evenly in time, high priority last.
        Thin = "thin",
    }
}

/// Room below which something is shed, and room until which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    pub low_bytes: u64,
    pub high_bytes: u64,
}

impl Marks {
    /// For photos that may take `capacity_bytes` altogether: 2% of that, but enough for some seconds of a large site, and no
    /// more than a quarter of a small one.
    pub fn of(capacity_bytes: u64) -> Marks {
        let low_bytes = (capacity_bytes / 50).max(64 << 20).min(capacity_bytes / 4);
        Marks { low_bytes, high_bytes: 2 * low_bytes }
    }

    /// Bytes to be shed now, with so much room.
    pub fn to_shed(&self, room_bytes: u64) -> u64 {
        if room_bytes < self.low_bytes { self.high_bytes - room_bytes } else { 0 }
    }
}

/// How many uploads can go in one go from a line of so many, no two of them neighbours. The first and the last stay for as
/// long as there is one between them.
fn most_in_one_go(queued: u64) -> u64 {
    match queued {
        0 => 0,
        1..=2 => 1,
        _ => (queued - 1) / 2,
    }
}

/// From lines of (uploads, bytes): how many uploads go from each so that about `bytes` go in all. The longest are cut, down to
/// one common length; a line that cannot come to it in one go is cut as far as it can, and the others are no shorter for it.
pub fn share_out(lines: &[(u64, u64)], bytes: u64) -> Vec<u64> {
    let freed = |length: u64| -> u128 {
        let of_line = |(queued, bytes): &(u64, u64)| {
            u128::from(queued.saturating_sub(length)) * u128::from(*bytes) / u128::from((*queued).max(1))
        };
        lines.iter().map(of_line).sum()
    };
    // the greatest length that frees enough
    let (mut enough, mut too_long) = (0, lines.iter().map(|(queued, _)| *queued).max().unwrap_or(0));
    while enough + 1 < too_long {
        let between = enough + (too_long - enough) / 2;
        if freed(between) >= u128::from(bytes) { enough = between } else { too_long = between }
    }
    lines.iter().map(|(queued, _)| queued.saturating_sub(enough).min(most_in_one_go(*queued))).collect()
}

/// Which of a series of moments go, as places in it in ascending order: `many` of them at most, no two neighbours, those
/// first whose going leaves the smallest gap.
pub fn thin(moments: &[i64], many: u64) -> Vec<usize> {
    let many = many.min(most_in_one_go(moments.len() as u64)) as usize;
    if moments.len() <= 2 {
        return (0..many).collect();
    }
    let mut between: Vec<usize> = (1..moments.len() - 1).collect();
    // where all gaps are equal, they go from all over the series
    between.sort_by_key(|at| (moments[at + 1].saturating_sub(moments[at - 1]), at.reverse_bits()));
    let mut goes = vec![false; moments.len()];
    let mut left = many;
    for at in between {
        if left > 0 && !goes[at - 1] && !goes[at + 1] {
            goes[at] = true;
            left -= 1;
        }
    }
    (0..moments.len()).filter(|at| goes[*at]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marks_suit_large_disks_and_small_ones() {
        assert_eq!(Marks::of(1 << 40).low_bytes, (1 << 40) / 50);
        assert_eq!(Marks::of(1 << 30).low_bytes, 64 << 20);
        assert_eq!(Marks::of(8 << 20), Marks { low_bytes: 2 << 20, high_bytes: 4 << 20 });
        let marks = Marks { low_bytes: 10, high_bytes: 20 };
        assert_eq!((marks.to_shed(0), marks.to_shed(9), marks.to_shed(10)), (20, 11, 0));
    }

    #[test]
    fn the_longest_lines_are_cut_to_one_length() {
        assert_eq!(share_out(&[(100, 1_000), (60, 600), (10, 100)], 200), [20, 0, 0]);
        assert_eq!(share_out(&[(100, 1_000), (100, 1_000), (10, 100)], 200), [10, 10, 0]);
        // no more than half in one go, and nobody else pays for that
        assert_eq!(share_out(&[(100, 1_000), (20, 200)], 610), [49, 0]);
        assert_eq!(share_out(&[(101, 1_010), (5, 50), (1, 10)], 5_000), [50, 2, 1]);
        assert_eq!(share_out(&[], 10), Vec::<u64>::new());
    }

    #[test]
    fn an_even_series_stays_even() {
        let mut series: Vec<i64> = (0..1_000).map(|n| n * 60).collect();
        while series.len() > 100 {
            let goes = thin(&series, series.len() as u64 / 10);
            assert!(!goes.is_empty() && goes.windows(2).all(|two| two[0] + 1 < two[1]), "no two neighbours");
            let stays = (0..series.len()).filter(|at| !goes.contains(at));
            series = stays.map(|at| series[at]).collect();
            let gaps: Vec<i64> = series.windows(2).map(|two| two[1] - two[0]).collect();
            let (least, most) = (gaps.iter().min().unwrap(), gaps.iter().max().unwrap());
            assert!(*most <= 4 * least, "{least} to {most} with {} left", series.len());
        }
        assert_eq!((series[0], *series.last().unwrap()), (0, 999 * 60));
    }

    #[test]
    fn where_photos_are_dense_more_of_them_go() {
        let series: Vec<i64> = (0..50).chain((1..50).map(|n| 100 + n * 100)).collect();
        assert!(thin(&series, 20).iter().all(|at| *at < 50));
    }

    #[test]
    fn the_last_of_a_line_goes_when_nothing_else_is_left() {
        assert_eq!(thin(&[7], 5), [0]);
        assert_eq!(thin(&[7, 8], 5), [0]);
        assert_eq!(thin(&[7, 8, 9], 5), [1]);
        assert_eq!(thin(&[], 5), Vec::<usize>::new());
    }
}
