//! The steps by which the schema came to be, in order: the files in `migrations/`, compiled in.
//!
//! Always: the same steps by the same names for both databases. Never: a step that was released and is changed later; the
//! databases remember what they were made of.

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migration, MigrationType, Migrator};

macro_rules! steps {
    ($folder:literal) => {
        steps!($folder: 1 "uploads", 2 "order", 3 "sheds", 4 "control")
    };
    ($folder:literal: $($version:literal $name:literal),*) => {
        Migrator::with_migrations(vec![$({
            let statements = include_str!(concat!("../../migrations/", $folder, "/000", $version, "_", $name, ".sql"));
            Migration::new($version, $name.into(), MigrationType::Simple, statements.into_sql_str(), false)
        }),*])
    };
}

pub(super) fn postgres() -> Migrator {
    steps!("postgres")
}

pub(super) fn sqlite() -> Migrator {
    steps!("sqlite")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[tokio::test]
    async fn every_file_is_a_step() {
        for (folder, compiled_in) in [("postgres", postgres()), ("sqlite", sqlite())] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(folder);
            let found = Migrator::new(folder).await.unwrap();
            let steps = |from: &Migrator| from.iter().map(|m| (m.version, m.checksum.to_vec())).collect::<Vec<_>>();
            assert_eq!(steps(&compiled_in), steps(&found));
        }
    }
}
