//! Control groups, in whichever of the three set-ups the machine has: version 1, hybrid (version 1 with an empty
//! unified hierarchy) or version 2. Paths are relative to the controllers' roots: `coracle-<id>/kubepods/…`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::{CgroupStats, LinuxContainerResources};

/// How the machine has its cgroups mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hierarchy {
    /// Controller to mount point; controllers mounted together share one.
    V1(BTreeMap<String, PathBuf>),
    V2(PathBuf),
}

/// Controllers of version 1 that a container joins: those that libcontainer knows.
const V1_CONTROLLERS: [&str; 12] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "hugetlb",
    "memory",
    "pids",
    "perf_event",
    "blkio",
    "net_prio",
    "net_cls",
    "freezer",
];

/// Controllers of version 2 that are handed down to pods and containers.
const V2_CONTROLLERS: [&str; 6] = ["cpu", "memory", "pids", "cpuset", "hugetlb", "io"];

impl Hierarchy {
    /// Looks at this machine's mounts.
    pub fn detect() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroups are mounted"))
    }

    fn parse(mountinfo: &str) -> Option<Self> {
        let mut controllers = BTreeMap::new();
        let mut unified = None;
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(path) = left.split(' ').nth(4) else { continue };
            let mut right = right.split(' ');
            match (right.next(), right.nth(1)) {
                (Some("cgroup"), Some(options)) => {
                    for option in options.split(',').filter(|option| V1_CONTROLLERS.contains(option)) {
                        controllers.entry(option.to_owned()).or_insert_with(|| PathBuf::from(path));
                    }
                }
                (Some("cgroup2"), _) => unified = unified.or_else(|| Some(PathBuf::from(path))),
                _ => {}
            }
        }
        if controllers.is_empty() { unified.map(Hierarchy::V2) } else { Some(Hierarchy::V1(controllers)) }
    }

    pub fn is_v2(&self) -> bool {
        matches!(self, Hierarchy::V2(_))
    }

    /// The folders of one cgroup, one per hierarchy.
    fn folders(&self, path: &str) -> Vec<PathBuf> {
        match self {
            Hierarchy::V1(controllers) => {
                let mounts: BTreeSet<&PathBuf> = controllers.values().collect();
                mounts.into_iter().map(|mount| mount.join(path)).collect()
            }
            Hierarchy::V2(root) => vec![root.join(path)],
        }
    }

    fn folder(&self, controller: &str, path: &str) -> Option<PathBuf> {
        match self {
            Hierarchy::V1(controllers) => controllers.get(controller).map(|mount| mount.join(path)),
            Hierarchy::V2(root) => Some(root.join(path)),
        }
    }

    /// Files through which a process joins the cgroup.
    pub fn procs(&self, path: &str) -> Vec<PathBuf> {
        self.folders(path).into_iter().map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// Makes a cgroup with all above it. `inner` hands the controllers down to children (version 2: such a group holds
    /// no processes itself).
    pub fn create(&self, path: &str, inner: bool) -> io::Result<()> {
        match self {
            Hierarchy::V1(controllers) => {
                let cpuset = controllers.get("cpuset");
                for mount in controllers.values().collect::<BTreeSet<_>>() {
                    let mut folder = mount.clone();
                    for part in Path::new(path) {
                        let above = folder.clone();
                        folder.push(part);
                        make(&folder)?;
                        if Some(mount) == cpuset {
                            inherit_cpuset(&above, &folder)?;
                        }
                    }
                }
            }
            Hierarchy::V2(root) => {
                let mut folder = root.clone();
                let parts: Vec<_> = Path::new(path).iter().collect();
                for (depth, part) in parts.iter().enumerate() {
                    if depth == 0 {
                        hand_down(&folder);
                    }
                    folder.push(part);
                    make(&folder)?;
                    if inner || depth + 1 < parts.len() {
                        hand_down(&folder);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the limits. A controller that the machine does not have is an error only when a limit needs it.
    pub fn apply(&self, path: &str, resources: &LinuxContainerResources) -> io::Result<()> {
        for write in plan(self.is_v2(), resources) {
            let Some(folder) = self.folder(write.controller, path) else {
                if write.optional {
                    continue;
                }
                let text = format!("the machine has no cgroup controller {}", write.controller);
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            };
            let file = folder.join(&write.file);
            match fs::write(&file, &write.value) {
                Err(error) if write.optional && error.kind() == io::ErrorKind::NotFound => {}
                // Limits of memory and of memory with swap depend on each other: the other order may do.
                Err(error) if write.retry => {
                    tracing::debug!(file = %file.display(), %error, "limit is written again after the others");
                    self.retry(path, &write, resources)?;
                }
                other => other.map_err(|error| {
                    io::Error::new(error.kind(), format!("write {:?} to {}: {error}", write.value, file.display()))
                })?,
            }
        }
        Ok(())
    }

    fn retry(&self, path: &str, first: &Write, resources: &LinuxContainerResources) -> io::Result<()> {
        let writes = plan(self.is_v2(), resources).into_iter().filter(|write| write.retry);
        let folder = self.folder(first.controller, path).unwrap_or_default();
        let mut last = Ok(());
        for write in writes.rev_collected() {
            last = match fs::write(folder.join(&write.file), &write.value) {
                Err(error) if write.optional && error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            };
        }
        last.map_err(|error| io::Error::new(error.kind(), format!("set memory limit: {error}")))
    }

    /// Every process in the cgroup and below it.
    pub fn pids(&self, path: &str) -> BTreeSet<i32> {
        let mut found = BTreeSet::new();
        for folder in self.folders(path) {
            collect_pids(&folder, &mut found);
        }
        found
    }

    /// Kills everything in the cgroup and below, and waits until it is empty or `patience` is over.
    pub fn kill(&self, path: &str, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        if let Hierarchy::V2(root) = self {
            // One stroke where the kernel has it (5.14).
            let _ = fs::write(root.join(path).join("cgroup.kill"), "1");
        }
        let mut pause = Duration::from_millis(1);
        loop {
            let pids = self.pids(path);
            if pids.is_empty() {
                return true;
            }
            for pid in pids {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Removes the cgroup and those below it. Busy ones stay and are reported.
    pub fn remove(&self, path: &str) -> io::Result<()> {
        let mut result = Ok(());
        for folder in self.folders(path) {
            result = result.and(remove_tree(&folder));
        }
        result
    }

    /// Removes the cgroups above `path` up to `top` as far as they are empty.
    pub fn remove_empty_above(&self, path: &str, top: &str) {
        let mut path = Path::new(path);
        while let Some(above) = path.parent().filter(|above| above.starts_with(top) && !above.as_os_str().is_empty()) {
            for folder in self.folders(&above.to_string_lossy()) {
                let _ = fs::remove_dir(folder);
            }
            path = above;
        }
    }

    /// How often the kernel killed a process in this cgroup because its memory limit was reached.
    pub fn oom_kills(&self, path: &str) -> u64 {
        let Some(folder) = self.folder("memory", path) else { return 0 };
        let file = if self.is_v2() { "memory.events" } else { "memory.oom_control" };
        fields(&folder.join(file)).get("oom_kill").copied().unwrap_or(0)
    }

    /// Reads what the cgroup counts.
    pub fn stats(&self, path: &str) -> io::Result<CgroupStats> {
        let folder = |controller: &str| {
            self.folder(controller, path)
                .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "no such controller"))
        };
        let memory = folder("memory")?;
        let counters = fields(&memory.join("memory.stat"));
        let counter = |name: &str| counters.get(name).copied().unwrap_or(0);
        let (usage, inactive, rss, limit, cpu);
        if self.is_v2() {
            usage = number(&memory.join("memory.current"))?;
            (inactive, rss) = (counter("inactive_file"), counter("anon"));
            limit = number(&memory.join("memory.max")).ok();
            let time = fields(&folder("cpu")?.join("cpu.stat"));
            cpu = Duration::from_micros(time.get("usage_usec").copied().unwrap_or(0));
        } else {
            usage = number(&memory.join("memory.usage_in_bytes"))?;
            (inactive, rss) = (counter("total_inactive_file"), counter("total_rss"));
            // Version 1 shows no limit as the largest number of whole pages.
            limit = number(&memory.join("memory.limit_in_bytes")).ok().filter(|limit| *limit < 1 << 62);
            cpu = Duration::from_nanos(number(&folder("cpuacct")?.join("cpuacct.usage"))?);
        }
        let total = |name: &str| if self.is_v2() { counter(name) } else { counter(&format!("total_{name}")) };
        Ok(CgroupStats {
            at: SystemTime::now(),
            cpu,
            memory_usage_bytes: usage,
            memory_working_set_bytes: usage.saturating_sub(inactive),
            memory_rss_bytes: rss,
            memory_limit_bytes: limit,
            page_faults: total("pgfault"),
            major_page_faults: total("pgmajfault"),
            process_count: folder("pids").and_then(|pids| number(&pids.join("pids.current"))).unwrap_or(0),
        })
    }

    /// Gives a container its devices: lines for `devices.allow`, or all of them.
    pub fn allow_devices(&self, path: &str, rules: &[String], all: bool) -> io::Result<()> {
        let controllers = match self {
            Hierarchy::V1(controllers) => controllers,
            Hierarchy::V2(_) if all => return Ok(()),
            Hierarchy::V2(root) => return super::devices::attach(&root.join(path), rules),
        };
        let Some(folder) = controllers.get("devices").map(|mount| mount.join(path)) else { return Ok(()) };
        if all {
            return fs::write(folder.join("devices.allow"), "a");
        }
        fs::write(folder.join("devices.deny"), "a")?;
        rules.iter().try_for_each(|rule| fs::write(folder.join("devices.allow"), rule))
    }
}

trait RevCollected: Iterator {
    fn rev_collected(self) -> std::iter::Rev<std::vec::IntoIter<Self::Item>>;
}

impl<I: Iterator> RevCollected for I {
    fn rev_collected(self) -> std::iter::Rev<std::vec::IntoIter<I::Item>> {
        self.collect::<Vec<_>>().into_iter().rev()
    }
}

/// One file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    controller: &'static str,
    file: String,
    value: String,
    /// May be missing: swap accounting, page sizes.
    optional: bool,
    /// Order matters and depends on the current value.
    retry: bool,
}

/// Which files to write for these limits.
fn plan(v2: bool, resources: &LinuxContainerResources) -> Vec<Write> {
    let mut writes = Vec::new();
    let mut add = |controller, file: &str, value: String, optional, retry| {
        writes.push(Write { controller, file: file.to_owned(), value, optional, retry });
    };
    let r = resources;
    if let Some(shares) = r.cpu_shares.filter(|shares| *shares > 0) {
        if v2 {
            add("cpu", "cpu.weight", weight(shares).to_string(), false, false)
        } else {
            add("cpu", "cpu.shares", shares.to_string(), false, false)
        }
    }
    let quota = r.cpu_quota.filter(|quota| *quota != 0);
    if v2 {
        if quota.is_some() || r.cpu_period.is_some() {
            let quota = quota.filter(|quota| *quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
            add(
                "cpu",
                "cpu.max",
                format!("{quota} {}", r.cpu_period.filter(|p| *p > 0).unwrap_or(100_000)),
                false,
                false,
            );
        }
    } else {
        if let Some(period) = r.cpu_period.filter(|period| *period > 0) {
            add("cpu", "cpu.cfs_period_us", period.to_string(), false, false);
        }
        if let Some(quota) = quota {
            add("cpu", "cpu.cfs_quota_us", quota.to_string(), false, false);
        }
    }
    if let Some(limit) = r.memory_limit_in_bytes.filter(|limit| *limit != 0) {
        let file = if v2 { "memory.max" } else { "memory.limit_in_bytes" };
        add("memory", file, unlimited(v2, limit), false, !v2);
    }
    if let Some(both) = r.memory_swap_limit_in_bytes.filter(|limit| *limit != 0) {
        if v2 {
            let swap = if both < 0 { both } else { (both - r.memory_limit_in_bytes.unwrap_or(0).max(0)).max(0) };
            add("memory", "memory.swap.max", unlimited(v2, swap), true, false);
        } else {
            add("memory", "memory.memsw.limit_in_bytes", both.to_string(), true, true);
        }
    }
    if let Some(limit) = r.pids_limit.filter(|limit| *limit != 0) {
        add("pids", "pids.max", if limit < 0 { "max".to_owned() } else { limit.to_string() }, false, false);
    }
    if !r.cpuset_cpus.is_empty() {
        add("cpuset", "cpuset.cpus", r.cpuset_cpus.clone(), false, false);
    }
    if !r.cpuset_mems.is_empty() {
        add("cpuset", "cpuset.mems", r.cpuset_mems.clone(), false, false);
    }
    for (size, limit) in &r.hugepage_limits {
        let file = if v2 { format!("hugetlb.{size}.max") } else { format!("hugetlb.{size}.limit_in_bytes") };
        add("hugetlb", &file, limit.to_string(), true, false);
    }
    if v2 {
        for (file, value) in &r.unified {
            if !file.contains('/') {
                add("unified", file, value.clone(), false, false);
            }
        }
    }
    writes
}

fn unlimited(v2: bool, value: i64) -> String {
    if v2 && value < 0 { "max".to_owned() } else { value.to_string() }
}

/// Shares of version 1 (2..=262144) as a weight of version 2 (1..=10000), the formula of KEP-2254.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|error| io::Error::new(error.kind(), format!("create {}: {error}", folder.display()))),
    }
}

/// A new cpuset of version 1 is empty and takes no process: it starts as its parent is.
fn inherit_cpuset(above: &Path, folder: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(folder.join(file))?.trim().is_empty() {
            fs::write(folder.join(file), fs::read_to_string(above.join(file))?.trim())?;
        }
    }
    Ok(())
}

/// Enables what the parent has, one by one: one refused controller must not cost the others.
fn hand_down(folder: &Path) {
    let available = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    let enabled = fs::read_to_string(folder.join("cgroup.subtree_control")).unwrap_or_default();
    for controller in V2_CONTROLLERS {
        let has = |list: &str| list.split_whitespace().any(|name| name == controller);
        if has(&available) && !has(&enabled) {
            let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

fn collect_pids(folder: &Path, found: &mut BTreeSet<i32>) {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for inner in subfolders(folder) {
        collect_pids(&inner, found);
    }
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for inner in subfolders(folder) {
        result = result.and(remove_tree(&inner));
    }
    // A cgroup stays busy for a moment after its last process was reaped.
    for pause in [0, 1, 5, 20, 50] {
        std::thread::sleep(Duration::from_millis(pause));
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return result,
            other => return result.and(other),
        }
    }
    result.and(Err(io::Error::from_raw_os_error(libc::EBUSY)))
}

fn subfolders(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

fn number(file: &Path) -> io::Result<u64> {
    fs::read_to_string(file)?.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn fields(file: &Path) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_setups_are_recognised() {
        let v1 = "1 0 0:1 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                  2 0 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  3 0 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        let Some(Hierarchy::V1(controllers)) = Hierarchy::parse(v1) else { panic!("{v1}") };
        assert_eq!(controllers.keys().collect::<Vec<_>>(), ["cpu", "cpuacct", "memory"]);
        let unified = "4 0 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert!(matches!(Hierarchy::parse(&format!("{unified}{v1}")), Some(Hierarchy::V1(_))));
        assert_eq!(
            Hierarchy::parse("4 0 0:4 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"),
            Some(Hierarchy::V2("/sys/fs/cgroup".into()))
        );
        assert_eq!(Hierarchy::parse("5 0 0:5 / / rw - ext4 /dev/vda rw"), None);
    }

    #[test]
    fn limits_become_files() {
        let resources = LinuxContainerResources {
            cpu_shares: Some(1024),
            cpu_quota: Some(50_000),
            cpu_period: Some(100_000),
            memory_limit_in_bytes: Some(1 << 20),
            memory_swap_limit_in_bytes: Some(1 << 20),
            pids_limit: Some(-1),
            hugepage_limits: [("2MB".to_owned(), 4 << 20)].into(),
            unified: [("memory.high".to_owned(), "5".to_owned())].into(),
            ..Default::default()
        };
        let shown = |v2| plan(v2, &resources).iter().map(|w| format!("{}={}", w.file, w.value)).collect::<Vec<_>>();
        assert_eq!(
            shown(true),
            [
                "cpu.weight=39",
                "cpu.max=50000 100000",
                "memory.max=1048576",
                "memory.swap.max=0",
                "pids.max=max",
                "hugetlb.2MB.max=4194304",
                "memory.high=5"
            ]
        );
        assert_eq!(
            shown(false),
            [
                "cpu.shares=1024",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=1048576",
                "pids.max=max",
                "hugetlb.2MB.limit_in_bytes=4194304"
            ]
        );
        assert!(plan(true, &LinuxContainerResources::default()).is_empty());
    }
}
