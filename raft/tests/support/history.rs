//! A recorded history of reads and writes of single keys, and the check that it is linearizable.
//!
//! Linearizability is local: a history is linearizable if the operations of each key are. Each key is searched for an
//! order of its operations that respects their times and that a register obeys (Wing and Gong's search, with Lowe's
//! memory of configurations that were seen). A write whose outcome is unknown may take effect at any time after its
//! begin, or never.
//!
//! Included by path where it is needed; depends on nothing but the standard library.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What was asked of a key. Values are told apart by numbers; every write should have its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read, and what was found.
    Read(Option<u64>),
    /// Written whatever was there.
    Write(u64),
    /// Written if the first was there; the flag says whether.
    Swap(Option<u64>, u64, bool),
}

/// One operation. Times are ticks of one clock shared by all clients.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub action: Action,
    pub begun: u64,
    /// None when the outcome is unknown.
    pub ended: Option<u64>,
}

/// Where clients record what they do; shared by all.
#[derive(Debug, Default)]
pub struct History {
    clock: AtomicU64,
    operations: Mutex<BTreeMap<String, Vec<Operation>>>,
}

impl History {
    /// A time; later calls return later ones.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// An operation with a known end.
    pub fn done(&self, key: &str, begun: u64, action: Action) {
        let ended = Some(self.now());
        self.push(key, Operation { action, begun, ended });
    }

    /// A write whose outcome is unknown. (A read without an answer, and a write that was refused, need no record.)
    pub fn unknown(&self, key: &str, begun: u64, action: Action) {
        self.push(key, Operation { action, begun, ended: None });
    }

    fn push(&self, key: &str, operation: Operation) {
        let mut operations = self.operations.lock().unwrap();
        operations.entry(key.to_owned()).or_default().push(operation);
    }

    /// How many operations have a known end.
    pub fn len(&self) -> usize {
        let operations = self.operations.lock().unwrap();
        operations.values().flatten().filter(|operation| operation.ended.is_some()).count()
    }

    /// Panics with the operations of a key that is not linearizable.
    pub fn assert_linearizable(&self) {
        for (key, operations) in &*self.operations.lock().unwrap() {
            if !is_linearizable(operations) {
                let mut sorted = operations.clone();
                sorted.sort_by_key(|operation| operation.begun);
                let lines: Vec<String> = sorted.iter().map(|operation| format!("  {operation:?}")).collect();
                panic!("the history of {key} is not linearizable:\n{}", lines.join("\n"));
            }
        }
    }
}

/// Whether one register could have answered so.
pub fn is_linearizable(operations: &[Operation]) -> bool {
    Search::new(operations).run()
}

#[derive(Clone, Copy)]
struct Event {
    operation: usize,
    /// The event that ends the operation, for one that begins it.
    end: Option<usize>,
}

struct Search<'a> {
    operations: &'a [Operation],
    events: Vec<Event>,
    next: Vec<usize>,
    previous: Vec<usize>,
}

/// Before the first event in the list, and after the last.
const EDGE: usize = 0;

impl<'a> Search<'a> {
    fn new(operations: &'a [Operation]) -> Self {
        let mut times = Vec::new();
        for (at, operation) in operations.iter().enumerate() {
            times.push((operation.begun, true, at));
            times.push((operation.ended.unwrap_or(u64::MAX), false, at));
        }
        // A begin goes before an end at the same time: the two overlap.
        times.sort_by_key(|(time, begins, at)| (*time, !begins, *at));
        let mut events = vec![Event { operation: usize::MAX, end: None }];
        let mut begins = HashMap::new();
        for (_, is_begin, operation) in times {
            if is_begin {
                begins.insert(operation, events.len());
            } else if let Some(begin) = begins.get(&operation) {
                let end = Some(events.len());
                events[*begin] = Event { operation, end };
            }
            events.push(Event { operation, end: None });
        }
        let count = events.len();
        let next = (0..count).map(|at| (at + 1) % count).collect();
        let previous = (0..count).map(|at| (at + count - 1) % count).collect();
        Search { operations, events, next, previous }
    }

    fn unlink(&mut self, at: usize) {
        let (before, after) = (self.previous[at], self.next[at]);
        self.next[before] = after;
        self.previous[after] = before;
    }

