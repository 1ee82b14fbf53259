//! Who a container runs as: numbers and names looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! A static program cannot load the host's name services, and the host's users are not the image's anyway.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::{LinuxContainerSecurityContext, RuntimeError, SupplementalGroupsPolicy};
use crate::image::unpack::{open_folder, resolve};

/// Largest user file that is read.
const MAX_FILE: u64 = 4 << 20;

/// The resolved identity of a container's processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Every supplementary group, the primary one first.
    pub groups: Vec<u32>,
    pub home: String,
}

/// The two files, as far as they can be read.
#[derive(Debug, Default)]
pub struct UserFiles {
    pub passwd: String,
    pub group: String,
}

impl UserFiles {
    /// Reads the files below a root filesystem; links in there cannot lead outside.
    pub fn read(rootfs: &Path) -> io::Result<Self> {
        let root = open_folder(rootfs)?;
        let read = |path: &str| -> io::Result<String> {
            match resolve(&root, Path::new(path), libc::O_RDONLY | libc::O_NONBLOCK) {
                Ok(file) => {
                    let mut bytes = Vec::new();
                    let file = File::from(file);
                    if !file.metadata()?.is_file() {
                        return Ok(String::new());
                    }
                    file.take(MAX_FILE).read_to_end(&mut bytes)?;
                    Ok(String::from_utf8_lossy(&bytes).into_owned())
                }
                Err(_) => Ok(String::new()),
            }
        };
        Ok(Self { passwd: read("etc/passwd")?, group: read("etc/group")? })
    }

    fn user(&self, fits: impl Fn(&str, u32) -> bool) -> Option<Passwd<'_>> {
        self.passwd.lines().filter_map(Passwd::parse).find(|entry| fits(entry.name, entry.uid))
    }

    fn group_id(&self, name: &str) -> Option<u32> {
        self.group.lines().filter_map(Group::parse).find(|entry| entry.name == name).map(|entry| entry.gid)
    }

    /// Decides who runs: the pod's numbers before its name before the image's `user[:group]`.
    pub fn resolve(&self, context: &LinuxContainerSecurityContext, image_user: &str) -> Result<User, RuntimeError> {
        let number = |id: i64, what: &str| {
            u32::try_from(id).map_err(|_| RuntimeError::Invalid(format!("{what} {id} is out of range")))
        };
        let (image_name, image_group) = image_user.split_once(':').map_or((image_user, None), |(u, g)| (u, Some(g)));
        let (entry, uid, group) = if let Some(id) = context.run_as_user {
            let uid = number(id, "runAsUser")?;
            (self.user(|_, other| other == uid), uid, None)
        } else if !context.run_as_username.is_empty() {
            let entry = self.named(&context.run_as_username)?;
            let uid = entry.uid;
            (Some(entry), uid, None)
        } else if image_name.is_empty() {
            (self.user(|_, other| other == 0), 0, image_group)
        } else if let Ok(uid) = image_name.parse::<u32>() {
            (self.user(|_, other| other == uid), uid, image_group)
        } else {
            let entry = self.named(image_name)?;
            let uid = entry.uid;
            (Some(entry), uid, image_group)
        };
        let gid = match (context.run_as_group, group) {
            (Some(id), _) => number(id, "runAsGroup")?,
            (None, Some(group)) if !group.is_empty() => match group.parse() {
                Ok(gid) => gid,
                Err(_) => self
                    .group_id(group)
                    .ok_or_else(|| RuntimeError::Invalid(format!("no users found for group {group:?} in the image")))?,
            },
            _ => entry.as_ref().map_or(0, |entry| entry.gid),
        };
        let mut groups = vec![gid];
        if context.supplemental_groups_policy == SupplementalGroupsPolicy::Merge
            && let Some(entry) = &entry
        {
            let member = |group: &Group<'_>| group.members.split(',').any(|name| name.trim() == entry.name);
            groups.extend(self.group.lines().filter_map(Group::parse).filter(member).map(|group| group.gid));
        }
        for id in &context.supplemental_groups {
            groups.push(number(*id, "supplementalGroups")?);
        }
        let mut seen = std::collections::HashSet::new();
        groups.retain(|group| seen.insert(*group));
        let home = entry.map_or("/", |entry| entry.home);
        Ok(User { uid, gid, groups, home: if home.is_empty() { "/" } else { home }.to_owned() })
    }

    fn named(&self, name: &str) -> Result<Passwd<'_>, RuntimeError> {
        self.user(|other, _| other == name).ok_or_else(|| {
            RuntimeError::Invalid(format!("unable to find user {name}: no matching entries in passwd file"))
        })
    }
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Passwd<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or("") })
    }
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Self { name, gid, members: fields.next().unwrap_or("") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> UserFiles {
        UserFiles {
            passwd: "root:x:0:0:root:/root:/bin/sh\n#\nbroken\nweb:x:33:34:Web:/var/www:/bin/false\n".into(),
            group: "root:x:0:\nweb:x:34:\nextra:x:50:web,root\nmore:x:51: web\n".into(),
        }
    }

    fn resolve(context: LinuxContainerSecurityContext, image: &str) -> Result<User, RuntimeError> {
        files().resolve(&context, image)
    }

    #[test]
    fn the_image_decides_when_the_pod_does_not() {
        let root = resolve(LinuxContainerSecurityContext::default(), "").unwrap();
        assert_eq!((root.uid, root.gid, root.groups, root.home.as_str()), (0, 0, vec![0, 50], "/root"));
        let web = resolve(LinuxContainerSecurityContext::default(), "web").unwrap();
        assert_eq!((web.uid, web.gid, web.groups), (33, 34, vec![34, 50, 51]));
        let mixed = resolve(LinuxContainerSecurityContext::default(), "33:extra").unwrap();
        assert_eq!((mixed.uid, mixed.gid), (33, 50));
        let stranger = resolve(LinuxContainerSecurityContext::default(), "1000:1001").unwrap();
        assert_eq!(
            (stranger.uid, stranger.gid, stranger.groups, stranger.home.as_str()),
            (1000, 1001, vec![1001], "/")
        );
    }

    #[test]
    fn the_pod_wins() {
        let context = LinuxContainerSecurityContext {
            run_as_user: Some(33),
            supplemental_groups: vec![7, 34],
            ..Default::default()
        };
        assert_eq!(resolve(context.clone(), "root:root").unwrap().groups, [34, 50, 51, 7]);
        let strict = LinuxContainerSecurityContext {
            run_as_group: Some(9),
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict,
            ..context
        };
        let user = resolve(strict, "").unwrap();
        assert_eq!((user.uid, user.gid, user.groups), (33, 9, vec![9, 7, 34]));
    }

    #[test]
    fn unknown_names_and_bad_numbers_are_refused() {
        assert!(resolve(LinuxContainerSecurityContext::default(), "ghost").is_err());
        assert!(resolve(LinuxContainerSecurityContext::default(), "web:ghost").is_err());
        let context = LinuxContainerSecurityContext { run_as_user: Some(-1), ..Default::default() };
        assert!(resolve(context, "").is_err());
    }
}
