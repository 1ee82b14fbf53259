//! What clients did to a cluster, and whether one machine could have answered so.
//!
//! Every acknowledged write tells its revision and every read the revision of what it saw, so nothing has to be searched:
//! the order is given, and the history is linearizable exactly when (1) this order agrees with real time, (2) every read
//! saw a value that was written, at the revision of that write, and (3) a write that was conditional on a revision follows
//! it directly. Writes whose outcome is unknown may have happened at any time after their start; a read can tell when.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// One call of a client.
#[derive(Clone, Debug)]
pub struct Op {
    pub key: String,
    pub start: Instant,
    /// When the answer came.
    pub end: Instant,
    pub did: Did,
}

/// What a call did, as far as the client knows.
#[derive(Clone, Debug, PartialEq)]
pub enum Did {
    /// Acknowledged, at this revision, on the condition that the key was at `after`.
    Wrote { value: u64, revision: u64, after: Option<u64> },
    /// Nobody answered, or the answer was that nobody knows.
    MayHaveWritten { value: u64 },
    /// Refused: it must never be seen.
    Refused { value: u64 },
    /// Saw the value of this revision.
    Read { value: u64, revision: u64 },
}

/// All calls of all clients.
#[derive(Clone, Debug, Default)]
pub struct History(pub Vec<Op>);

impl History {
    /// Number of acknowledged writes.
    pub fn acknowledged(&self) -> usize {
        self.0.iter().filter(|op| matches!(op.did, Did::Wrote { .. })).count()
    }

    /// The last acknowledged write of each key.
    pub fn last_written(&self) -> BTreeMap<&str, (u64, u64)> {
        let mut last: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for op in &self.0 {
            if let Did::Wrote { value, revision, .. } = op.did {
                let entry = last.entry(&op.key).or_insert((revision, value));
                *entry = (*entry).max((revision, value));
            }
        }
        last
    }

    /// Says what no single machine could have answered.
    pub fn check(&self) -> Result<(), String> {
        // Revisions are those of the whole store: writes are in order across keys.
        let writes = self.0.iter().filter_map(|op| match op.did {
            Did::Wrote { revision, .. } => {
                Some(Point { start: op.start, end: Some(op.end), revision, write: true, op })
            }
            _ => None,
        });
        in_order(writes.collect())?;
        let mut keys: BTreeMap<&str, Vec<&Op>> = BTreeMap::new();
        for op in &self.0 {
            keys.entry(&op.key).or_default().push(op);
        }
        keys.into_values().try_for_each(|ops| check_key(&ops))
    }
}

/// A call at its place in the order of revisions.
struct Point<'a> {
    start: Instant,
    end: Option<Instant>,
    revision: u64,
    write: bool,
    op: &'a Op,
}

fn check_key(ops: &[&Op]) -> Result<(), String> {
    let mut points = Vec::new();
    let mut written: HashMap<u64, (&Op, Option<u64>)> = HashMap::new();
    for op in ops {
        match op.did {
            Did::Wrote { value, revision, .. } => {
                written.insert(value, (op, Some(revision)));
                points.push(Point { start: op.start, end: Some(op.end), revision, write: true, op });
            }
            Did::MayHaveWritten { value } => {
                written.insert(value, (op, None));
            }
            Did::Refused { .. } | Did::Read { .. } => {}
        }
    }
    for op in ops {
        let Did::Read { value, revision } = op.did else { continue };
        let Some((write, known)) = written.get_mut(&value) else {
            return Err(format!("a value was read that was never written, or refused: {op:?}"));
        };
        if write.start > op.end {
            return Err(format!("a value was read before it was written: {op:?} and {write:?}"));
        }
        match known {
            Some(known) if *known != revision => {
                return Err(format!(
                    "a value was read at another revision than it was written at: {op:?} and {write:?}"
                ));
            }
            Some(_) => {}
            None => {
                *known = Some(revision);
                points.push(Point { start: write.start, end: None, revision, write: true, op: write });
            }
        }
        points.push(Point { start: op.start, end: Some(op.end), revision, write: false, op });
    }
    let mut revisions: Vec<u64> = points.iter().filter(|p| p.write).map(|p| p.revision).collect();
    revisions.sort_unstable();
    if let Some(twice) = revisions.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two writes of one key have revision {}", twice[0]));
    }
    for point in points.iter().filter(|p| p.write) {
        if let Did::Wrote { after: Some(after), revision, .. } = point.op.did
            && let Some(between) = revisions.iter().find(|r| **r > after && **r < revision)
        {
            return Err(format!("revision {between} lies between a write and its condition: {:?}", point.op));
        }
    }
    in_order(points)
}

