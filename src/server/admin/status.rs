//! `coracle status`: one look at everything that can be wrong with this server and its cluster, each with what to do.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use coracle_raft::Standing;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde::{Deserialize, Serialize};

use super::Admin;
use super::certificates::{self, CertificateView};
use super::members::{self, MemberView};
use crate::auth::pki::clock;
use crate::server::{VERSION, cluster};

/// Less than this free is worth a warning.
const LITTLE_SPACE: u64 = 1 << 30;
/// A sync that takes longer is worth a warning: every write waits for one.
const SLOW_SYNC: Duration = Duration::from_millis(100);
/// Clocks that are further apart are worth a warning, in seconds.
const SKEW: i64 = 5;
/// A member that lacks more entries is worth a warning.
const FAR_BEHIND: u64 = 10_000;

/// What there is to say.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusView {
    /// Name of this server.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its URL.
    pub address: String,
    /// Version of the program.
    pub version: String,
    /// `leader`, `follower`, `learner`, or what else it is.
    pub role: String,
    /// Name of the leader.
    pub leader: Option<String>,
    /// All servers.
    pub members: Vec<MemberHealth>,
    /// The disk under the data folder.
    pub disk: Disk,
    /// This machine's clock.
    pub clock: String,
    /// Certificates of this server.
    pub certificates: Vec<CertificateView>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// A server and whether it is well.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberHealth {
    /// Who.
    #[serde(flatten)]
    pub member: MemberView,
    /// `ready`, `not ready: ...` or `unreachable: ...`.
    pub health: String,
    /// How far its clock is ahead of this machine's, in seconds.
    pub clock_ahead: Option<i64>,
}

/// The disk under the data folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Bytes free.
    pub free: u64,
    /// Bytes in all.
    pub size: u64,
    /// How long one small durable write took, in microseconds; none when it failed.
    pub sync_microseconds: Option<u64>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What.
    pub what: String,
    /// The remedy.
    pub remedy: String,
}

fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { what: what.into(), remedy: remedy.into() }
}

/// Looks at everything.
pub async fn look(admin: &Admin) -> StatusView {
    let cluster = &admin.cluster;
    let views = members::list(cluster);
    let probes = views.into_iter().map(|view| probe(admin, view));
    let members: Vec<MemberHealth> = futures::future::join_all(probes).await;
    let data_dir = admin.settings.data_dir.clone();
    let disk = tokio::task::spawn_blocking(move || look_at_disk(&data_dir)).await.unwrap_or(Disk {
        free: 0,
        size: 0,
        sync_microseconds: None,
    });
    let standing = *cluster.node.standing().borrow();
    let own = members.iter().find(|m| m.member.id == cluster::to_text(cluster.node.id()));
    let role = match (standing, own) {
        (Standing::Removed, _) => "removed from the cluster",
        (Standing::Superseded, _) => "left behind by a restored cluster",
        (Standing::Member, Some(own)) if own.member.leader => "leader",
        (Standing::Member, Some(own)) if own.member.learner => "learner",
        (Standing::Member, Some(_)) => "follower",
        (Standing::Member, None) => "waiting to be let in",
    };
    let born = cluster.keyring.keys.server_ca.not_before();
    let clock_problem = clock::problem(SystemTime::now(), clock::earliest(Some(born)));
    let certificates = certificates::list(admin);
    let mut problems = of_members(&members, role);
    problems.extend(of_disk(&disk));
    problems
        .extend(clock_problem.iter().map(|why| problem(why.clone(), "set the clock (timedatectl, or an NTP client)")));
    problems.extend(certificates.iter().filter(|c| c.state != "ok").map(of_certificate));
    StatusView {
        name: cluster.name.clone(),
        id: cluster::to_text(cluster.node.id()),
        address: format!("https://{}", cluster.address),
        version: VERSION.to_owned(),
        role: role.to_owned(),
        leader: members.iter().find(|m| m.member.leader).map(|m| m.member.name.clone()),
        disk,
        clock: clock_problem.unwrap_or_else(|| "plausible".to_owned()),
        certificates,
        problems,
        members,
    }
}

/// Asks a server how it is; its clock is in the header of every answer.
async fn probe(admin: &Admin, member: MemberView) -> MemberHealth {
    let address = member.address.trim_start_matches("https://").to_owned();
    let request = Request::get("/readyz").header("host", "kubernetes").body(Full::new(Bytes::new()));
    let (Some(id), Ok(request)) = (cluster::from_text(&member.id), request) else {
        return MemberHealth { member, health: "unknown".to_owned(), clock_ahead: None };
    };
    let begin = SystemTime::now();
    let answer = admin.cluster.peers.ask(id, &address, request).await;
    let (health, clock_ahead) = match answer {
        Ok(answer) => {
            let date = answer.headers().get(header::DATE).and_then(|date| date.to_str().ok()).and_then(seconds_of);
            let here = begin.duration_since(SystemTime::UNIX_EPOCH).map(|d| d.as_secs() as i64).unwrap_or_default();
            let health = match answer.status() {
                StatusCode::OK => "ready".to_owned(),
                _ => format!("not ready: {}", reasons(&String::from_utf8_lossy(answer.body()))),
            };
            (health, date.map(|there| there - here))
        }
        Err(error) => (format!("unreachable: {error}"), None),
    };
    MemberHealth { member, health, clock_ahead }
}

/// Seconds since 1970 of an HTTP date (RFC 9110, 5.6.7).
fn seconds_of(date: &str) -> Option<i64> {
    let parsed = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date.replace("GMT", "+0000")).ok()?;
    Some(parsed.as_second())
}

