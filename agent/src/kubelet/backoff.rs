//! Two kinds of waiting: jittered retries of our own work, and the restart delays that users see.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

/// Delays between retries: doubling, bounded, spread by up to a half.
#[derive(Debug, Clone)]
pub struct Jitter {
    first: Duration,
    limit: Duration,
    current: Duration,
}

impl Jitter {
    /// Starts at `first`, never exceeds `limit` by more than the spread.
    pub fn new(first: Duration, limit: Duration) -> Self {
        Self { first, limit, current: first }
    }

    /// The next delay.
    pub fn delay(&mut self) -> Duration {
        let delay = self.current;
        self.current = (self.current * 2).min(self.limit);
        delay.mul_f64(rand::random_range(0.75..1.25))
    }

    /// Success: start over.
    pub fn reset(&mut self) {
        self.current = self.first;
    }
}

/// First restart delay.
pub const RESTART_FIRST: Duration = Duration::from_secs(10);
/// Longest restart delay.
pub const RESTART_LIMIT: Duration = Duration::from_secs(300);

#[derive(Debug, Clone)]
struct Entry {
    delay: Duration,
    updated: SystemTime,
}

/// Restart delays by container or image: the first restart is immediate, then 10 s doubling to 5 min; a container that
/// ran for twice the limit starts over.
#[derive(Debug, Clone, Default)]
pub struct Backoffs {
    entries: HashMap<String, Entry>,
}

impl Backoffs {
    /// The delay under which `key` still is, counted from the failure at `since`; `None` when it may go on.
    pub fn waiting(&self, key: &str, since: SystemTime, now: SystemTime) -> Option<Waiting> {
        let entry = self.entries.get(key)?;
        if expired(since, entry.updated) {
            return None;
        }
        let passed = now.duration_since(since).unwrap_or_default();
        let left = entry.delay.checked_sub(passed).filter(|left| !left.is_zero())?;
        Some(Waiting { delay: entry.delay, left })
    }

    /// Notes a restart after the failure at `since`: the next one waits longer.
    pub fn escalate(&mut self, key: &str, since: SystemTime, now: SystemTime) {
        let delay = match self.entries.get(key) {
            Some(entry) if !expired(since, entry.updated) => (entry.delay * 2).min(RESTART_LIMIT),
            _ => RESTART_FIRST,
        };
        self.entries.insert(key.to_owned(), Entry { delay, updated: now });
    }

    /// Forgets a key: it succeeded.
    pub fn forget(&mut self, key: &str) {
        self.entries.remove(key);
    }
}

/// What [`Backoffs::waiting`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The whole delay, as shown to users.
    pub delay: Duration,
    /// What is left of it.
    pub left: Duration,
}

fn expired(since: SystemTime, updated: SystemTime) -> bool {
    since.duration_since(updated).is_ok_and(|passed| passed > RESTART_LIMIT * 2)
}

/// A duration as Go prints it: `10s`, `1m20s`, `5m0s`.
pub fn go_duration(duration: Duration) -> String {
    let total = duration.as_secs();
    let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    #[test]
    fn the_first_restart_is_immediate_and_the_next_wait_longer_each_time() {
        let mut backoffs = Backoffs::default();
        assert_eq!(backoffs.waiting("c", at(0), at(0)), None);
        backoffs.escalate("c", at(0), at(0));
        assert_eq!(backoffs.waiting("c", at(1), at(4)).unwrap().left, Duration::from_secs(7));
        assert_eq!(backoffs.waiting("c", at(1), at(11)), None);
        backoffs.escalate("c", at(1), at(11));
        assert_eq!(backoffs.waiting("c", at(12), at(12)).unwrap().delay, Duration::from_secs(20));
        for _ in 0..9 {
            backoffs.escalate("c", at(12), at(12));
        }
        assert_eq!(go_duration(backoffs.waiting("c", at(12), at(12)).unwrap().delay), "5m0s");
    }

    #[test]
    fn a_container_that_ran_long_starts_over() {
        let mut backoffs = Backoffs::default();
        backoffs.escalate("c", at(0), at(0));
        backoffs.escalate("c", at(0), at(0));
        assert_eq!(backoffs.waiting("c", at(601), at(601)), None);
        backoffs.escalate("c", at(601), at(601));
        assert_eq!(backoffs.waiting("c", at(602), at(602)).unwrap().delay, RESTART_FIRST);
    }
}
