//! The credentials by which photos are signed, from AWS's own chain.
//!
//! Always: used until shortly before they end, and asked for again when the store refused them, as they may have been replaced;
//! those who need them at once ask once. Never: shown in an error.

use std::time::{Duration, SystemTime};

use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_smithy_runtime_api::client::identity::Identity;
use tokio::sync::Mutex;

/// They are not used for the last of their time: the store looks at them when a request has come.
const BEFORE_THEIR_END: Duration = Duration::from_secs(60);
/// Those that have no end are asked for again so often, as a file may hold others by now.
const WITHOUT_END: Duration = Duration::from_secs(15 * 60);
/// Longest wait for them.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Credentials that are held.
pub(super) struct Credentials {
    /// None where there is nobody to ask.
    provider: Option<SharedCredentialsProvider>,
    held: Mutex<Option<Held>>,
}

struct Held {
    identity: Identity,
    until: SystemTime,
}

impl Credentials {
    /// Of this provider, which is not asked yet.
    pub(super) fn of(provider: Option<SharedCredentialsProvider>) -> Credentials {
        Credentials { provider, held: Mutex::default() }
    }

    /// Those that are held, or new ones.
    pub(super) async fn get(&self) -> Result<Identity, CredentialsError> {
        // whoever waits here waits for the same
        let mut held = self.held.lock().await;
        let now = SystemTime::now();
        if let Some(held) = held.as_ref().filter(|held| now < held.until) {
            return Ok(held.identity.clone());
        }
        let provider = self.provider.as_ref().ok_or_else(CredentialsError::not_loaded_no_source)?;
        let provided = tokio::time::timeout(TIMEOUT, provider.provide_credentials()).await;
        let provided = provided.map_err(|_| CredentialsError::provider_timed_out(TIMEOUT))??;
        let until = match provided.expiry() {
            Some(end) => end.checked_sub(BEFORE_THEIR_END).unwrap_or(now),
            None => now + WITHOUT_END,
        };
        let identity = Identity::from(provided);
        *held = Some(Held { identity: identity.clone(), until });
        Ok(identity)
    }

    /// The store refused them: the next are new.
    pub(super) async fn forget(&self) {
        self.held.lock().await.take();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use aws_credential_types::Credentials as Provided;
    use aws_credential_types::provider::future;

    use super::*;

    /// Gives others each time, which end when it says.
    #[derive(Debug, Clone)]
    struct Counting {
        asked: Arc<AtomicU64>,
        end: Option<SystemTime>,
    }

    impl ProvideCredentials for Counting {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            let key = format!("key-{}", self.asked.fetch_add(1, Ordering::Relaxed));
            future::ProvideCredentials::ready(Ok(Provided::new(key, "secret", None, self.end, "counting")))
        }
    }

    fn ending(end: Option<SystemTime>) -> Credentials {
        Credentials::of(Some(SharedCredentialsProvider::new(Counting { asked: Arc::default(), end })))
    }

    async fn key(credentials: &Credentials) -> String {
        let identity = credentials.get().await.unwrap();
        identity.data::<Provided>().unwrap().access_key_id().to_owned()
    }

    #[tokio::test]
    async fn they_are_held_while_they_hold() {
        for end in [None, Some(SystemTime::now() + Duration::from_secs(3600))] {
            let credentials = ending(end);
            assert_eq!([key(&credentials).await, key(&credentials).await], ["key-0", "key-0"]);
        }
    }

    #[tokio::test]
    async fn those_about_to_end_are_not_used_again() {
        let credentials = ending(Some(SystemTime::now() + Duration::from_secs(50)));
        assert_eq!([key(&credentials).await, key(&credentials).await], ["key-0", "key-1"]);
    }

    #[tokio::test]
    async fn those_that_the_store_refused_are_not_used_again() {
        let credentials = ending(None);
        assert_eq!(key(&credentials).await, "key-0");
        credentials.forget().await;
        assert_eq!(key(&credentials).await, "key-1");
    }
}
