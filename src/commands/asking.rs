//! How commands ask a running forebay: over its console, on this machine unless told otherwise.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Failure;
use crate::config::Config;
use crate::http::problem::ProblemBody;

/// The console of a running process.
pub struct Console {
    address: SocketAddr,
}

impl Console {
    /// Where the configuration says it is.
    pub fn of(config: &Config) -> Console {
        Console { address: reachable(config.console_listen) }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.send(Method::GET, path, None).await
    }

    /// Sends a request, with this JSON as its body if there is any, and gives what the answer holds.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, Failure> {
        let address = self.address;
        let asked = async {
            // longer than the console itself waits for the queue
            let client = reqwest::Client::builder().timeout(Duration::from_secs(8)).no_proxy().build()?;
            let mut request = client.request(method, format!("http://{address}{path}"));
            if let Some(body) = body {
                request = request.json(body);
            }
            let answer = request.send().await?;
            Ok((answer.status(), answer.bytes().await?))
        };
        let (status, body) = asked.await.map_err(|error: reqwest::Error| {
            Failure(format!(
                "no forebay answers at http://{address}/ ({}); start one, or set FOREBAY_CONSOLE_LISTEN to where it is",
                crate::error::chain(&error)
            ))
        })?;
        if !status.is_success() {
            let said = serde_json::from_slice::<ProblemBody>(&body).map(|problem| problem.detail);
            return Err(Failure(said.unwrap_or_else(|_| format!("http://{address}{path} answers {status}"))));
        }
        serde_json::from_slice(&body)
            .map_err(|error| Failure(format!("what answers at http://{address}{path} is another version: {error}")))
    }
}

/// Where a listener on all addresses is reached from this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
