//! The credentials by which photos are signed, from AWS's own chain.
//!
//! Always: used until shortly before they end, and to their end where no others are to be had; asked for anew when the store refused
//! them, as they may have been replaced; those who need new ones at once ask once, and none waits for longer than [`TIMEOUT`]. Never:
//! shown in an error.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials as Provided;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_smithy_runtime_api::client::identity::Identity;

/// Others are asked for so long before their end.
const BEFORE_THEIR_END: Duration = Duration::from_secs(60);
/// Those that have no end are asked for again so often: what provides them may have others by now.
const WITHOUT_END: Duration = Duration::from_secs(15 * 60);
/// Longest wait for them.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Credentials that are held.
pub(super) struct Credentials {
    /// None where there is nobody to ask.
    provider: Option<SharedCredentialsProvider>,
    held: Mutex<Option<Held>>,
    /// Whoever has it asks the provider.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Held {
    identity: Identity,
    used_until: SystemTime,
    end: Option<SystemTime>,
}

impl Credentials {
    /// Of this provider, which is not asked yet.
    pub(super) fn of(provider: Option<SharedCredentialsProvider>) -> Credentials {
        Credentials { provider, held: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    /// Those that are held, or new ones. `now` is the time by which the store goes.
    pub(super) async fn get(&self, now: SystemTime) -> Result<Identity, CredentialsError> {
        if let Some(fresh) = self.fresh(now) {
            return Ok(fresh);
        }
        let asked = tokio::time::timeout(TIMEOUT, self.ask(now)).await;
        let error = match asked {
            Ok(Ok(identity)) => return Ok(identity),
            Ok(Err(error)) => error,
            Err(_) => CredentialsError::provider_timed_out(TIMEOUT),
        };
        let held = self.held().clone().filter(|held| held.end.is_none_or(|end| now < end));
        let last = || self.provider.as_ref()?.fallback_on_interrupt().map(Identity::from);
        held.map(|held| held.identity).or_else(last).ok_or(error)
    }

    /// Asks the provider, unless somebody else has.
    async fn ask(&self, now: SystemTime) -> Result<Identity, CredentialsError> {
        let _asking = self.asking.lock().await;
        if let Some(fresh) = self.fresh(now) {
            return Ok(fresh);
        }
        let provider = self.provider.as_ref().ok_or_else(CredentialsError::not_loaded_no_source)?;
        let provided = provider.provide_credentials().await?;
        let end = provided.expiry();
        let used_until = end.map_or(now + WITHOUT_END, |end| end.checked_sub(BEFORE_THEIR_END).unwrap_or(now));
        let identity = Identity::from(provided);
        *self.held() = Some(Held { identity: identity.clone(), used_until, end });
        Ok(identity)
    }

    fn fresh(&self, now: SystemTime) -> Option<Identity> {
        self.held().as_ref().filter(|held| now < held.used_until).map(|held| held.identity.clone())
    }

    /// The store refused these; unless others are held by now, the next are new.
    pub(super) fn refused(&self, refused: &Identity) {
        let mut held = self.held();
        if held.as_ref().is_some_and(|held| held.identity.data::<Provided>() == refused.data::<Provided>()) {
            *held = None;
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use aws_credential_types::provider::future;

    use super::*;

    /// Gives others each time, which end when it says, for as often as it says.
    #[derive(Debug, Clone)]
    struct Counting {
        asked: Arc<AtomicU64>,
        end: Option<SystemTime>,
        times: u64,
    }

    impl ProvideCredentials for Counting {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            let asked = self.asked.fetch_add(1, Ordering::Relaxed);
            match asked < self.times {
                true => {
                    let provided = Provided::new(format!("key-{asked}"), "secret", None, self.end, "counting");
                    future::ProvideCredentials::ready(Ok(provided))
                }
                // it hangs
                false => future::ProvideCredentials::new(std::future::pending()),
            }
        }
    }

    fn counting(end: Option<Duration>, times: u64) -> Credentials {
        let end = end.map(|end| SystemTime::now() + end);
        Credentials::of(Some(SharedCredentialsProvider::new(Counting { asked: Arc::default(), end, times })))
    }

    async fn key(credentials: &Credentials) -> Option<String> {
        let identity = credentials.get(SystemTime::now()).await.ok()?;
        Some(identity.data::<Provided>()?.access_key_id().to_owned())
    }

    #[tokio::test]
    async fn they_are_held_while_they_hold() {
        for end in [None, Some(Duration::from_secs(3600))] {
            let credentials = counting(end, 9);
            assert_eq!([key(&credentials).await, key(&credentials).await].map(Option::unwrap), ["key-0", "key-0"]);
        }
    }

    #[tokio::test]
    async fn those_about_to_end_are_not_used_again() {
        let credentials = counting(Some(Duration::from_secs(50)), 9);
        assert_eq!([key(&credentials).await, key(&credentials).await].map(Option::unwrap), ["key-0", "key-1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn those_about_to_end_are_used_again_where_no_others_are_to_be_had() {
        let credentials = counting(Some(Duration::from_secs(50)), 1);
        assert_eq!([key(&credentials).await, key(&credentials).await].map(Option::unwrap), ["key-0", "key-0"]);
        let after_their_end = SystemTime::now() + Duration::from_secs(51);
        assert!(credentials.get(after_their_end).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_one_that_hangs_waits_no_longer_than_it() {
        let credentials = counting(None, 0);
        let began = tokio::time::Instant::now();
        let waited = tokio::join!(key(&credentials), key(&credentials), key(&credentials));
        assert_eq!((waited, began.elapsed() < 2 * TIMEOUT), ((None, None, None), true));
    }

    #[tokio::test]
    async fn those_that_the_store_refused_are_not_used_again_and_others_are() {
        let credentials = counting(None, 9);
        let first = credentials.get(SystemTime::now()).await.unwrap();
        credentials.refused(&first);
        assert_eq!(key(&credentials).await.unwrap(), "key-1");
        credentials.refused(&first);
        assert_eq!(key(&credentials).await.unwrap(), "key-1");
    }
}
