//! What is known of the environment (link, store, credentials, clock) from how uploads end, and the pause it forces.
//!
//! Always: a fault that others survive is a single fault, and only its upload rests; a row of faults, or nothing that moves,
//! is an outage: the drain pauses, and one upload at a time probes whether it is over. The first fault is logged; what
//! follows is counted until it is over. Never: a pause longer than the way back may take.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::status::Condition;
use crate::units::UnixMs;
use crate::upload::UploadId;

/// So many faults with no upload passing in between are an outage.
const FAULTS_IN_A_ROW: u32 = 5;
/// So many uploads refused with none passing in between are an outage too: it is not the photos, then.
const REFUSED_IN_A_ROW: usize = 5;
/// The first pause of an outage; it doubles with each probe that fails, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(4);

/// How the way to the bucket does.
#[derive(Debug, Default)]
pub struct Environment {
    /// When the latest upload passed, that counts. Faults and refusals before it are in no row with those behind it, however
    /// late they are told of.
    passed_at: Option<Instant>,
    faults_in_a_row: u32,
    refused_in_a_row: HashSet<UploadId>,
    outage: Option<Outage>,
}

#[derive(Debug)]
struct Outage {
    reason: String,
    began: Instant,
    since: UnixMs,
    /// No probe before this; the same for the operator.
    rests_until: Instant,
    until: UnixMs,
    probes: u32,
    faults: u64,
}

impl Environment {
    /// An upload failed then by the environment's fault; `others` are on their way, or have just landed.
    pub fn failed(&mut self, reason: String, at: Instant, others: bool) {
        let passed_since = self.passed_since(at);
        if !passed_since {
            self.faults_in_a_row += 1;
        }
        match &mut self.outage {
            None if passed_since || others && self.faults_in_a_row < FAULTS_IN_A_ROW => {
                tracing::debug!(reason, "a fault of the environment");
            }
            None => self.begin(reason, PAUSE_MIN),
            Some(outage) => {
                outage.faults += 1;
                // several were on their way when it broke; they are one fault
                if outage.rests_until <= at {
                    outage.probes += 1;
                    let rest = PAUSE_MIN.saturating_mul(1 << outage.probes.min(10)).min(PAUSE_MAX);
                    (outage.rests_until, outage.until) = after(rest.mul_f64(rand::random_range(0.8..1.0)));
                    outage.reason = reason;
                }
            }
        }
    }

    /// The store refused an upload then by its own fault, as it seems.
    pub fn refused(&mut self, upload: UploadId, why: String, at: Instant) {
        if !self.passed_since(at) {
            self.refused_in_a_row.insert(upload);
        }
        if self.outage.is_none() && self.refused_in_a_row.len() >= REFUSED_IN_A_ROW {
            self.begin(format!("every upload is refused, the last one for this: {why}"), PAUSE_MIN);
        }
    }

    /// Everything that is on its way stands still.
    pub fn hangs(&mut self) {
        if self.outage.is_none() {
            // a probe at once: what stands still may be its own connection's fault
            self.begin("the link or the store hangs: nothing moves".to_owned(), Duration::ZERO);
        }
    }

    fn begin(&mut self, reason: String, rest: Duration) {
        tracing::warn!(%reason, "the drain pauses until this is over; no upload is charged for it");
        let (rests_until, until) = after(rest);
        self.outage = Some(Outage {
            reason,
            began: Instant::now(),
            since: UnixMs::now(),
            rests_until,
            until,
            probes: 0,
            faults: 1,
        });
    }

    fn passed_since(&self, at: Instant) -> bool {
        self.passed_at.is_some_and(|passed_at| passed_at > at)
    }

    /// An upload passed then, the latest of all. To say so again changes nothing.
    pub fn works(&mut self, at: Instant) {
        // what was on its way when the pause began says nothing of its end
        let in_a_rest = self.outage.as_ref().is_some_and(|outage| at < outage.rests_until);
        if in_a_rest || self.passed_at == Some(at) {
            return;
        }
        self.passed_at = Some(at);
        self.faults_in_a_row = 0;
        self.refused_in_a_row.clear();
        if let Some(over) = self.outage.take() {
            let seconds = UnixMs::now().since(over.since).as_secs();
            tracing::info!(paused_seconds = seconds, faults = over.faults, "the drain pours again");
        }
    }