/// What failed, out of the text of `/readyz`.
fn reasons(text: &str) -> String {
    let failed = text.lines().filter_map(|line| line.strip_prefix("[-]")?.split_once(" failed: "));
    failed.map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; ")
}

fn look_at_disk(data_dir: &Path) -> Disk {
    let (free, size) = match nix::sys::statvfs::statvfs(data_dir) {
        Ok(all) => (all.blocks_available() * all.fragment_size(), all.blocks() * all.fragment_size()),
        Err(_) => (0, 0),
    };
    let probe = data_dir.join("server/status.probe");
    let begin = Instant::now();
    let synced = std::fs::File::create(&probe).and_then(|mut file| {
        use std::io::Write;
        file.write_all(&[0; 512])?;
        file.sync_data()
    });
    let took = begin.elapsed();
    // Nothing reads it.
    let _ = std::fs::remove_file(&probe);
    Disk { free, size, sync_microseconds: synced.ok().map(|()| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)) }
}

fn of_members(members: &[MemberHealth], role: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let voters = members.iter().filter(|m| !m.member.learner).count();
    let alive = members.iter().filter(|m| !m.member.learner && !m.health.starts_with("unreachable")).count();
    let restart_others = "start the other servers, or see that they reach each other on port 6443";
    match role {
        // What it knows of the others is of the past.
        "removed from the cluster" => {
            return vec![problem(
                "this server was removed from the cluster",
                "stop it for good (`coracle uninstall`), or after that start it with --server and --token to join anew",
            )];
        }
        "waiting to be let in" => problems.push(problem("this server is in no cluster yet", restart_others)),
        _ if !members.iter().any(|m| m.member.leader) => problems.push(problem(
            format!("the cluster has no leader: {alive} of {voters} servers are reached, {} are needed", voters / 2 + 1),
            format!(
                "{restart_others}; if they are lost for good, stop this server and run `coracle server --cluster-reset` here"
            ),
        )),
        _ => {}
    }
    for m in members {
        let name = &m.member.name;
        if let Some(why) = m.health.strip_prefix("unreachable: ") {
            let remedy = format!("start it, or remove it if it is gone for good: coracle member remove {name}");
            problems.push(problem(format!("server {name} is not reached: {why}"), remedy));
        } else if let Some(why) = m.health.strip_prefix("not ready: ") {
            problems.push(problem(format!("server {name} is not ready: {why}"), "see its log"));
        }
        if let Some(ahead) = m.clock_ahead.filter(|ahead| ahead.abs() > SKEW) {
            let what = format!("the clock of server {name} differs from this machine's by {ahead} s");
            problems.push(problem(what, "set both clocks by NTP"));
        }
        if let Some(lag) = m.member.lag.filter(|lag| *lag > FAR_BEHIND) {
            problems
                .push(problem(format!("server {name} lacks {lag} entries of the log"), "wait, or look at its disk"));
        }
    }
    if voters == 2 {
        let what = "the cluster has two servers: it stops when either of them is lost";
        problems.push(problem(what, "add a third server"));
    }
    problems
}

fn of_disk(disk: &Disk) -> Vec<Problem> {
    let mut problems = Vec::new();
    if disk.free < LITTLE_SPACE {
        problems.push(problem(format!("{} MiB are free on the disk of the data folder", disk.free >> 20), "make room"));
    }
    match disk.sync_microseconds {
        None => problems.push(problem("the data folder cannot be written", "look at the disk (dmesg)")),
        Some(took) if Duration::from_micros(took) > SLOW_SYNC => problems.push(problem(
            format!("a durable write takes {} ms: every write to the API waits for one", took / 1000),
            "use a faster disk for the data folder, or find what else keeps it busy",
        )),
        Some(_) => {}
    }
    problems
}

fn of_certificate(certificate: &CertificateView) -> Problem {
    let what = format!("the certificate {:?} {} ({})", certificate.name, certificate.state, certificate.expires);
    problem(what, "coracle certificate rotate")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, leader: bool, health: &str) -> MemberHealth {
        let member = MemberView {
            name: name.into(),
            id: "1".into(),
            address: String::new(),
            leader,
            learner: false,
            lag: None,
            reachable: None,
        };
        MemberHealth { member, health: health.into(), clock_ahead: Some(0) }
    }

    #[test]
    fn a_healthy_cluster_has_no_problems_and_each_fault_has_a_remedy() {
        let well = [member("a", true, "ready"), member("b", false, "ready"), member("c", false, "ready")];
        assert_eq!(of_members(&well, "leader"), []);
        let mut ill = well.clone();
        ill[2].health = "unreachable: connection refused".into();
        ill[1].clock_ahead = Some(-3600);
        let text = format!("{:?}", of_members(&ill, "leader"));
        for part in ["server c is not reached", "member remove c", "differs from this machine's by -3600 s"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        ill[0].member.leader = false;
        ill[1].health = "unreachable: x".into();
        let text = format!("{:?}", of_members(&ill, "follower"));
        assert!(
            text.contains("1 of 3 servers are reached, 2 are needed") && text.contains("--cluster-reset"),
            "{text}"
        );
    }

    #[test]
    fn reasons_and_dates_are_read() {
        assert_eq!(reasons("[+]ping ok\n[-]store failed: no leader\nreadyz check failed\n"), "store: no leader");
        assert_eq!(seconds_of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(seconds_of("yesterday"), None);
    }
}
