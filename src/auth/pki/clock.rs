//! A machine without a battery boots in 1970. Certificates made or checked with such a clock are worthless, so the server
//! waits, says why, and goes on by itself once the clock is right.

use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// No clock is right before this: 2025-12-17, the day Kubernetes 1.35 was released (seconds since the epoch).
const RELEASE: u64 = 1_765_929_600;
/// How often the clock is looked at while it is wrong.
const POLL: Duration = Duration::from_millis(500);

/// The earliest plausible time: our release, or the birth of the cluster's authorities.
pub fn earliest(authority_not_before: Option<SystemTime>) -> SystemTime {
    let release = SystemTime::UNIX_EPOCH + Duration::from_secs(RELEASE);
    authority_not_before.map_or(release, |born| born.max(release))
}

/// No clock of this version's time is right after this: twenty years after the release.
pub fn latest() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(RELEASE + 20 * 365 * 24 * 60 * 60)
}

/// The latest time at which this instance is known to have run, by what it wrote, but never later than `latest`: a clock that was
/// ahead leaves traces too. Certificates that were good then are no riddle to a machine whose clock starts in 1970.
pub fn last_run(data_dir: &std::path::Path, latest: SystemTime) -> SystemTime {
    let mut newest = SystemTime::UNIX_EPOCH;
    for dir in ["server", "server/db", "server/db/wal", "server/tls"] {
        for entry in std::fs::read_dir(data_dir.join(dir)).into_iter().flatten().flatten() {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            newest = newest.max(modified.unwrap_or(SystemTime::UNIX_EPOCH));
        }
    }
    newest.min(latest)
}

/// Why `now` cannot be right, for `/readyz` and the log.
pub fn problem(now: SystemTime, earliest: SystemTime) -> Option<String> {
    (now < earliest).then(|| {
        let text = |time: SystemTime| jiff::Timestamp::try_from(time).map(|t| t.to_string()).unwrap_or_default();
        format!("the system clock is wrong: it says {}, but it is later than {}", text(now), text(earliest))
    })
}

/// Returns once the clock is plausible; while it is not, `state` holds the reason.
pub async fn wait_until_plausible(earliest: SystemTime, state: &watch::Sender<Option<String>>) {
    let mut announced = false;
    while let Some(reason) = problem(SystemTime::now(), earliest) {
        if !announced {
            tracing::warn!(reason, "waiting for the system clock to be set");
            announced = true;
        }
        state.send_replace(Some(reason));
        tokio::time::sleep(POLL).await;
    }
    state.send_replace(None);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_before_the_release_or_the_authorities_is_wrong() {
        let now = SystemTime::now();
        assert_eq!(problem(now, earliest(None)), None);
        assert!(problem(SystemTime::UNIX_EPOCH, earliest(None)).is_some());
        assert!(problem(now, earliest(Some(now + Duration::from_secs(60)))).unwrap().contains("clock is wrong"));
    }

    #[tokio::test]
    async fn the_reason_is_told_until_the_clock_is_right() {
        let (state, mut told) = watch::channel(None);
        let soon = SystemTime::now() + Duration::from_millis(300);
        let wait = tokio::spawn(async move { wait_until_plausible(soon, &state).await });
        let reason = told.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert!(reason.starts_with("the system clock is wrong: it says "), "{reason}");
        // Either the reason is taken back, or the wait is over and with it the sender.
        let _ = told.wait_for(Option::is_none).await;
        wait.await.unwrap();
        assert!(SystemTime::now() >= soon);
        assert_eq!(*told.borrow(), None);
    }

    #[test]
    fn what_an_instance_wrote_says_when_it_ran_last_but_never_in_the_far_future() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_run(dir.path(), latest()), SystemTime::UNIX_EPOCH);
        std::fs::create_dir_all(dir.path().join("server/db/wal")).unwrap();
        let written = |name: &str, at: SystemTime| {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            file.set_modified(at).unwrap();
        };
        // Folders are made now; what lies in them may be younger.
        let later = SystemTime::now() + Duration::from_secs(86_400);
        written("server/db/wal/1", later);
        assert_eq!(last_run(dir.path(), latest()), later);
        written("server/token", latest() + Duration::from_secs(1));
        assert_eq!(last_run(dir.path(), latest()), latest());
    }
}
