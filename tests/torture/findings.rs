//! What a run found, and whether that is as it must be.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use forebay::bucket::Bucket;
use forebay::ledger::{self, Ack, Entry};
use forebay::upload::{Sha256, UploadId};
use futures_util::{StreamExt, stream};
use serde_json::Value;

use crate::support::agreement;

/// The longest that a process that was killed may take to be ready again.
const READY_MAX: Duration = Duration::from_secs(10);

/// Everything that is known at the end.
#[derive(Default)]
pub struct Findings {
    pub seconds: u64,
    /// What the fleet said of itself.
    pub fleet: String,
    /// Whether it must have noticed nothing.
    pub unnoticed: bool,
    /// Kills by what was killed, and how long each took to be ready again.
    pub kills: Vec<(&'static str, Duration)>,
    pub s3_requests: u64,
    pub s3_faults: u64,
    pub acknowledged: u64,
    pub lost: Vec<String>,
    pub wrong: Vec<String>,
    pub duplicated: u64,
    pub verify: Value,
}

impl Findings {
    /// Holds the ledger against the bucket without asking the appliance anything, and has the appliance hold everything
    /// against everything.
    pub async fn hold(&mut self, ledger: &Path, bucket: &Bucket, settings: &[(String, String)], data: &Path) {
        let mut sent: HashMap<(String, String), Sha256> = HashMap::new();
        let mut acks: HashMap<UploadId, (Ack, Option<Sha256>)> = HashMap::new();
        ledger::read(ledger, |entry| match entry {
            Entry::Sent { device_id, upload_id, sha256, .. } => drop(sent.insert((device_id, upload_id), sha256)),
            Entry::Answered { device_id, upload_id, ack: Some(ack), .. } => {
                let bytes = sent.get(&(device_id, upload_id)).copied();
                acks.insert(ack.id, (ack, bytes));
            }
            _ => {}
        })
        .unwrap();
        self.acknowledged = acks.len() as u64;
        let mut found: HashSet<String> = HashSet::new();
        let mut objects = 0;
        bucket
            .list("", |object| {
                objects += 1;
                // a key ends in the upload's id; two keys with one id are one photo twice
                let name = object.key.rsplit('/').next().unwrap_or_default();
                found.insert(name.split('.').next().unwrap_or_default().to_owned());
            })
            .await
            .unwrap();
        self.duplicated = objects - found.len() as u64;
        let looks = acks.into_values().map(|(ack, bytes)| async move {
            let object = bucket.read_back(&ack.object_key).await.unwrap();
            (ack, bytes, object)
        });
        let mut looks = stream::iter(looks).buffer_unordered(8);
        while let Some((ack, bytes, object)) = looks.next().await {
            match object {
                None => self.lost.push(ack.object_key),
                Some((size, sha256)) if size == ack.size_bytes && Some(sha256) == bytes => {}
                Some(_) => self.wrong.push(ack.object_key),
            }
        }
        drop(looks);
        self.verify = agreement::verify(settings, data, &ledger.display().to_string()).await;
    }

    /// Prints everything; true when it is as it must be.
    pub fn are_sound(mut self) -> bool {
        let line = |what: &str, text: String| println!("  {what:<22}{text}");
        println!();
        line("tortured for", format!("{} s", self.seconds));
        line("the fleet", self.fleet.trim().to_owned());
        line("acknowledged", self.acknowledged.to_string());
        let mut by_name: Vec<(&str, usize)> = Vec::new();
        for (name, _) in &self.kills {
            match by_name.iter_mut().find(|(known, _)| known == name) {
                Some((_, count)) => *count += 1,
                None => by_name.push((name, 1)),
            }
        }
        let by_name: Vec<String> = by_name.iter().map(|(name, count)| format!("{name} {count}")).collect();
        line("kills", format!("{}   {}", self.kills.len(), by_name.join(", ")));
        self.kills.sort_by_key(|(_, ready)| *ready);
        let median = self.kills.get(self.kills.len() / 2).map_or(Duration::ZERO, |(_, ready)| *ready);
        let longest = self.kills.last().map_or(Duration::ZERO, |(_, ready)| *ready);
        if !self.kills.is_empty() {
            line("ready after a kill", format!("{median:.2?} (median), {longest:.2?} (longest)"));
        }
        if self.s3_requests > 0 {
            line("S3 faults", format!("{} of {} requests", self.s3_faults, self.s3_requests));
        }
        line("lost", self.lost.len().to_string());
        line("duplicated", self.duplicated.to_string());
        line("wrong bytes", self.wrong.len().to_string());
        let agrees = self.verify["disagreements"] == 0 && self.verify["lost"] == 0 && self.verify["dead"] == 0;
        line("forebay verify", if agrees { "everything agrees".to_owned() } else { self.verify.to_string() });
        let mut troubles: Vec<String> = Vec::new();
        troubles.extend(self.lost.iter().map(|key| format!("lost: {key}")));
        troubles.extend(self.wrong.iter().map(|key| format!("wrong bytes: {key}")));
        if self.duplicated > 0 {
            troubles.push("there are two objects of one upload".to_owned());
        }
        if !agrees {
            troubles.push("the appliance's own books do not agree".to_owned());
        }
        if longest > READY_MAX {
            troubles.push(format!("a process took {longest:.1?} to be ready; {READY_MAX:?} are allowed"));
        }
        if self.unnoticed && !self.fleet.contains(" 0 tries repeated, 0 refused, 0 unanswered") {
            troubles.push("a device saw a failure".to_owned());
        }
        if self.acknowledged == 0 {
            troubles.push("nothing was acknowledged, so nothing was shown".to_owned());
        }
        troubles.iter().take(20).for_each(|trouble| println!("  TROUBLE: {trouble}"));
        println!();
        println!("torture: {}", if troubles.is_empty() { "nothing was lost" } else { "FAILED" });
        troubles.is_empty()
    }
}