    /// Until when nothing may be sent.
    pub fn rests_until(&self) -> Option<Instant> {
        self.outage.as_ref().map(|outage| outage.rests_until).filter(|until| *until > Instant::now())
    }

    /// When the outage began, if there is one. Uploads that began later are probes.
    pub fn outage_since(&self) -> Option<Instant> {
        self.outage.as_ref().map(|outage| outage.began)
    }

    /// What the operator sees of it.
    pub fn paused(&self) -> Option<Condition> {
        let paused = |outage: &Outage| Condition::Paused {
            reason: outage.reason.clone(),
            since: outage.since,
            until: outage.until,
        };
        self.outage.as_ref().map(paused)
    }
}

/// The moment when a rest is over, by both clocks.
fn after(rest: Duration) -> (Instant, UnixMs) {
    (Instant::now() + rest, UnixMs(UnixMs::now().0 + rest.as_millis() as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_others_survive_does_not_pause_the_drain() {
        let mut environment = Environment::default();
        for _ in 0..10 {
            environment.failed("503".to_owned(), Instant::now(), true);
            environment.failed("503".to_owned(), Instant::now(), true);
            environment.works(Instant::now());
        }
        assert_eq!(environment.paused(), None);
        assert_eq!(environment.outage_since(), None);
    }

    #[test]
    fn a_row_of_faults_pauses_it_and_one_upload_probes() {
        let mut environment = Environment::default();
        for _ in 0..FAULTS_IN_A_ROW {
            environment.failed("503".to_owned(), Instant::now(), true);
        }
        assert!(environment.paused().is_some() && environment.rests_until().is_some());
        assert!(environment.outage_since().is_some());
        environment.works(Instant::now());
        assert!(environment.paused().is_some(), "it was on its way before");
    }

    #[test]
    fn faults_between_which_an_upload_passed_are_in_no_row_however_late_they_are_told_of() {
        let (mut environment, start) = (Environment::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        environment.works(at(50));
        let told_late = |environment: &mut Environment, ms| {
            environment.failed("503".to_owned(), at(ms), true);
            environment.refused(UploadId::new(), "BadDigest".to_owned(), at(ms));
        };
        (10..20).chain(60..64).for_each(|ms| told_late(&mut environment, ms));
        environment.works(at(50)); // the same as before
        assert_eq!(environment.paused(), None);
        told_late(&mut environment, 64);
        assert!(environment.paused().is_some());
    }

    #[test]
    fn what_passed_in_a_rest_does_not_end_it_when_it_is_seen_later() {
        let (mut environment, start) = (Environment::default(), Instant::now());
        environment.failed("no route".to_owned(), start, false);
        let rests_until = environment.rests_until().expect("a rest");
        environment.works(start + PAUSE_MIN / 10);
        assert!(environment.paused().is_some());
        environment.works(rests_until);
        assert_eq!(environment.paused(), None);
    }

    #[test]
    fn a_fault_pauses_it_at_once_when_nothing_else_is_on_its_way() {
        let mut environment = Environment::default();
        environment.failed("no route".to_owned(), Instant::now(), false);
        assert!(matches!(environment.paused(), Some(Condition::Paused { reason, .. }) if reason == "no route"));
    }

    #[test]
    fn uploads_that_are_all_refused_are_an_outage_and_one_that_is_refused_again_and_again_is_none() {
        let (mut environment, upload) = (Environment::default(), UploadId::new());
        (0..20).for_each(|_| environment.refused(upload, "BadDigest".to_owned(), Instant::now()));
        assert_eq!(environment.outage_since(), None);
        (0..4).for_each(|_| environment.refused(UploadId::new(), "BadDigest".to_owned(), Instant::now()));
        assert!(environment.paused().is_some());
    }

    #[test]
    fn what_hangs_is_probed_at_once_and_over_when_one_passes() {
        let mut environment = Environment::default();
        environment.hangs();
        assert!(environment.paused().is_some() && environment.rests_until().is_none());
        environment.works(Instant::now());
        assert_eq!(environment.paused(), None);
    }
}
