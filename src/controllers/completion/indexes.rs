//! Sets of completion indexes.

use std::collections::BTreeSet;

/// A set of indexes, as in `0,2-4`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexes(pub(super) BTreeSet<i32>);

impl Indexes {
    /// Reads the text; what is no index below `limit` is left out.
    pub fn parse(text: &str, limit: i32) -> Indexes {
        let ranges = text.split(',').filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<i32>().ok()?..=last.trim().parse::<i32>().ok()?.min(limit - 1))
        });
        Indexes(ranges.flatten().filter(|index| *index >= 0).collect())
    }

    pub(super) fn has(&self, index: i32) -> bool {
        self.0.contains(&index)
    }

    pub(super) fn len(&self) -> i32 {
        i32::try_from(self.0.len()).unwrap_or(i32::MAX)
    }
}

impl std::fmt::Display for Indexes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = all.next() {
            let mut last = first;
            while all.peek() == Some(&(last + 1)) {
                last += 1;
                all.next();
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                1 => write!(f, "{separator}{first},{last}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}
