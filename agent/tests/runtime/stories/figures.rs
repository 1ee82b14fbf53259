//! What it costs; printed, with bounds wide enough for a busy machine.

use std::time::Instant;

use coracle_agent::runtime::*;

use crate::harness::Node;

pub async fn what_a_pod_costs() {
    let node = Node::new().await;
    let (mut sandboxes, mut creates, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    let mut pss = 0;
    for _ in 0..10 {
        let begin = Instant::now();
        let sandbox = node.runtime.run_pod_sandbox(&node.pod()).await.unwrap();
        sandboxes.push(begin.elapsed().as_micros());
        let begin = Instant::now();
        let id = node.runtime.create_container(&sandbox, &node.script("sleep 1000")).await.unwrap();
        creates.push(begin.elapsed().as_micros());
        let begin = Instant::now();
        node.runtime.start_container(&id).await.unwrap();
        starts.push(begin.elapsed().as_micros());
        let pid = node.runtime.container_status(&id).await.unwrap().pid.unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let parent: i32 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!(std::fs::read_to_string(format!("/proc/{parent}/comm")).unwrap(), "coracle-shim\n");
        let maps = std::fs::read_to_string(format!("/proc/{parent}/smaps_rollup")).unwrap();
        pss = maps
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    }
    let median = |list: &mut Vec<u128>| {
        list.sort_unstable();
        list[list.len() / 2] as f64 / 1000.0
    };
    println!(
        "  sandbox {:.1} ms, create {:.1} ms, start {:.1} ms, one shim alone {pss} kB PSS",
        median(&mut sandboxes),
        median(&mut creates),
        median(&mut starts)
    );
    let pss: u64 = pss;
    assert!(pss <= 1024, "{pss} kB");
}
