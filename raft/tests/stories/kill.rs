//! kill -9 at any moment.

use std::time::Duration;

use crate::writer::{CLIENTS, Writer};

const ROUNDS: u32 = 100;

#[test]
fn a_hundred_kills_under_load_lose_no_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = [0; CLIENTS];
    let (mut writes, mut checked) = (0, 0);
    for round in 0..=ROUNDS {
        let writer = Writer::start(dir.path(), "the only one");
        // Every fifth is killed while it starts, or little later.
        if round % 5 != 4 {
            writer.wait_until_ready();
        }
        std::thread::sleep(Duration::from_millis(rand::random_range(5..100)));
        let report = writer.kill();
        writes += report.count;
        let Some(found) = report.found else { continue };
        checked += 1;
        for client in 0..CLIENTS {
            assert!(
                found[client] >= acknowledged[client],
                "round {round}, client {client}: {} writes were acknowledged, {} are there",
                acknowledged[client],
                found[client],
            );
            acknowledged[client] = found[client].max(report.acknowledged[client]);
        }
    }
    println!("{ROUNDS} kills, {checked} starts checked, {writes} writes acknowledged, none lost");
    assert!(writes > 500, "the story did not happen: {checked} starts, {writes} writes");
}
