//! How fast nodes that do not answer lose their pods. Many at once in one zone look like a fault of the network rather than
//! of the nodes, so evictions slow down or stop (upstream's rules and figures).

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::selector::Labels;

/// Share of silent nodes from which a zone counts as disrupted, in percent.
const DISRUPTED_PERCENT: usize = 55;
/// Silent nodes below which a zone is never partially disrupted.
const DISRUPTED_MIN: usize = 3;
/// Size from which a disrupted zone still evicts, slowly.
const LARGE: usize = 51;
/// Time between two nodes of one zone.
const NORMAL_PACE: Duration = Duration::from_secs(10);
const SLOW_PACE: Duration = Duration::from_secs(100);

/// A failure domain: region and zone of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Zone(String);

impl Zone {
    /// The zone that a node's labels name; all without labels are in one.
    pub fn of(labels: &Labels) -> Zone {
        let get = |key: &str| labels.get(&format!("topology.kubernetes.io/{key}")).unwrap_or_default();
        Zone(format!("{}:{}", get("region"), get("zone")))
    }
}

/// The nodes of a zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// That are ready.
    pub ready: usize,
    /// That are not.
    pub silent: usize,
}

/// How fast the nodes of a zone may be evicted; none: not at all.
fn pace(count: Count) -> Option<Duration> {
    let all = count.ready + count.silent;
    let partly = count.ready > 0 && count.silent >= DISRUPTED_MIN && count.silent * 100 >= all * DISRUPTED_PERCENT;
    match partly {
        false => Some(NORMAL_PACE),
        true if all >= LARGE => Some(SLOW_PACE),
        true => None,
    }
}

/// Gives nodes their turn.
#[derive(Debug, Default)]
pub struct Turns {
    next: HashMap<Zone, Instant>,
    halted: bool,
}

impl Turns {
    /// Takes in the state of all zones. When no node anywhere is ready, the fault is more likely ours than theirs: nothing
    /// is evicted. True when that has just ended.
    pub fn observe(&mut self, zones: &HashMap<Zone, Count>) -> bool {
        let halted = zones.values().any(|count| count.silent > 0) && zones.values().all(|count| count.ready == 0);
        self.next.retain(|zone, _| zones.contains_key(zone));
        std::mem::replace(&mut self.halted, halted) && !halted
    }

    /// Whether nothing is evicted at all.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    /// Whether a node of the zone may lose its pods now; its turn is taken then.
    pub fn take(&mut self, zone: &Zone, count: Count, now: Instant) -> bool {
        let Some(pace) = pace(count).filter(|_| !self.halted) else { return false };
        if self.next.get(zone).is_some_and(|next| *next > now) {
            return false;
        }
        self.next.insert(zone.clone(), now + pace);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_a_zone_take_turns_and_a_disrupted_zone_stops() {
        let (mut turns, zone, now) = (Turns::default(), Zone::default(), Instant::now());
        let count = |ready, silent| Count { ready, silent };
        assert!(turns.take(&zone, count(5, 1), now));
        assert!(!turns.take(&zone, count(5, 2), now + NORMAL_PACE / 2));
        assert!(turns.take(&Zone("other".to_owned()), count(5, 2), now));
        assert!(turns.take(&zone, count(5, 2), now + NORMAL_PACE));
        let later = now + 10 * SLOW_PACE;
        assert!(!turns.take(&zone, count(2, 3), later));
        assert!(turns.take(&zone, count(1, 2), later), "two silent nodes are no disruption");
        assert!(turns.take(&zone, count(20, 40), later + NORMAL_PACE));
        assert!(!turns.take(&zone, count(20, 40), later + NORMAL_PACE * 2), "a large zone goes on slowly");
    }

    #[test]
    fn when_nobody_is_ready_nobody_is_evicted_and_its_end_is_noticed() {
        let mut turns = Turns::default();
        let zones = |ready| HashMap::from([(Zone::default(), Count { ready, silent: 2 })]);
        assert!(!turns.observe(&zones(0)) && turns.is_halted());
        assert!(!turns.take(&Zone::default(), Count { ready: 0, silent: 2 }, Instant::now()));
        assert!(turns.observe(&zones(1)) && !turns.is_halted());
        assert!(!turns.observe(&zones(1)));
        // A zone of which nothing is left evicts at the usual pace while others are alive.
        assert!(turns.take(&Zone::default(), Count { ready: 0, silent: 2 }, Instant::now()));
    }
}
