//! `/stats/summary` and the kubelet's metrics, read from cgroups when asked.

use std::fmt::Write;
use std::time::SystemTime;

use http::{Response, StatusCode};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::{Body, Refusal, answer};
use crate::kubelet::context::Context;
use crate::kubelet::labels;
use crate::kubelet::worker::Board;
use crate::runtime::{CgroupStats, ContainerStats, PodSandboxFilter, PodSandboxStats};

const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

fn rfc3339(at: SystemTime) -> String {
    let at = Timestamp::try_from(at).unwrap_or(Timestamp::UNIX_EPOCH);
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

async fn pods(context: &Context) -> Result<Vec<PodSandboxStats>, Refusal> {
    let stats = context.runtime.list_pod_sandbox_stats(&PodSandboxFilter::default()).await;
    stats.map_err(|error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

fn cpu(usage: &CgroupStats) -> Value {
    json!({"time": rfc3339(usage.at), "usageCoreNanoSeconds": u64::try_from(usage.cpu.as_nanos()).unwrap_or(u64::MAX)})
}

fn memory(usage: &CgroupStats) -> Value {
    let mut memory = json!({
        "time": rfc3339(usage.at),
        "usageBytes": usage.memory_usage_bytes,
        "workingSetBytes": usage.memory_working_set_bytes,
        "rssBytes": usage.memory_rss_bytes,
        "pageFaults": usage.page_faults,
        "majorPageFaults": usage.major_page_faults,
    });
    if let Some(limit) = usage.memory_limit_bytes {
        memory["availableBytes"] = json!(limit.saturating_sub(usage.memory_working_set_bytes));
    }
    memory
}

fn container(stats: &ContainerStats) -> Value {
    let time = rfc3339(stats.usage.at);
    json!({
        "name": stats.metadata.name,
        "startTime": time,
        "cpu": cpu(&stats.usage),
        "memory": memory(&stats.usage),
        "rootfs": {"time": time, "usedBytes": stats.writable_layer.used_bytes, "inodesUsed": stats.writable_layer.inodes_used},
        "logs": {"time": time, "usedBytes": stats.logs.used_bytes, "inodesUsed": stats.logs.inodes_used},
    })
}

/// `/stats/summary`.
///
/// # Errors
/// When the runtime does not answer.
pub async fn summary(context: &Context, board: &Board) -> Result<Response<Body>, Refusal> {
    let pods: Vec<Value> = pods(context)
        .await?
        .iter()
        .map(|pod| {
            let start = board.read().get(&pod.metadata.uid).and_then(|found| found.status.start_time.clone());
            let interfaces: Vec<Value> = pod
                .network
                .iter()
                .map(|link| {
                    json!({"name": link.name, "rxBytes": link.rx_bytes, "rxErrors": link.rx_errors, "txBytes": link.tx_bytes, "txErrors": link.tx_errors})
                })
                .collect();
            let mut network = interfaces.first().cloned().unwrap_or_else(|| json!({}));
            network["time"] = json!(rfc3339(pod.usage.at));
            network["interfaces"] = json!(interfaces);
            json!({
                "podRef": {"name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": pod.metadata.uid},
                "startTime": start,
                "containers": pod.containers.iter().map(container).collect::<Vec<_>>(),
                "cpu": cpu(&pod.usage),
                "memory": memory(&pod.usage),
                "network": network,
                "process_stats": {"process_count": pod.usage.process_count},
            })
        })
        .collect();
    let summary = json!({"node": node(context), "pods": pods});
    Ok(answer(StatusCode::OK, "application/json", summary.to_string()))
}

fn node(context: &Context) -> Value {
    let now = rfc3339(SystemTime::now());
    let storage = nix::sys::statvfs::statvfs(&context.config.data_dir).ok();
    let fs = storage.map(|stat| {
        let unit = stat.fragment_size();
        json!({
            "time": now,
            "availableBytes": stat.blocks_available() * unit,
            "capacityBytes": stat.blocks() * unit,
            "usedBytes": (stat.blocks() - stat.blocks_free()) * unit,
            "inodesFree": stat.files_free(),
            "inodes": stat.files(),
            "inodesUsed": stat.files() - stat.files_free(),
        })
    });
    let machine = Machine::read();
    json!({
        "nodeName": context.config.node_name,
        "startTime": rfc3339(SystemTime::now() - std::time::Duration::from_secs(machine.uptime_seconds)),
        "cpu": {"time": now, "usageCoreNanoSeconds": machine.cpu_nanoseconds},
        "memory": {
            "time": now, "availableBytes": machine.available_bytes,
            "usageBytes": machine.total_bytes.saturating_sub(machine.free_bytes),
            "workingSetBytes": machine.total_bytes.saturating_sub(machine.available_bytes),
        },
        "fs": fs,
        "runtime": {"imageFs": fs, "containerFs": fs},
        "rlimit": {"time": now, "maxpid": machine.max_pid, "curproc": machine.processes},
    })
}

#[derive(Default)]
struct Machine {
    uptime_seconds: u64,
    cpu_nanoseconds: u64,
    total_bytes: u64,
    free_bytes: u64,
    available_bytes: u64,
    max_pid: u64,
    processes: u64,
}

impl Machine {
    fn read() -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let meminfo = text("/proc/meminfo");
        let field = |name: &str| {
            let line = meminfo
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
            line.unwrap_or(0) * 1024
        };
        let stat = text("/proc/stat");
        let ticks: u64 = stat
            .lines()
            .next()
            .map(|line| {
                // user, nice, system, then idle and iowait which are no work, then the rest up to steal.
                let all: Vec<u64> = line.split_whitespace().skip(1).filter_map(|text| text.parse().ok()).collect();
                all.iter().take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, ticks)| ticks).sum()
            })
            .unwrap_or(0);
        let loadavg = text("/proc/loadavg");
        let processes = loadavg.split_whitespace().nth(3).and_then(|pair| pair.split_once('/')?.1.parse().ok());
        Self {
            uptime_seconds: text("/proc/uptime").split('.').next().and_then(|text| text.parse().ok()).unwrap_or(0),
            cpu_nanoseconds: ticks * 10_000_000,
            total_bytes: field("MemTotal:"),
            free_bytes: field("MemFree:"),
            available_bytes: field("MemAvailable:"),
            max_pid: text("/proc/sys/kernel/pid_max").trim().parse().unwrap_or(0),
            processes: processes.unwrap_or(0),
        }
    }
}

