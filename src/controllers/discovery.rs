//! What resources the API serves now, custom ones included.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroupList, APIResourceList};
use parking_lot::Mutex;

use super::api::{Api, ApiError};
use super::resource::Resource;

/// How long an answer is believed when nothing says that it changed.
const MAX_AGE: Duration = Duration::from_secs(30);

/// A resource and what can be done with it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Served {
    /// The resource, in its group's preferred version.
    pub resource: Resource,
    /// Verbs of discovery.
    pub verbs: Vec<String>,
}

impl Served {
    /// Whether a verb is there.
    pub fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|candidate| candidate == verb)
    }
}

/// The resources of all groups, and the groups that did not answer.
#[derive(Debug, Default)]
pub struct Catalog {
    /// What is served.
    pub served: Vec<Served>,
    /// Group-versions whose list could not be read, with the reason.
    pub failures: Vec<String>,
}

impl Catalog {
    /// The resource of a kind in a group, whatever the version.
    pub fn kind(&self, api_version: &str, kind: &str) -> Option<&Resource> {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let mut found =
            self.served.iter().filter(|served| served.resource.kind == kind && served.resource.group == group);
        found.next().map(|served| &served.resource)
    }
}

/// Asks the API and remembers for a while.
pub struct Discovery {
    api: Api,
    remembered: Mutex<Option<(Instant, Arc<Catalog>)>>,
}

impl Discovery {
    /// Nothing is known yet.
    pub fn new(api: Api) -> Arc<Discovery> {
        Arc::new(Discovery { api, remembered: Mutex::default() })
    }

    /// What is remembered may be wrong by now.
    pub fn forget(&self) {
        *self.remembered.lock() = None;
    }

    /// What is served.
    pub async fn catalog(&self) -> Result<Arc<Catalog>, ApiError> {
        if let Some((at, catalog)) = &*self.remembered.lock()
            && at.elapsed() < MAX_AGE
        {
            return Ok(catalog.clone());
        }
        let catalog = Arc::new(self.ask().await?);
        *self.remembered.lock() = Some((Instant::now(), catalog.clone()));
        Ok(catalog)
    }

    async fn ask(&self) -> Result<Catalog, ApiError> {
        let mut catalog = Catalog::default();
        read(&mut catalog, "", "v1", &self.api.get_path("/api/v1").await?)?;
        let groups: APIGroupList = serde_json::from_slice(&self.api.get_path("/apis").await?)?;
        for group in groups.groups {
            let Some(version) = group.preferred_version.or_else(|| group.versions.into_iter().next()) else { continue };
            let answer = self.api.get_path(&format!("/apis/{}", version.group_version)).await;
            let read = answer.and_then(|bytes| read(&mut catalog, &group.name, &version.version, &bytes));
            if let Err(error) = read {
                catalog.failures.push(format!("{}: {error}", version.group_version));
            }
        }
        catalog.served.sort();
        Ok(catalog)
    }
}

fn read(catalog: &mut Catalog, group: &str, version: &str, bytes: &[u8]) -> Result<(), ApiError> {
    let list: APIResourceList = serde_json::from_slice(bytes)?;
    for served in list.resources {
        if served.name.contains('/') {
            continue;
        }
        catalog.served.push(Served {
            resource: Resource {
                group: group.to_owned().into(),
                version: version.to_owned().into(),
                plural: served.name.into(),
                kind: served.kind.into(),
                namespaced: served.namespaced,
            },
            verbs: served.verbs,
        });
    }
    Ok(())
}
