//! What the shedding asks of both databases: what may be shed, what was, and whom it struck.
//!
//! Always: only what is queued is shed, and its record stays as the tombstone. Never: an upload that is on its way shed.

/// Gives `$backend` the statements. `$by_age` and `$by_line` name the indexes for a database that would not take them by itself.
macro_rules! sheds {
    ($backend:ident, now = $now:literal, by_age = $by_age:literal, by_line = $by_line:literal) => {
        impl $backend {
            /// Ids and bytes of up to `limit` queued uploads of a class, oldest first.
            pub(super) async fn oldest_of(&self, priority: i16, limit: u32) -> sqlx::Result<Vec<(Uuid, i64)>> {
                sqlx::query_as(concat!(
                    "SELECT id, size_bytes FROM uploads ",
                    $by_age,
                    " WHERE state = 'queued' AND priority = $1 ORDER BY received_at_ms, id LIMIT $2"
                ))
                .bind(priority)
                .bind(i64::from(limit))
                .fetch_all(&self.read)
                .await
            }

            /// The lines of a class, longest first: device, uploads, bytes.
            pub(super) async fn longest_lines(&self, priority: i16) -> sqlx::Result<Vec<(String, i64, i64)>> {
                sqlx::query_as(
                    "SELECT device_id, queued, queued_bytes FROM lines WHERE waits AND priority = $1
                     ORDER BY queued DESC, device_id",
                )
                .bind(priority)
                .fetch_all(&self.read)
                .await
            }

            /// Up to `limit` uploads of a line with their moments and bytes, oldest first.
            pub(super) async fn line(
                &self,
                priority: i16,
                device_id: &str,
                limit: u32,
            ) -> sqlx::Result<Vec<(Uuid, i64, i64)>> {
                sqlx::query_as(concat!(
                    "SELECT id, received_at_ms, size_bytes FROM uploads ",
                    $by_line,
                    " WHERE state = 'queued' AND device_id = $1 AND priority = $2 ORDER BY received_at_ms, id LIMIT $3"
                ))
                .bind(device_id)
                .bind(priority)
                .bind(i64::from(limit))
                .fetch_all(&self.read)
                .await
            }

            pub(super) async fn removable_shed(&self, limit: u32) -> sqlx::Result<Vec<Row>> {
                sqlx::query_as(concat!(
                    "SELECT ",
                    columns!(),
                    " FROM uploads WHERE state = 'shed' AND removed_at_ms IS NULL ORDER BY received_at_ms LIMIT +$1"
                ))
                .bind(i64::from(limit))
                .fetch_all(&self.read)
                .await
            }

            pub(super) async fn shed_on_disk_bytes(&self) -> sqlx::Result<i64> {
                sqlx::query_scalar(
                    "SELECT CAST(coalesce(sum(size_bytes), 0) AS bigint) FROM uploads
                     WHERE state = 'shed' AND removed_at_ms IS NULL",
                )
                .fetch_one(&self.read)
                .await
            }

            pub(super) async fn purge_shed(&self, retain: Duration, limit: u32) -> sqlx::Result<u64> {
                sqlx::query(concat!(
                    "DELETE FROM uploads WHERE id IN (
                         SELECT id FROM uploads
                         WHERE state = 'shed' AND received_at_ms <= ",
                    $now,
                    " - $1 AND removed_at_ms <= ",
                    $now,
                    " - $1 ORDER BY received_at_ms LIMIT $2
                     )"
                ))
                .bind(retain.as_millis() as i64)
                .bind(i64::from(limit))
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected())
            }

            pub(super) async fn sheds(&self, limit: u32) -> sqlx::Result<(i64, Vec<(String, i64, i64, i64, i64)>)> {
                let devices = sqlx::query_scalar("SELECT count(*) FROM sheds").fetch_one(&self.read).await?;
                let most = sqlx::query_as(
                    "SELECT device_id, uploads, bytes, first_ms, last_ms FROM sheds
                     ORDER BY uploads DESC, device_id LIMIT $1",
                )
                .bind(i64::from(limit))
                .fetch_all(&self.read)
                .await?;
                Ok((devices, most))
            }
        }
    };
}
pub(super) use sheds;