/// `/metrics/resource`: what metrics-server scrapes.
///
/// # Errors
/// When the runtime does not answer.
pub async fn resource_metrics(context: &Context) -> Result<Response<Body>, Refusal> {
    let pods = pods(context).await?;
    let mut out = String::new();
    let head = |out: &mut String, name: &str, kind: &str, help: &str| {
        let _ = writeln!(out, "# HELP {name} [STABLE] {help}\n# TYPE {name} {kind}");
    };
    let millis = |at: SystemTime| at.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis());
    head(
        &mut out,
        "container_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the container in core-seconds",
    );
    each_container(&pods, |labels, usage| {
        let _ =
            writeln!(out, "container_cpu_usage_seconds_total{labels} {} {}", usage.cpu.as_secs_f64(), millis(usage.at));
    });
    head(&mut out, "container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes");
    each_container(&pods, |labels, usage| {
        let _ = writeln!(
            out,
            "container_memory_working_set_bytes{labels} {} {}",
            usage.memory_working_set_bytes,
            millis(usage.at)
        );
    });
    let machine = Machine::read();
    let now = millis(SystemTime::now());
    head(
        &mut out,
        "node_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the node in core-seconds",
    );
    #[allow(clippy::cast_precision_loss, reason = "seconds for people")]
    let seconds = machine.cpu_nanoseconds as f64 / 1e9;
    let _ = writeln!(out, "node_cpu_usage_seconds_total {seconds} {now}");
    head(&mut out, "node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes");
    let working = machine.total_bytes.saturating_sub(machine.available_bytes);
    let _ = writeln!(out, "node_memory_working_set_bytes {working} {now}");
    head(&mut out, "pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds");
    for pod in &pods {
        let labels = format!("{{namespace={:?},pod={:?}}}", pod.metadata.namespace, pod.metadata.name);
        let _ = writeln!(
            out,
            "pod_cpu_usage_seconds_total{labels} {} {}",
            pod.usage.cpu.as_secs_f64(),
            millis(pod.usage.at)
        );
    }
    head(&mut out, "pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes");
    for pod in &pods {
        let labels = format!("{{namespace={:?},pod={:?}}}", pod.metadata.namespace, pod.metadata.name);
        let _ = writeln!(
            out,
            "pod_memory_working_set_bytes{labels} {} {}",
            pod.usage.memory_working_set_bytes,
            millis(pod.usage.at)
        );
    }
    head(
        &mut out,
        "resource_scrape_error",
        "gauge",
        "1 if there was an error while getting container metrics, 0 otherwise",
    );
    out.push_str("resource_scrape_error 0\n");
    Ok(answer(StatusCode::OK, METRICS, out))
}

fn each_container(pods: &[PodSandboxStats], mut write: impl FnMut(&str, &CgroupStats)) {
    for pod in pods {
        for container in &pod.containers {
            let name = container.labels.get(labels::CONTAINER_NAME).unwrap_or(&container.metadata.name);
            let text =
                format!("{{container={name:?},namespace={:?},pod={:?}}}", pod.metadata.namespace, pod.metadata.name);
            write(&text, &container.usage);
        }
    }
}

/// `/metrics`: the kubelet itself.
pub fn metrics(board: &Board) -> Response<Body> {
    let board = board.read();
    let running = board.values().filter(|found| found.status.phase.as_deref() == Some("Running")).count();
    let desired = board.len();
    drop(board);
    let text = format!(
        "# HELP kubelet_running_pods [ALPHA] Number of pods that have a running pod sandbox\n# TYPE kubelet_running_pods gauge\nkubelet_running_pods {running}\n# HELP kubelet_desired_pods [ALPHA] The number of pods the kubelet is being instructed to run\n# TYPE kubelet_desired_pods gauge\nkubelet_desired_pods{{static=\"\"}} {desired}\n"
    );
    answer(StatusCode::OK, METRICS, text)
}
