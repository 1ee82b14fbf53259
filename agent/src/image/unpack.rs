//! Unpacking one layer into a folder of its own, as overlayfs wants it.
//!
//! Every path is resolved by `openat2(2)` with `RESOLVE_IN_ROOT`: whatever symbolic links a layer contains, nothing is
//! read or written outside of the folder. Whiteouts become the character device 0:0, opaque folders the attribute
//! `trusted.overlay.opaque` (image-spec, "Layer filesystem changeset"; Documentation/filesystems/overlayfs).

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, makedev};
use tar::{Archive, Entry, EntryType};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks the tar stream into `root`, an existing empty folder. Answers the bytes of all files.
pub fn unpack(layer: impl Read, root: &Path) -> io::Result<u64> {
    let root = open_folder(root)?;
    let mut archive = Archive::new(layer);
    let mut folders = Vec::new();
    let mut size = 0;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        size += entry.header().size().unwrap_or(0);
        place(&root, &mut entry, &path, &mut folders)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    }
    // Making what is inside changes a folder's time, so the times come last.
    for (path, time) in folders.into_iter().rev() {
        let folder = resolve(&root, &path, libc::O_DIRECTORY | libc::O_RDONLY)?;
        set_time(&folder, time)?;
    }
    Ok(size)
}

fn place<R: Read>(
    root: &OwnedFd,
    entry: &mut Entry<'_, R>,
    path: &Path,
    folders: &mut Vec<(PathBuf, u64)>,
) -> io::Result<()> {
    let Some(clean) = normalise(path)? else {
        // The root itself: only its attributes matter.
        if entry.header().entry_type().is_dir() {
            apply_owner_and_mode(root, entry)?;
        }
        return Ok(());
    };
    let (Some(parent_path), Some(name)) = (clean.parent(), clean.file_name()) else {
        return Err(invalid("no file name"));
    };
    if matches!(entry.header().entry_type(), EntryType::XGlobalHeader) {
        return Ok(());
    }
    let parent = make_folders(root, parent_path)?;
    if name.as_bytes() == OPAQUE {
        return set_attribute(&parent, "trusted.overlay.opaque", b"y");
    }
    if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(invalid("a whiteout without a name"));
        }
        let hidden = OsStr::from_bytes(hidden);
        remove(&parent, hidden)?;
        return make_node(&parent, hidden, SFlag::S_IFCHR, 0, 0);
    }
    let kind = entry.header().entry_type();
    if !(kind.is_dir() && is_folder(&parent, name)) {
        remove(&parent, name)?;
    }
    match kind {
        EntryType::Directory => {
            make_folder(&parent, name)?;
            folders.push((clean.clone(), entry.header().mtime().unwrap_or(0)));
            let folder = open_at(&parent, name, libc::O_DIRECTORY | libc::O_RDONLY | libc::O_NOFOLLOW, 0)?;
            apply_owner_and_mode(&folder, entry)
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            let mut file = File::from(open_at(&parent, name, flags, 0o600)?);
            io::copy(entry, &mut file)?;
            let file = OwnedFd::from(file);
            apply_owner_and_mode(&file, entry)?;
            set_time(&file, entry.header().mtime().unwrap_or(0))
        }
        EntryType::Symlink => {
            let target = entry.link_name()?.ok_or_else(|| invalid("a symbolic link without target"))?;
            nix::unistd::symlinkat(target.as_os_str(), &parent, name)?;
            change_owner(&parent, name, entry)
        }
        EntryType::Link => {
            let target = entry.link_name()?.ok_or_else(|| invalid("a hard link without target"))?;
            let target = normalise(&target)?.ok_or_else(|| invalid("a hard link to the root"))?;
            let (Some(folder), Some(file)) = (target.parent(), target.file_name()) else {
                return Err(invalid("a hard link without target"));
            };
            let folder = resolve(root, folder, libc::O_DIRECTORY | libc::O_PATH)?;
            nix::unistd::linkat(&folder, file, &parent, name, nix::fcntl::AtFlags::empty())?;
            Ok(())
        }
        EntryType::Char | EntryType::Block | EntryType::Fifo => {
            let header = entry.header();
            let flag = match kind {
                EntryType::Char => SFlag::S_IFCHR,
                EntryType::Block => SFlag::S_IFBLK,
                _ => SFlag::S_IFIFO,
            };
            let (major, minor) = (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
            make_node(&parent, name, flag, major, minor)?;
            change_owner(&parent, name, entry)?;
            let mode = Mode::from_bits_truncate(entry.header().mode()? & 0o7777);
            let flags = nix::sys::stat::FchmodatFlags::FollowSymlink;
            Ok(nix::sys::stat::fchmodat(&parent, name, mode, flags)?)
        }
        _ => Ok(()),
    }
}

