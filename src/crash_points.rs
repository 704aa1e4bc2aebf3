//! Crash points: the steps by which something becomes durable, by name, so that a test can have each of them go wrong.
//!
//! Always: a point that is armed acts once, at the passing it was armed for, and says so in the log before it does; a point
//! that fails does so as its step itself would. Never: anything at all without the feature `crash-points`, which the tests
//! turn on and a build that is shipped does not have; there, passing a point is no instruction.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use crate::units::parse_span;

/// The variable that arms points; without the feature there is none, so that setting it is an error like any other name.
pub const VARIABLE: Option<&str> = if cfg!(feature = "crash-points") { Some("FOREBAY_CRASH_POINTS") } else { None };

macro_rules! points {
    ($($(#[$meaning:meta])+ $point:ident = $name:literal,)+) => {
        /// A step of persistence.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Point {
            $($(#[$meaning])+ $point,)+
        }

        impl Point {
            /// Every point, in the order in which an upload passes them.
            pub const ALL: &[Point] = &[$(Point::$point,)+];

            /// The name by which it is armed.
            pub fn name(self) -> &'static str {
                match self {
                    $(Point::$point => $name,)+
                }
            }
        }
    };
}

points! {
    /// Before the file in `incoming/` is made.
    SpoolCreate = "spool.create",
    /// The file in `incoming/` is made, nothing is written.
    SpoolWrite = "spool.write",
    /// All is written, nothing synced.
    SpoolSync = "spool.sync",
    /// Synced, without its name.
    SpoolRename = "spool.rename",
    /// Renamed; the folder is not synced.
    SpoolSyncFolder = "spool.sync_folder",
    /// Durable; nobody was told.
    SpoolStored = "spool.stored",
    /// The transaction is not committed.
    QueueCommit = "queue.commit",
    /// Committed; whoever waits was not told. Failing, it is a commit whose reply was lost.
    QueueCommitted = "queue.committed",
    /// Before the mark is made.
    JournalMark = "journal.mark",
    /// The mark is made; the journal's folder is not synced.
    JournalSync = "journal.sync",
    /// The mark is durable; nobody was told.
    JournalMarked = "journal.marked",
    /// Everything is durable; the device was not told.
    IngestAnswer = "ingest.answer",
    /// The keeper found a mark; the queue was not asked.
    JournalTakeIn = "journal.take_in",
    /// Two photos have one upload_id; the second does not have an id of its own yet.
    JournalRename = "journal.rename",
    /// The second is in the spool under its own id; the queue does not know.
    JournalRenamed = "journal.renamed",
    /// The queue knows both; the second is in the spool twice.
    JournalRenamedTold = "journal.renamed_told",
    /// The queue has it; the mark is still there.
    JournalTakenIn = "journal.taken_in",
    /// Leased; the drain was not told. Failing, it is a claim whose reply was lost.
    DrainClaimed = "drain.claimed",
    /// Before the first byte leaves.
    DrainPut = "drain.put",
    /// The store confirmed it; the queue was not told.
    DrainUploaded = "drain.uploaded",
    /// The queue was told; the drain does not know. Failing, it is a reply that was lost.
    DrainFinished = "drain.finished",
    /// The photo's time is over; it is on disk.
    KeeperRemove = "keeper.remove",
    /// It is off the disk; its record does not say so.
    KeeperRemoved = "keeper.removed",
    /// Its record says so.
    KeeperTold = "keeper.told",
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Point {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Point::ALL.iter().find(|point| point.name() == text).copied().ok_or_else(|| {
            let names: Vec<&str> = Point::ALL.iter().map(|point| point.name()).collect();
            format!("expected one of {}, found {text:?}", names.join(", "))
        })
    }
}

/// What a point that is armed does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The process ends at once, as if it were killed.
    Abort,
    /// The step fails with an I/O error.
    Fail,
    /// Whoever passes is held for so long; all others go on.
    Stall(Duration),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Abort => f.write_str("abort"),
            Action::Fail => f.write_str("fail"),
            Action::Stall(span) => write!(f, "stall={}ms", span.as_millis()),
        }
    }
}

impl FromStr for Action {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("stall=")) {
            ("abort", _) => Ok(Action::Abort),
            ("fail", _) => Ok(Action::Fail),
            (_, Some(span)) => parse_span(span).map(Action::Stall),
            _ => Err(format!("expected abort, fail or stall=<span>, found {text:?}")),
        }
    }
}

/// A point, what it does, and at which of its passings, from 1. Reads and prints as `spool.sync:abort:3`; left out, the
/// passing is the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Armed {
    pub point: Point,
    pub action: Action,
    pub at: u32,
}

impl fmt::Display for Armed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.point, self.action, self.at)
    }
}

impl FromStr for Armed {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (Some(point), Some(action)) = (parts.next(), parts.next()) else {
            return Err(format!("expected <point>:<action> or <point>:<action>:<passing>, found {text:?}"));
        };
        let at = match (parts.next(), parts.next()) {
            (None, _) => 1,
            (Some(at), None) => at.parse().ok().filter(|at| *at > 0).ok_or_else(|| {
                format!("expected the number of a passing, from 1, after {point}:{action}, found {at:?}")
            })?,
            _ => return Err(format!("expected nothing after the number of the passing, found {text:?}")),
        };
        Ok(Armed { point: point.parse()?, action: action.parse()?, at })
    }
}

