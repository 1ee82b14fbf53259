//! Power cuts: a file system on a loop device, of which a copy is taken while it is written to. The copy holds what had
//! reached the device, and nothing that was only in the page cache of the file system. It is mounted, its journal
//! replays, and the next round goes on with it.
//!
//! The copy must be of one moment. The writer is stopped (SIGSTOP) while it is made, in the middle of whatever it did:
//! nothing then waits for a sync, and the kernel writes little by itself in these milliseconds.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::disk::{self, Mounted};
use crate::writer::{CLIENTS, Writer};

const ROUNDS: u32 = 20;
const IMAGE_MIB: u64 = 96;

#[test]
fn twenty_power_cuts_lose_no_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let image = |round: u32| dir.path().join(format!("{round}.img"));
    disk::make(&image(0), IMAGE_MIB);
    let mut acknowledged = [0; CLIENTS];
    let (mut writes, mut checked) = (0, 0);
    for round in 0..=ROUNDS {
        let mounted = Mounted::new(&image(round), &dir.path().join("mnt"));
        // Every start is a start after a reboot.
        let writer = Writer::start(&mounted.at.join("data"), &format!("boot {round}"));
        if round % 5 != 4 {
            writer.wait_until_ready();
        }
        std::thread::sleep(Duration::from_millis(rand::random_range(50..500)));
        kill(writer.pid(), Signal::SIGSTOP).unwrap();
        disk::run(Command::new("cp").arg("--sparse=always").arg(image(round)).arg(image(round + 1)));
        let report = writer.kill();
        drop(mounted);
        std::fs::remove_file(image(round)).unwrap();
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
    println!("{ROUNDS} power cuts, {checked} starts checked, {writes} writes acknowledged, none lost");
    assert!(writes > 500, "the story did not happen: {checked} starts, {writes} writes");
}