/// The path without root, `.` and empty parts; `None` for the root itself. `..` is refused.
fn normalise(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(invalid("the path leaves the layer")),
        }
    }
    Ok((!clean.as_os_str().is_empty()).then_some(clean))
}

/// Opens the folder, making what is missing on the way.
fn make_folders(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    if path.as_os_str().is_empty() {
        return root.try_clone();
    }
    match resolve(root, path, libc::O_DIRECTORY | libc::O_RDONLY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Err(invalid("no parent")) };
    let parent = make_folders(root, above)?;
    make_folder(&parent, name)?;
    resolve(root, path, libc::O_DIRECTORY | libc::O_RDONLY)
}

/// Opens a path with `root` as `/`.
pub fn resolve(root: &OwnedFd, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: open_how is plain numbers, zero is valid for each.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    loop {
        // SAFETY: path and how outlive the call; the result is a new descriptor.
        let fd = unsafe {
            libc::syscall(libc::SYS_openat2, root.as_raw_fd(), path.as_ptr(), &how, size_of::<libc::open_how>()) as i32
        };
        if fd >= 0 {
            // SAFETY: just opened, owned by nobody else.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let error = io::Error::last_os_error();
        // EAGAIN: something was renamed meanwhile (openat2(2)).
        if error.raw_os_error() != Some(libc::EAGAIN) {
            return Err(error);
        }
    }
}

/// Opens a folder of the node to resolve paths in.
pub fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(AT_FDCWD, path, flags, Mode::empty())?)
}

fn open_at(folder: &OwnedFd, name: &OsStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
    Ok(nix::fcntl::openat(folder, name, flags, Mode::from_bits_truncate(mode))?)
}

fn is_folder(parent: &OwnedFd, name: &OsStr) -> bool {
    nix::sys::stat::fstatat(parent, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
}

fn make_folder(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match nix::sys::stat::mkdirat(parent, name, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn make_node(parent: &OwnedFd, name: &OsStr, kind: SFlag, major: u32, minor: u32) -> io::Result<()> {
    let device = makedev(u64::from(major), u64::from(minor));
    Ok(nix::sys::stat::mknodat(parent, name, kind, Mode::from_bits_truncate(0o600), device)?)
}

/// Removes whatever has that name.
fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match nix::unistd::unlinkat(parent, name, nix::unistd::UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(nix::Error::ENOENT) => Ok(()),
        Err(nix::Error::EISDIR | nix::Error::EPERM) => remove_folder(parent, name),
        Err(errno) => Err(errno.into()),
    }
}

fn remove_folder(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let flags = nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_CLOEXEC;
    let mut folder = nix::dir::Dir::openat(parent, name, flags, Mode::empty())?;
    let names: Vec<CString> = folder
        .iter()
        .map(|entry| Ok(entry?.file_name().to_owned()))
        .filter(|name: &io::Result<CString>| {
            name.as_ref().map_or(true, |n| n.as_bytes() != b"." && n.as_bytes() != b"..")
        })
        .collect::<io::Result<_>>()?;
    let inside = open_at(parent, name, libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_RDONLY, 0)?;
    for inner in names {
        remove(&inside, OsStr::from_bytes(inner.as_bytes()))?;
    }
    Ok(nix::unistd::unlinkat(parent, name, nix::unistd::UnlinkatFlags::RemoveDir)?)
}

fn apply_owner_and_mode<R: Read>(file: &OwnedFd, entry: &mut Entry<'_, R>) -> io::Result<()> {
    let (uid, gid, mode) = (entry.header().uid()?, entry.header().gid()?, entry.header().mode()?);
    let (uid, gid) = (narrow(uid)?, narrow(gid)?);
    nix::unistd::fchown(file, Some(uid.into()), Some(gid.into()))?;
    // After the owner, whose change clears the set-user-id bit; attributes last, for file capabilities go the same way.
    nix::sys::stat::fchmod(file, Mode::from_bits_truncate(mode & 0o7777))?;
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix("SCHILY.xattr.")) else { continue };
        // An archive must not speak overlayfs itself.
        if name.starts_with("trusted.overlay.") || name.starts_with("user.overlay.") {
            continue;
        }
        match set_attribute(file, name, extension.value_bytes()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => {}
            other => other?,
        }
    }
    Ok(())
}

fn change_owner<R: Read>(parent: &OwnedFd, name: &OsStr, entry: &Entry<'_, R>) -> io::Result<()> {
    let (uid, gid) = (narrow(entry.header().uid()?)?, narrow(entry.header().gid()?)?);
    let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
    Ok(nix::unistd::fchownat(parent, name, Some(uid.into()), Some(gid.into()), flags)?)
}

fn set_time(file: &OwnedFd, seconds: u64) -> io::Result<()> {
    let time = nix::sys::time::TimeSpec::new(seconds as i64, 0);
    Ok(nix::sys::stat::futimens(file, &time, &time)?)
}

