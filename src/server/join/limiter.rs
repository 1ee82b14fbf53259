//! How often one address may show a wrong token: guessing is hopeless anyway, this keeps it cheap for us.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// So many wrong tokens from one address within [`WINDOW`]; then it has to wait.
const FAILURES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses remembered at once.
const ADDRESSES: usize = 4096;

/// Wrong tokens by address.
#[derive(Debug, Default)]
pub struct Limiter {
    failures: Mutex<HashMap<IpAddr, (u32, Instant)>>,
}

impl Limiter {
    /// Seconds that this address has to wait; none when it may ask.
    pub fn wait(&self, address: IpAddr, now: Instant) -> Option<u64> {
        let failures = self.failures.lock();
        let (count, since) = failures.get(&address)?;
        let left = WINDOW.checked_sub(now.saturating_duration_since(*since)).filter(|left| !left.is_zero())?;
        (*count >= FAILURES).then(|| left.as_secs() + 1)
    }

    /// The address showed a wrong token.
    pub fn failed(&self, address: IpAddr, now: Instant) {
        let mut failures = self.failures.lock();
        if failures.len() >= ADDRESSES {
            failures.retain(|_, (_, since)| now.saturating_duration_since(*since) < WINDOW);
        }
        if failures.len() >= ADDRESSES {
            failures.clear();
        }
        let entry = failures.entry(address).or_insert((0, now));
        if now.saturating_duration_since(entry.1) >= WINDOW {
            *entry = (0, now);
        }
        entry.0 = entry.0.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_wrong_tokens_bring_a_pause_that_ends() {
        let limiter = Limiter::default();
        let (bad, good) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let begin = Instant::now();
        for _ in 0..FAILURES {
            assert_eq!(limiter.wait(bad, begin), None);
            limiter.failed(bad, begin);
        }
        assert!(limiter.wait(bad, begin).is_some());
        assert_eq!(limiter.wait(good, begin), None);
        assert_eq!(limiter.wait(bad, begin + WINDOW), None);
        limiter.failed(bad, begin + WINDOW);
        assert_eq!(limiter.wait(bad, begin + WINDOW), None, "a new window");
    }
}
