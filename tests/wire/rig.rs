//! What every measurement stands on: the store at the far end, and a program's own account of itself.

use std::time::Duration;

use crate::link::{STORE, Veth};
use crate::namespace::{Namespace, run};
use crate::support::program::{Program, s3_settings};
use crate::support::weed;

/// The far end, with the store.
pub struct Far {
    pub namespace: Namespace,
    pub store: weed::Server,
}

impl Far {
    pub fn start() -> Far {
        let namespace = Namespace::new();
        namespace.within(|| run(&format!("ip addr add {STORE}/32 dev lo")));
        let path = namespace.path();
        let store = weed::Server::start(STORE, Some(&path));
        Far { namespace, store }
    }

    /// A new bucket, as settings. There must be a link from this thread's namespace.
    pub async fn bucket(&self) -> Vec<(String, String)> {
        let (_, name) = self.store.bucket().await;
        s3_settings(&self.store.endpoint, &name)
    }

    /// A new bucket when no link is needed for long.
    pub async fn bucket_by_a_link_of_its_own(&self) -> Vec<(String, String)> {
        let _link = Veth::new(Namespace::here(), &self.namespace);
        self.bucket().await
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build().unwrap()
}

/// A metric of a program, by label where it has one: each line's labels and number.
pub async fn metric(program: &Program, name: &str) -> Vec<(String, f64)> {
    let Ok(answer) = client().get(format!("{}/metrics", program.console)).send().await else { return Vec::new() };
    let text = answer.text().await.unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
    let lines = lines.filter(|(labels, _)| labels.is_empty() || labels.starts_with('{'));
    lines.filter_map(|(labels, number)| Some((labels.to_owned(), number.parse().ok()?))).collect()
}

/// Changes the rate of a running program; false when it knows of no such thing.
pub async fn change_rate(program: &Program, rate: &str) -> bool {
    let body = serde_json::json!({ "rate": rate }).to_string();
    let request = client().put(format!("{}/rate", program.console)).header("content-type", "application/json");
    request.body(body).send().await.is_ok_and(|answer| answer.status().is_success())
}
