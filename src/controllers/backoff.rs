//! The one jittered, bounded backoff of the control loops.

use std::time::Duration;

use rand::Rng;

/// Doubles from `base` up to `cap`; every delay is shortened by up to a half at random, so that loops that failed
/// together do not come back together.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// A backoff that has seen no failure yet.
    pub const fn new(base: Duration, cap: Duration) -> Backoff {
        Backoff { base, cap, failures: 0 }
    }

    /// The delay before the next attempt; counts one more failure.
    pub fn fail(&mut self) -> Duration {
        let delay = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        delay.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// Something succeeded: the next failure starts at the base again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    fn ceiling(&self) -> Duration {
        let factor = 1u32 << self.failures.min(20);
        self.base.checked_mul(factor).map_or(self.cap, |delay| delay.min(self.cap))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_stay_below_the_cap_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(100));
        for ceiling in [10, 20, 40, 80, 100, 100] {
            let delay = backoff.fail();
            assert!(
                delay <= Duration::from_millis(ceiling) && delay >= Duration::from_millis(ceiling / 2),
                "{delay:?}"
            );
        }
        backoff.reset();
        assert!(backoff.fail() <= Duration::from_millis(10));
    }
}