    fn relink(&mut self, at: usize) {
        let (before, after) = (self.previous[at], self.next[at]);
        self.next[before] = at;
        self.previous[after] = at;
    }

    fn run(mut self) -> bool {
        let mut done = vec![0u64; self.operations.len().div_ceil(64)];
        let mut state: Option<u64> = None;
        let mut seen: HashSet<(Vec<u64>, Option<u64>)> = HashSet::new();
        let mut taken: Vec<(usize, Option<u64>)> = Vec::new();
        let mut at = self.next[EDGE];
        while self.next[EDGE] != EDGE {
            let event = self.events[at];
            let step = event.end.map(|end| (end, step(state, self.operations[event.operation].action)));
            match step {
                Some((end, Some(after))) => {
                    let bit = 1 << (event.operation % 64);
                    done[event.operation / 64] |= bit;
                    if seen.insert((done.clone(), after)) {
                        taken.push((at, state));
                        state = after;
                        self.unlink(at);
                        self.unlink(end);
                        at = self.next[EDGE];
                        continue;
                    }
                    done[event.operation / 64] &= !bit;
                    at = self.next[at];
                }
                Some((_, None)) => at = self.next[at],
                // The end of an operation that is not in the order yet: the last choice was wrong.
                None => {
                    let Some((undo, before)) = taken.pop() else { return false };
                    let event = self.events[undo];
                    done[event.operation / 64] &= !(1 << (event.operation % 64));
                    state = before;
                    if let Some(end) = event.end {
                        self.relink(end);
                    }
                    self.relink(undo);
                    at = self.next[undo];
                }
            }
        }
        true
    }
}

/// The state after an action; None when a register would not have answered so.
fn step(state: Option<u64>, action: Action) -> Option<Option<u64>> {
    match action {
        Action::Read(found) => (found == state).then_some(state),
        Action::Write(value) => Some(Some(value)),
        Action::Swap(expected, value, true) => (expected == state).then_some(Some(value)),
        Action::Swap(expected, _, false) => (expected != state).then_some(state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(begun: u64, ended: u64, action: Action) -> Operation {
        Operation { action, begun, ended: Some(ended) }
    }

    #[test]
    fn what_a_register_would_answer_is_linearizable() {
        use Action::{Read, Swap, Write};
        assert!(is_linearizable(&[]));
        assert!(is_linearizable(&[at(0, 1, Write(1)), at(2, 3, Read(Some(1))), at(4, 5, Swap(Some(1), 2, true))]));
        let overlapping = [at(0, 9, Write(1)), at(1, 2, Read(None)), at(3, 4, Read(Some(1)))];
        assert!(is_linearizable(&overlapping));
        let lost = Operation { action: Write(7), begun: 0, ended: None };
        assert!(is_linearizable(&[lost, at(5, 6, Read(None)), at(7, 8, Read(Some(7)))]), "it took effect late");
        assert!(is_linearizable(&[lost, at(5, 6, Read(None)), at(7, 8, Read(None))]), "it never took effect");
    }

    #[test]
    fn what_no_register_would_answer_is_not() {
        use Action::{Read, Swap, Write};
        let stale = [at(0, 1, Write(1)), at(2, 3, Write(2)), at(4, 5, Read(Some(1)))];
        assert!(!is_linearizable(&stale));
        let lost = [at(0, 1, Write(1)), at(2, 3, Read(None))];
        assert!(!is_linearizable(&lost));
        let backwards = [at(0, 9, Write(1)), at(1, 2, Read(Some(1))), at(3, 4, Read(None))];
        assert!(!is_linearizable(&backwards));
        let twice = [at(0, 1, Write(1)), at(2, 9, Swap(Some(1), 2, true)), at(2, 9, Swap(Some(1), 3, true))];
        assert!(!is_linearizable(&twice));
        let unasked = Operation { action: Write(7), begun: 6, ended: None };
        assert!(!is_linearizable(&[unasked, at(1, 2, Read(Some(7)))]), "before it was asked for");
    }

    #[test]
    fn many_overlapping_operations_are_searched_in_time() {
        let mut operations = Vec::new();
        for n in 0..400u64 {
            operations.push(at(n * 10, n * 10 + 45, Action::Write(n)));
            operations.push(at(n * 10 + 44, n * 10 + 60, Action::Read(Some(n))));
        }
        // Whatever the answer is, it comes.
        let _ = is_linearizable(&operations);
    }
}
