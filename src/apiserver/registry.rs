//! The kinds served right now: the built-in rows, and rows that appear at run time.

use super::resources::{GROUPS, RESOURCES, Resource};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;

/// A consistent picture of all kinds.
#[derive(Default)]
pub struct Snapshot {
    /// Groups in the order of discovery; core first.
    groups: Vec<Group>,
    index: HashMap<String, usize>,
    /// Counts the changes, for the ETags of discovery.
    pub generation: u64,
}

/// One API group.
pub struct Group {
    /// Empty for core.
    pub name: String,
    /// Served versions, the preferred one first.
    pub versions: Vec<String>,
    /// In the order of discovery.
    pub resources: Vec<Arc<Resource>>,
    by_plural: HashMap<String, Arc<Resource>>,
}

impl Group {
    /// The kinds with this version.
    pub fn of_version<'a>(&'a self, version: &'a str) -> impl Iterator<Item = &'a Arc<Resource>> {
        self.resources.iter().filter(move |r| r.serves(version))
    }
}

impl Snapshot {
    fn new(rows: impl IntoIterator<Item = Arc<Resource>>, generation: u64) -> Snapshot {
        let mut snapshot = Snapshot { generation, ..Snapshot::default() };
        for name in std::iter::once("").chain(GROUPS) {
            snapshot.group(name);
        }
        for row in rows {
            let group = snapshot.group(&row.group);
            for version in &row.versions {
                if !group.versions.iter().any(|v| v == version) {
                    group.versions.push(version.to_string());
                }
            }
            group.by_plural.insert(row.plural.to_string(), row.clone());
            group.resources.push(row);
        }
        for group in &mut snapshot.groups {
            group.resources.sort_by(|a, b| a.plural.cmp(&b.plural));
            group.versions.sort_by_key(|v| std::cmp::Reverse(version_rank(v)));
        }
        snapshot
    }

    fn group(&mut self, name: &str) -> &mut Group {
        let next = self.groups.len();
        let at = *self.index.entry(name.to_owned()).or_insert(next);
        if at == next {
            self.groups.push(Group {
                name: name.to_owned(),
                versions: Vec::new(),
                resources: Vec::new(),
                by_plural: HashMap::new(),
            });
        }
        &mut self.groups[at]
    }

    /// All groups, core first.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(|g| !g.versions.is_empty())
    }

    /// A group by name.
    pub fn find_group(&self, name: &str) -> Option<&Group> {
        self.index.get(name).map(|at| &self.groups[*at]).filter(|g| !g.versions.is_empty())
    }

    /// The kind at a URL.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.find_group(group)?.by_plural.get(plural).filter(|r| r.serves(version))
    }

    /// The kind by its name.
    pub fn find_kind(&self, group: &str, kind: &str) -> Option<&Arc<Resource>> {
        self.find_group(group)?.resources.iter().find(|r| r.kind == kind)
    }
}

/// Kubernetes' order of versions: v2 > v1 > v1beta2 > v1beta1 > v1alpha1 > anything else.
fn version_rank(version: &str) -> (u8, u32, u32) {
    let parse = || {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (major, stage) = rest.split_at(digits);
        let major = major.parse().ok()?;
        Some(match stage {
            "" => (3, major, 0),
            _ if stage.starts_with("beta") => (2, major, stage[4..].parse().ok()?),
            _ if stage.starts_with("alpha") => (1, major, stage[5..].parse().ok()?),
            _ => return None,
        })
    };
    parse().unwrap_or((0, 0, 0))
}

/// The registry: readers take a [`Snapshot`], whoever serves custom resources replaces its rows.
pub struct Registry {
    current: RwLock<Arc<Snapshot>>,
}

impl Default for Registry {
    fn default() -> Registry {
        Registry { current: RwLock::new(Arc::new(Snapshot::new(RESOURCES.iter().cloned(), 0))) }
    }
}

impl Registry {
    /// The kinds as of now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.read().clone()
    }

    /// Replaces all rows that are not built in.
    pub fn set_custom(&self, rows: Vec<Arc<Resource>>) {
        let mut current = self.current.write();
        let generation = current.generation + 1;
        *current = Arc::new(Snapshot::new(RESOURCES.iter().cloned().chain(rows), generation));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_kinds_and_orders_versions() {
        let snapshot = Registry::default().snapshot();
        assert_eq!(snapshot.find("apps", "v1", "deployments").unwrap().kind, "Deployment");
        assert!(snapshot.find("apps", "v2", "deployments").is_none());
        assert_eq!(snapshot.find_group("autoscaling").unwrap().versions, ["v2", "v1"]);
        assert!(version_rank("v1") > version_rank("v1beta1") && version_rank("v1beta1") > version_rank("v1alpha9"));
        assert_eq!(snapshot.groups().next().unwrap().name, "");
    }
}
