//! A panic in a thread of the network costs a pause, not the thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// First and longest pause after a panic.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Runs `work` until it returns. After a panic, and a pause that grows with their number, `recover` makes the state fit
/// for another run: it must not trust anything that was being changed.
pub fn contain<S>(thread: &'static str, mut state: S, work: impl Fn(&mut S), recover: impl Fn(&mut S)) {
    let mut pause = PAUSE.0;
    while let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(&mut state))) {
        tracing::error!(thread, panic = text(panic.as_ref()), "a thread of the network has panicked and starts again");
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE.1);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| recover(&mut state))) {
            tracing::error!(thread, panic = text(panic.as_ref()), "a thread of the network cannot recover");
        }
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_on_after_a_panic_with_a_state_that_was_made_fit() {
        let seen = std::sync::Mutex::new(Vec::new());
        contain(
            "test",
            0,
            |state| {
                seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(*state);
                assert!(*state != 0, "once");
            },
            |state| *state += 1,
        );
        assert_eq!(*seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner), [0, 1]);
    }
}