fn set_attribute(file: &OwnedFd, name: &str, value: &[u8]) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: name and value outlive the call.
    let result = unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn narrow(id: u64) -> io::Result<u32> {
    id.try_into().map_err(|_| invalid("a user or group id is too large"))
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    use tar::{Builder, Header};

    struct Layer(Builder<Vec<u8>>);

    impl Layer {
        fn new() -> Self {
            Self(Builder::new(Vec::new()))
        }

        fn add(mut self, kind: EntryType, path: &str, link: &str, data: &[u8]) -> Self {
            let mut header = Header::new_gnu();
            // Written raw: the builder itself would refuse hostile paths.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(0o4755);
            header.set_uid(1000);
            header.set_gid(1001);
            header.set_mtime(1_000_000);
            header.set_size(data.len() as u64);
            header.set_cksum();
            self.0.append(&header, data).unwrap();
            self
        }

        fn unpack(self, root: &Path) -> io::Result<u64> {
            unpack(&self.0.into_inner().unwrap()[..], root)
        }
    }

    fn roots() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(folder.path().join("outside"), "safe").unwrap();
        (folder, root)
    }

    #[test]
    fn owners_modes_times_and_links_are_kept() {
        let (_keep, root) = roots();
        let size = Layer::new()
            .add(EntryType::Directory, "./d/", "", b"")
            .add(EntryType::Regular, "d/f", "", b"hello")
            .add(EntryType::Link, "d/g", "d/f", b"")
            .add(EntryType::Symlink, "s", "/d", b"")
            .add(EntryType::Regular, "s/through", "", b"x")
            .unpack(&root)
            .unwrap();
        assert_eq!(size, 6);
        let file = fs::metadata(root.join("d/f")).unwrap();
        assert_eq!((file.uid(), file.gid(), file.permissions().mode() & 0o7777), (1000, 1001, 0o4755));
        assert_eq!((file.mtime(), file.nlink()), (1_000_000, 2));
        assert_eq!(fs::metadata(root.join("d")).unwrap().mtime(), 1_000_000);
        assert!(root.join("d/through").exists(), "absolute links are relative to the layer's root");
    }

    #[test]
    fn whiteouts_and_opaque_folders_become_overlayfs_ones() {
        let (_keep, root) = roots();
        Layer::new()
            .add(EntryType::Regular, "a/.wh.gone", "", b"")
            .add(EntryType::Regular, "a/.wh..wh..opq", "", b"")
            .unpack(&root)
            .unwrap();
        let node = fs::metadata(root.join("a/gone")).unwrap();
        assert!(node.file_type().is_char_device() && node.rdev() == 0);
        let mut value = [0u8; 4];
        let path = CString::new(root.join("a").as_os_str().as_bytes()).unwrap();
        // SAFETY: the buffer is as long as said.
        let length = unsafe {
            libc::getxattr(path.as_ptr(), c"trusted.overlay.opaque".as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        assert_eq!((length, value[0]), (1, b'y'));
    }

    #[test]
    fn nothing_leaves_the_layer() {
        let (keep, root) = roots();
        assert!(Layer::new().add(EntryType::Regular, "../outside", "", b"bad").unpack(&root).is_err());
        let _ = Layer::new()
            .add(EntryType::Symlink, "up", "..", b"")
            .add(EntryType::Regular, "up/outside", "", b"bad")
            .unpack(&root);
        let _ = Layer::new()
            .add(EntryType::Symlink, "outside2", "../outside", b"")
            .add(EntryType::Regular, "outside2", "", b"bad")
            .unpack(&root);
        let _ = Layer::new().add(EntryType::Link, "hard", "../outside", b"").unpack(&root);
        assert!(
            Layer::new()
                .add(EntryType::Symlink, "e", "/etc", b"")
                .add(EntryType::Link, "p", "e/passwd", b"")
                .unpack(&root)
                .is_err()
        );
        assert_eq!(fs::read_to_string(keep.path().join("outside")).unwrap(), "safe");
        assert_eq!(fs::metadata(keep.path().join("outside")).unwrap().nlink(), 1);
    }

    #[test]
    fn later_entries_replace_earlier_ones() {
        let (_keep, root) = roots();
        Layer::new()
            .add(EntryType::Regular, "d/inner/file", "", b"1")
            .add(EntryType::Regular, "d", "", b"22")
            .add(EntryType::Symlink, "l", "d", b"")
            .add(EntryType::Directory, "l", "", b"")
            .unpack(&root)
            .unwrap();
        assert_eq!(fs::read_to_string(root.join("d")).unwrap(), "22");
        assert!(fs::symlink_metadata(root.join("l")).unwrap().is_dir());
    }

    #[test]
    fn a_cut_archive_is_an_error() {
        let (_keep, root) = roots();
        let whole = Layer::new().add(EntryType::Regular, "f", "", &[7; 4000]).0.into_inner().unwrap();
        assert!(unpack(&whole[..2000], &root).is_err());
    }
}
