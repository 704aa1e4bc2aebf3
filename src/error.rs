//! What can go wrong with a photo, told apart by what the caller can do about it.
//!
//! Always: every variant says in its text what failed and, where there is one, the remedy. Never: a status code (only the
//! HTTP edge knows those), and never a secret.

/// The result of anything that touches the spool, the queue or the bucket.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, by what can be done about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The world outside is at fault (network, disk, database, credentials): the same call may succeed later, and no
    /// upload is to blame.
    #[error("{0}")]
    Unavailable(String),

    /// There is no room for another photo. Later there may be.
    #[error("{0}")]
    Full(String),

    /// The thing asked for is not there.
    #[error("{0}")]
    Missing(String),

    /// The bytes are not those that were accepted. Trying again cannot help.
    #[error("{0}")]
    Damaged(String),

    /// The other side refuses this very upload. Trying again is unlikely to help.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// An [`Error::Unavailable`] that names what was being done and the cause.
    pub fn unavailable(doing: impl std::fmt::Display, cause: impl std::fmt::Display) -> Self {
        Error::Unavailable(format!("{doing}: {cause}"))
    }
}

/// The causes of an error, outermost first, joined by `: `. Libraries tend to hide the useful half in `source()`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