/// What ended before another began comes before it.
fn in_order(mut points: Vec<Point<'_>>) -> Result<(), String> {
    let mut ended: Vec<(Instant, u64, &Op)> =
        points.iter().filter_map(|p| p.end.map(|end| (end, p.revision, p.op))).collect();
    ended.sort_by_key(|(end, ..)| *end);
    points.sort_by_key(|p| p.start);
    let mut ended = ended.into_iter().peekable();
    let mut newest: Option<(u64, &Op)> = None;
    for point in points {
        while let Some((_, revision, op)) = ended.next_if(|(end, ..)| *end < point.start) {
            if newest.is_none_or(|(r, _)| revision > r) {
                newest = Some((revision, op));
            }
        }
        let Some((revision, op)) = newest else { continue };
        if point.revision < revision || (point.write && point.revision == revision) {
            return Err(format!("{:?} began after this had ended, and is older: {op:?}", point.op));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A history of one key from (start, end, did).
    fn history(calls: &[(u64, u64, Did)]) -> History {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let op = |(start, end, did): &(u64, u64, Did)| Op {
            key: "k".to_owned(),
            start: at(*start),
            end: at(*end),
            did: did.clone(),
        };
        History(calls.iter().map(op).collect())
    }

    fn wrote(value: u64, revision: u64) -> Did {
        Did::Wrote { value, revision, after: None }
    }

    fn read(value: u64, revision: u64) -> Did {
        Did::Read { value, revision }
    }

    #[test]
    fn concurrent_calls_may_come_in_any_order() {
        history(&[(0, 10, wrote(1, 5)), (1, 9, wrote(2, 4)), (2, 20, read(2, 4)), (11, 20, read(1, 5))])
            .check()
            .unwrap();
    }

    #[test]
    fn a_stale_read_is_found() {
        let found = history(&[(0, 1, wrote(1, 4)), (2, 3, wrote(2, 5)), (4, 5, read(1, 4))]).check().unwrap_err();
        assert!(found.contains("is older"), "{found}");
    }

    #[test]
    fn reads_never_go_back() {
        let calls = [(0, 9, wrote(1, 4)), (0, 9, wrote(2, 5)), (1, 2, read(2, 5)), (3, 4, read(1, 4))];
        assert!(history(&calls).check().is_err());
    }

    #[test]
    fn an_unanswered_write_may_be_seen_late_but_not_then_be_gone() {
        let lost = Did::MayHaveWritten { value: 2 };
        let calls = [(0, 1, wrote(1, 4)), (2, 3, lost), (4, 5, read(1, 4)), (6, 7, read(2, 6))];
        history(&calls).check().unwrap();
        let gone = [&calls[..], &[(8, 9, read(1, 4))]].concat();
        assert!(history(&gone).check().is_err());
    }

    #[test]
    fn a_refused_write_is_never_seen() {
        let calls = [(0, 1, wrote(1, 4)), (2, 3, Did::Refused { value: 2 }), (4, 5, read(2, 5))];
        assert!(history(&calls).check().is_err());
    }

    #[test]
    fn a_conditional_write_follows_its_condition() {
        let conditional = |value, revision, after| Did::Wrote { value, revision, after: Some(after) };
        let calls = [(0, 1, wrote(1, 4)), (2, 9, conditional(2, 6, 4)), (2, 9, conditional(3, 5, 4))];
        let found = history(&calls).check().unwrap_err();
        assert!(found.contains("its condition"), "{found}");
    }
}