/// Reads what is to be armed: several with commas between them, or none.
pub fn parse(text: &str) -> Result<Vec<Armed>, String> {
    text.split(',').map(str::trim).filter(|armed| !armed.is_empty()).map(str::parse).collect()
}

#[cfg(not(feature = "crash-points"))]
pub use without::{arm, pass, pass_blocking};

#[cfg(not(feature = "crash-points"))]
mod without {
    use super::{Armed, Point, io};

    #[inline(always)]
    pub fn arm(_: &[Armed]) {}

    #[inline(always)]
    pub fn pass_blocking(_: Point) -> io::Result<()> {
        Ok(())
    }

    #[inline(always)]
    pub fn pass(_: Point) -> std::future::Ready<io::Result<()>> {
        std::future::ready(Ok(()))
    }
}

#[cfg(feature = "crash-points")]
pub use with::{arm, pass, pass_blocking};

#[cfg(feature = "crash-points")]
mod with {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::{Action, Armed, Point, io};

    /// What is armed in this process.
    static ARMED: OnceLock<Vec<Counted>> = OnceLock::new();

    pub(super) struct Counted {
        armed: Armed,
        passings: AtomicU32,
    }

    pub(super) fn counted(armed: &[Armed]) -> Vec<Counted> {
        armed.iter().map(|armed| Counted { armed: *armed, passings: AtomicU32::new(0) }).collect()
    }

    /// What this passing of `point` is to bring; each that is armed counts for itself.
    pub(super) fn due(armed: &[Counted], point: Point) -> Option<Action> {
        let mut due = None;
        for Counted { armed, passings } in armed.iter().filter(|counted| counted.armed.point == point) {
            if passings.fetch_add(1, Ordering::SeqCst) + 1 == armed.at {
                due = Some(armed.action);
            }
        }
        due
    }

    /// Arms points, once per process.
    pub fn arm(armed: &[Armed]) {
        if !armed.is_empty() && ARMED.set(counted(armed)).is_ok() {
            let points: Vec<String> = armed.iter().map(Armed::to_string).collect();
            tracing::warn!(points = points.join(","), "crash points are armed");
        }
    }

    /// Logged before it is done: standard error is not buffered, so the line is out when the process is gone.
    fn reached(point: Point) -> Option<Action> {
        let action = due(ARMED.get()?, point)?;
        tracing::error!(%point, %action, "crash point reached");
        Some(action)
    }

    fn over(point: Point) -> io::Result<()> {
        tracing::error!(%point, "the stall at a crash point is over");
        Ok(())
    }

    fn failure() -> io::Error {
        io::Error::from(rustix::io::Errno::IO)
    }

    /// Passes a point where blocking is allowed.
    pub fn pass_blocking(point: Point) -> io::Result<()> {
        match reached(point) {
            None => Ok(()),
            Some(Action::Abort) => std::process::abort(),
            Some(Action::Fail) => Err(failure()),
            Some(Action::Stall(span)) => {
                std::thread::sleep(span);
                over(point)
            }
        }
    }

    /// Passes a point in a task.
    pub async fn pass(point: Point) -> io::Result<()> {
        match reached(point) {
            None => Ok(()),
            Some(Action::Abort) => std::process::abort(),
            Some(Action::Fail) => Err(failure()),
            Some(Action::Stall(span)) => {
                tokio::time::sleep(span).await;
                over(point)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_armed_reads_as_it_prints() {
        let text = "spool.sync:abort:3,queue.commit:fail:1,drain.finished:stall=30000ms:2";
        let armed = parse(text).unwrap();
        let printed: Vec<String> = armed.iter().map(Armed::to_string).collect();
        assert_eq!(printed.join(","), text);
        assert_eq!(armed[2].action, Action::Stall(Duration::from_secs(30)));
        assert_eq!(parse(" queue.commit:fail , ").unwrap(), armed[1..2], "the passing is the first unless it is said");
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn every_point_has_a_name_of_its_own_by_which_it_is_found() {
        for point in Point::ALL {
            assert_eq!(point.name().parse(), Ok(*point));
        }
    }

    #[test]
    fn what_cannot_be_armed_is_refused_with_what_was_expected() {
        for (text, expected) in [
            ("spool.sink:abort", "spool.sync, "),
            ("spool.sync", "<point>:<action>"),
            ("spool.sync:explode", "abort, fail or stall=<span>"),
            ("spool.sync:stall", "abort, fail or stall=<span>"),
            ("spool.sync:stall=soon", "a span such as"),
            ("spool.sync:abort:0", "from 1"),
            ("spool.sync:abort:often", "from 1"),
            ("spool.sync:abort:1:2", "nothing after"),
            ("spool.sync:abort;queue.commit:abort", "from 1"),
        ] {
            let wrong = parse(text).unwrap_err();
            assert!(wrong.contains(expected) && wrong.contains("found"), "{text}: {wrong}");
        }
    }

    #[test]
    fn a_point_acts_at_its_passing_and_only_then() {
        let armed = with::counted(&parse("spool.sync:fail:2,spool.sync:abort:4,queue.commit:abort").unwrap());
        let due: Vec<Option<Action>> = (0..5).map(|_| with::due(&armed, Point::SpoolSync)).collect();
        assert_eq!(due, [None, Some(Action::Fail), None, Some(Action::Abort), None]);
        assert_eq!(with::due(&armed, Point::SpoolCreate), None);
    }
}
