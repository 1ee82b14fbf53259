//! A work queue of keys: each key waits at most once and is never worked on twice at the same time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::backoff::Backoff;
use super::object::Key;

const RETRY_BASE: Duration = Duration::from_millis(5);
const RETRY_CAP: Duration = Duration::from_secs(60);

/// The queue of one loop. Anyone adds; one runner takes.
#[derive(Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    ready: VecDeque<Key>,
    /// Asked for and not yet taken.
    dirty: HashSet<Key>,
    running: HashSet<Key>,
    delayed: BinaryHeap<Reverse<(Instant, Key)>>,
    /// When each delayed key is due; heap entries that disagree are stale.
    due: HashMap<Key, Instant>,
    failures: HashMap<Key, Backoff>,
}

impl Inner {
    fn add(&mut self, key: Key) {
        if self.dirty.insert(key.clone()) && !self.running.contains(&key) {
            self.ready.push_back(key);
        }
    }

    fn promote(&mut self, now: Instant) -> Option<Instant> {
        while let Some(Reverse((due, key))) = self.delayed.peek() {
            if *due > now {
                return Some(*due);
            }
            let (due, key) = (*due, key.clone());
            self.delayed.pop();
            if self.due.get(&key) == Some(&due) {
                self.due.remove(&key);
                self.add(key);
            }
        }
        None
    }
}

impl Queue {
    /// Asks for the key to be worked on.
    pub fn add(&self, key: Key) {
        self.inner.lock().add(key);
        self.changed.notify_one();
    }

    /// Asks for the key after a delay; the earliest wish wins.
    pub fn add_after(&self, key: Key, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let due = Instant::now() + delay;
        let mut inner = self.inner.lock();
        if inner.due.get(&key).is_some_and(|planned| *planned <= due) {
            return;
        }
        inner.due.insert(key.clone(), due);
        inner.delayed.push(Reverse((due, key)));
        drop(inner);
        self.changed.notify_one();
    }

    /// Asks for the key again after its own growing backoff.
    pub fn retry(&self, key: Key) {
        let delay =
            self.inner.lock().failures.entry(key.clone()).or_insert_with(|| Backoff::new(RETRY_BASE, RETRY_CAP)).fail();
        self.add_after(key, delay);
    }

    /// The key went well: its next failure starts with a short backoff.
    pub fn succeeded(&self, key: &Key) {
        self.inner.lock().failures.remove(key);
    }

    /// The next key to work on. Whoever takes it calls [`Queue::done`] afterwards.
    pub async fn next(&self) -> Key {
        loop {
            let next_due = {
                let mut inner = self.inner.lock();
                let next_due = inner.promote(Instant::now());
                if let Some(key) = inner.ready.pop_front() {
                    inner.dirty.remove(&key);
                    inner.running.insert(key.clone());
                    return key;
                }
                next_due
            };
            match next_due {
                Some(due) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(due) => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    /// Whoever took keys died: they are to be worked on again.
    pub fn recover(&self) {
        let mut inner = self.inner.lock();
        let lost: Vec<Key> = inner.running.drain().collect();
        for key in lost {
            if inner.dirty.insert(key.clone()) || !inner.ready.contains(&key) {
                inner.ready.push_back(key);
            }
        }
    }

    /// Work on the key has ended; if it was asked for meanwhile it is ready again.
    pub fn done(&self, key: &Key) {
        let mut inner = self.inner.lock();
        inner.running.remove(key);
        if inner.dirty.contains(key) {
            inner.ready.push_back(key.clone());
            drop(inner);
            self.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("", name)
    }

    async fn taken(queue: &Queue) -> Option<Key> {
        tokio::time::timeout(Duration::from_millis(20), queue.next()).await.ok()
    }

    #[tokio::test]
    async fn a_key_waits_once_and_never_runs_twice_at_once() {
        let queue = Queue::default();
        queue.add(key("a"));
        queue.add(key("a"));
        assert_eq!(taken(&queue).await, Some(key("a")));
        queue.add(key("a"));
        assert_eq!(taken(&queue).await, None);
        queue.done(&key("a"));
        assert_eq!(taken(&queue).await, Some(key("a")));
        queue.done(&key("a"));
        assert_eq!(taken(&queue).await, None);
    }

    #[tokio::test]
    async fn of_two_delayed_wishes_the_earlier_one_counts_and_the_later_is_dropped() {
        let queue = Queue::default();
        let start = Instant::now();
        for delay in [900, 30, 60] {
            queue.add_after(key("a"), Duration::from_millis(delay));
        }
        assert_eq!(queue.next().await, key("a"));
        let waited = (Instant::now() - start).as_millis();
        assert!((30..900).contains(&waited), "{waited}");
        queue.done(&key("a"));
        assert!(queue.inner.lock().due.is_empty());
        assert_eq!(tokio::time::timeout(Duration::from_millis(100), queue.next()).await.ok(), None);
    }

    #[tokio::test]
    async fn retries_come_later_and_later_until_a_success() {
        let queue = Queue::default();
        let mut waits = Vec::new();
        for round in 0..7 {
            if round == 6 {
                queue.succeeded(&key("a"));
            }
            let start = Instant::now();
            queue.retry(key("a"));
            waits.push(queue.inner.lock().due[&key("a")] - start);
            queue.next().await;
            queue.done(&key("a"));
        }
        assert!(waits[5] > Duration::from_millis(75), "{waits:?}");
        assert!(waits[6] <= Duration::from_millis(10), "{waits:?}");
    }
}
