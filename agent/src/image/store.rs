//! The images on this node: configurations and unpacked layers by digest, names in one index file.
//!
//! ```text
//! images-store/index.json      names, configurations, layers; replaced by rename
//!              layers/<hex>/   one unpacked layer each (name: first 32 digits of its diff id)
//!              ingest/         what is being unpacked; emptied at start
//!              lock            held while the index is read and written: several processes may use the store
//!              agent.lock      held by the agent, which alone knows what running containers need
//! ```
//! A layer is complete when its folder has its final name; the index names it only after it is on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::archive::{Archive, ArchivedImage, architecture, digest_of};
use super::config::parse_config;
use super::reference::{is_digest, is_identifier};
use super::{Image, ImageError, ImageResult, Imported, PullPolicy, Reference, unpack};

/// Images under this name are made from the program itself.
pub const BUILTIN_PREFIX: &str = "coracle.local/";

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) image: Image,
    /// Diff ids, lowest first.
    layers: Vec<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Index {
    pub(super) images: BTreeMap<String, Stored>,
    /// Bytes of each unpacked layer by diff id.
    layers: BTreeMap<String, u64>,
}

/// The store. Its calls block; [`super::Images`] is the asynchronous face.
pub struct ImageStore {
    folder: PathBuf,
    /// The index as last read, with the inode and time it was read from.
    index: Mutex<(Index, (u64, i64))>,
    /// Which image each container uses.
    held: Mutex<HashMap<String, String>>,
    /// Only one import unpacks at a time.
    importing: Mutex<()>,
    /// Whether this process may delete layers.
    owner: Option<Flock<File>>,
}

impl ImageStore {
    /// Opens the store in `folder`, made when missing. `agent` claims it for the process that runs containers.
    pub fn open(folder: &Path, agent: bool) -> ImageResult<Self> {
        for part in ["layers", "ingest"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(|source| failed(format!("create {}", path.display()), source))?;
        }
        // Without an agent, whoever opens the store may tidy it.
        let claim = open_lock(&folder.join("agent.lock"))?;
        let owner = match Flock::lock(claim, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Some(lock),
            Err((_, errno)) if agent => {
                return Err(failed("another agent uses the image store".to_owned(), errno.into()));
            }
            Err(_) => None,
        };
        let store = Self {
            folder: folder.to_owned(),
            index: Mutex::default(),
            held: Mutex::default(),
            importing: Mutex::default(),
            owner,
        };
        if store.owner.is_some() {
            store.recover()?;
        }
        Ok(store)
    }

    /// After a crash: drops half-unpacked layers and images whose layers are gone.
    fn recover(&self) -> ImageResult<()> {
        let ingest = self.folder.join("ingest");
        for entry in fs::read_dir(&ingest).into_iter().flatten().flatten() {
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
        self.change(|index| {
            index.layers.retain(|diff_id, _| self.layer_path(diff_id).is_dir());
            let layers = &index.layers;
            index.images.retain(|id, stored| {
                let whole = stored.layers.iter().all(|layer| layers.contains_key(layer));
                if !whole {
                    tracing::warn!(image = %id, "image has lost a layer and is dropped");
                }
                whole
            });
            Ok(())
        })
    }

    pub fn list(&self) -> ImageResult<Vec<Image>> {
        self.read(|index| index.images.values().map(|stored| stored.image.clone()).collect())
    }

    /// Looks up a name, a digest reference, an id or the start of one.
    pub fn find(&self, reference: &str) -> ImageResult<Option<Image>> {
        self.read(|index| find(index, reference).map(|stored| stored.image.clone()))
    }

    /// Makes sure that the image is there.
    pub fn resolve(&self, reference: &str, policy: PullPolicy) -> ImageResult<Image> {
        let parsed =
            if is_identifier(reference) || is_digest(reference) { None } else { Some(Reference::parse(reference)?) };
        if let Some(image) = self.find(reference)? {
            return Ok(image);
        }
        if parsed.is_some_and(|name| name.name.starts_with(BUILTIN_PREFIX)) {
            let why = "this program has no such built-in image; coracle.local/hello is one".to_owned();
            return Err(ImageError::Pull { image: reference.to_owned(), why });
        }
        match policy {
            PullPolicy::Never => Err(ImageError::NeverPull { image: reference.to_owned() }),
            PullPolicy::Always | PullPolicy::IfNotPresent => {
                let why = "it is not on this node, and this version does not fetch from registries: put its archive \
                           into the images folder of the agent's data, or use `coracle images import`"
                    .to_owned();
                Err(ImageError::Pull { image: reference.to_owned(), why })
            }
        }
    }

    /// Imports every image of an archive.
    pub fn import(&self, path: &Path) -> ImageResult<Imported> {
        let _one = self.importing.lock();
        let archive = Archive::open(path, &self.folder.join("ingest"))?;
        let mut names = Vec::new();
        for image in archive.images()? {
            let shown = if image.names.is_empty() { vec![digest_of(&image.config)] } else { image.names.clone() };
            self.add(image, |layer| archive.layer(layer), path, false)?;
            names.extend(shown);
        }
        Ok(Imported { archive: path.to_owned(), names })
    }

    /// Adds one image whose layers `open` reads.
    pub(super) fn add(
        &self,
        image: ArchivedImage,
        open: impl Fn(&str) -> ImageResult<Box<dyn Read>>,
        from: &Path,
        pinned: bool,
    ) -> ImageResult<String> {
        let damaged = |why: String| ImageError::Damaged { what: from.display().to_string(), why };
        let id = digest_of(&image.config);
        let parsed = parse_config(&image.config).map_err(|error| damaged(format!("configuration {id}: {error}")))?;
        if !parsed.architecture.is_empty() && parsed.architecture != architecture() {
            let shown = image.names.first().unwrap_or(&id);
            return Err(damaged(format!("{shown} is for {}, this machine is {}", parsed.architecture, architecture())));
        }
        if parsed.diff_ids.len() != image.layers.len() {
            let counts = format!("{} layers, its configuration {}", image.layers.len(), parsed.diff_ids.len());
            return Err(damaged(format!("image {id} has {counts}")));
        }
        let mut sizes = BTreeMap::new();
        for (diff_id, layer) in parsed.diff_ids.iter().zip(&image.layers) {
            let known = self.read(|index| index.layers.get(diff_id).copied())?;
            let size = match known {
                Some(size) if self.layer_path(diff_id).is_dir() => size,
                _ => self.unpack_layer(diff_id, open(layer)?, from)?,
            };
            sizes.insert(diff_id.clone(), size);
        }
        let stored = Stored {
            image: Image {
                id: id.clone(),
                repo_tags: image.names.clone(),
                repo_digests: digests(&image),
                size: parsed.diff_ids.iter().collect::<BTreeSet<_>>().iter().filter_map(|id| sizes.get(*id)).sum(),
                pinned,
                config: parsed.config,
            },
            layers: parsed.diff_ids,
        };
        self.change(move |index| {
            index.layers.extend(sizes);
            insert(index, stored);
            Ok(())
        })?;
        Ok(id)
    }

    fn unpack_layer(&self, diff_id: &str, stream: Box<dyn Read>, from: &Path) -> ImageResult<u64> {
        let damaged = |why: String| ImageError::Damaged { what: from.display().to_string(), why };
        if !is_digest(diff_id) {
            return Err(damaged(format!("layer {diff_id:?} is not named by a sha256 digest")));
        }
        let target = self.layer_path(diff_id);
        let work = self.folder.join("ingest").join(format!("{:016x}", rand::random::<u64>()));
        let result = (|| {
            fs::create_dir(&work).map_err(|source| failed(format!("create {}", work.display()), source))?;
            let mut hashed = Hashed { inner: stream, hash: Sha256::new() };
            let size = unpack::unpack(&mut hashed, &work).map_err(|error| match error.raw_os_error() {
                Some(_) => failed(format!("unpack layer {diff_id}"), error),
                None => damaged(format!("layer {diff_id} does not unpack: {error}")),
            })?;
            io::copy(&mut hashed, &mut io::sink()).map_err(|error| damaged(format!("layer {diff_id}: {error}")))?;
            let found = format!("sha256:{:x}", hashed.hash.finalize());
            if found != diff_id {
                return Err(damaged(format!("layer {diff_id} has the content of {found}")));
            }
            sync_filesystem(&work).map_err(|source| failed("write the layer to disk".to_owned(), source))?;
            let _ = fs::remove_dir_all(&target);
            fs::rename(&work, &target).map_err(|source| failed(format!("move layer {diff_id}"), source))?;
            Ok(size)
        })();
        if result.is_err() {
            let _ = fs::remove_dir_all(&work);
        }
        result
    }

    /// Removes a name, or by id the whole image.
    pub fn remove(&self, reference: &str) -> ImageResult<()> {
        self.change(|index| {
            let id = find(index, reference)
                .map(|stored| stored.image.id.clone())
                .ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
            let Some(stored) = index.images.get_mut(&id) else { return Ok(()) };
            if stored.image.pinned {
                let why = "it is part of the program".to_owned();
                return Err(ImageError::Damaged { what: format!("cannot remove {reference}"), why });
            }
            let name = Reference::parse(reference).ok().and_then(|name| name.digested().or_else(|| name.tagged()));
            let named = |list: &[String]| name.as_ref().is_some_and(|name| list.contains(name));
            if named(&stored.image.repo_tags) && stored.image.repo_tags.len() > 1 {
                stored.image.repo_tags.retain(|tag| Some(tag) != name.as_ref());
                return Ok(());
            }
            index.images.remove(&id);
            Ok(())
        })?;
        self.sweep()
    }

    /// Deletes the layers that neither an image nor a container uses. Only the agent knows the containers; other
    /// processes leave it to the agent.
    pub fn sweep(&self) -> ImageResult<()> {
        if self.owner.is_none() {
            return Ok(());
        }
        let held: BTreeSet<String> = self.held_layers();
        let doomed = self.change(|index| {
            let used: BTreeSet<&String> = index.images.values().flat_map(|stored| &stored.layers).collect();
            let doomed: Vec<String> = index
                .layers
                .keys()
                .filter(|layer| !used.contains(layer) && !held.contains(&short(layer)))
                .cloned()
                .collect();
            for layer in &doomed {
                index.layers.remove(layer);
            }
            Ok(doomed)
        })?;
        for layer in doomed {
            let path = self.layer_path(&layer);
            let trash = self.folder.join("ingest").join(format!("trash-{}", short(&layer)));
            if fs::rename(&path, &trash).is_ok() {
                fs::remove_dir_all(&trash).map_err(|source| failed(format!("remove layer {layer}"), source))?;
            }
        }
        Ok(())
    }

    fn held_layers(&self) -> BTreeSet<String> {
        self.held.lock().values().flat_map(|layers| layers.split(':').map(str::to_owned)).collect()
    }

    /// Mounts a container's root filesystem: the image's layers below a writable folder of its own.
    ///
    /// `writable` gets the folders `upper` and `work`. The layers stay until [`ImageStore::release`].
    pub fn mount_rootfs(&self, image: &str, container: &str, writable: &Path, target: &Path) -> ImageResult<()> {
        let layers = self.hold(image, container)?;
        let result = self.mount_layers(&layers, writable, target);
        if result.is_err() {
            self.release(container);
        }
        result
    }

    /// Keeps the layers of an image for a container.
    pub fn hold(&self, image: &str, container: &str) -> ImageResult<Vec<String>> {
        let layers: Vec<String> = self
            .read(|index| find(index, image).map(|stored| stored.layers.iter().map(|layer| short(layer)).collect()))?
            .ok_or_else(|| ImageError::NotFound(image.to_owned()))?;
        self.held.lock().insert(container.to_owned(), layers.join(":"));
        Ok(layers)
    }

    /// Tells that a container that is found running uses these layers, see [`ImageStore::held_by`].
    pub fn hold_layers(&self, container: &str, layers: &str) {
        self.held.lock().insert(container.to_owned(), layers.to_owned());
    }

    /// What [`ImageStore::hold_layers`] needs after a restart.
    pub fn held_by(&self, container: &str) -> Option<String> {
        self.held.lock().get(container).cloned()
    }

    pub fn release(&self, container: &str) {
        self.held.lock().remove(container);
    }

    fn mount_layers(&self, layers: &[String], writable: &Path, target: &Path) -> ImageResult<()> {
        let io_error = |what: &'static str| move |source| failed(what.to_owned(), source);
        for folder in [writable.join("upper"), writable.join("work"), target.to_owned()] {
            fs::create_dir_all(&folder).map_err(io_error("create the container's folders"))?;
        }
        // The mount options must fit a page: descriptors are shorter than paths, whatever the data directory.
        let mut lower = Vec::new();
        for layer in layers.iter().rev() {
            let path = self.folder.join("layers").join(layer);
            lower.push(OwnedFd::from(File::open(path).map_err(io_error("open a layer"))?));
        }
        if lower.is_empty() {
            let empty = writable.join("empty");
            fs::create_dir_all(&empty).map_err(io_error("create the container's folders"))?;
            lower.push(File::open(empty).map_err(io_error("open a layer"))?.into());
        }
        let upper = File::open(writable.join("upper")).map_err(io_error("open the writable layer"))?;
        let work = File::open(writable.join("work")).map_err(io_error("open the writable layer"))?;
        let path = |fd: i32| format!("/proc/self/fd/{fd}");
        let lower_paths: Vec<String> = lower.iter().map(|fd| path(fd.as_raw_fd())).collect();
        let (upper, work) = (path(upper.as_raw_fd()), path(work.as_raw_fd()));
        let options = format!("lowerdir={},upperdir={upper},workdir={work}", lower_paths.join(":"));
        // `volatile`: what a container wrote to its own layer need not survive a power cut, so unmounting never waits
        // for the disk. Kernels before 5.10 do not know it.
        let volatile = format!("{options},volatile");
        let attempt = |options: &str| mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options));
        attempt(&volatile)
            .or_else(|_| attempt(&options))
            .map_err(|errno| failed("mount the container's root filesystem".to_owned(), errno.into()))
    }

    fn layer_path(&self, diff_id: &str) -> PathBuf {
        self.folder.join("layers").join(short(diff_id))
    }

    fn read<T>(&self, work: impl FnOnce(&Index) -> T) -> ImageResult<T> {
        let mut index = self.index.lock();
        self.refresh(&mut index)?;
        Ok(work(&index.0))
    }

    /// Changes the index under the lock of all processes; nothing changes when `work` fails.
    pub(super) fn change<T>(&self, work: impl FnOnce(&mut Index) -> ImageResult<T>) -> ImageResult<T> {
        let mut index = self.index.lock();
        let lock = open_lock(&self.folder.join("lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock the image store".to_owned(), errno.into()))?;
        self.refresh(&mut index)?;
        let before = serde_json::to_vec(&index.0).unwrap_or_default();
        let mut next = index.0.clone();
        let result = work(&mut next)?;
        let after = serde_json::to_vec(&next).map_err(|error| failed("write the index".to_owned(), error.into()))?;
        if before != after {
            let path = self.folder.join("index.json");
            replace(&path, &after).map_err(|source| failed("write the image index".to_owned(), source))?;
            *index = (next, stamp(&path));
        }
        Ok(result)
    }

    fn refresh(&self, index: &mut (Index, (u64, i64))) -> ImageResult<()> {
        let path = self.folder.join("index.json");
        let now = stamp(&path);
        if now == index.1 {
            return Ok(());
        }
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(failed("read the image index".to_owned(), source)),
        };
        index.0 = serde_json::from_slice(&text).map_err(|error| ImageError::Damaged {
            what: path.display().to_string(),
            why: format!("{error}; move it away to start with an empty store"),
        })?;
        index.1 = now;
        Ok(())
    }
}

fn find<'a>(index: &'a Index, reference: &str) -> Option<&'a Stored> {
    let bare = reference.strip_prefix("sha256:").unwrap_or(reference);
    if bare.len() >= 12 && bare.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let wanted = format!("sha256:{bare}");
        let mut fitting = index.images.range(wanted.clone()..).take_while(|(id, _)| id.starts_with(&wanted));
        if let (Some((_, stored)), None) = (fitting.next(), fitting.next()) {
            return Some(stored);
        }
    }
    let name = Reference::parse(reference).ok()?;
    if let Some(digest) = name.digested() {
        return index.images.values().find(|stored| stored.image.repo_digests.contains(&digest));
    }
    let tag = name.tagged()?;
    index.images.values().find(|stored| stored.image.repo_tags.contains(&tag))
}

/// A name belongs to one image: the newest takes it.
fn insert(index: &mut Index, mut stored: Stored) {
    for other in index.images.values_mut() {
        other.image.repo_tags.retain(|tag| !stored.image.repo_tags.contains(tag));
    }
    if let Some(known) = index.images.get(&stored.image.id) {
        let (tags, digests) = (&mut stored.image.repo_tags, &mut stored.image.repo_digests);
        for (list, old) in [(tags, &known.image.repo_tags), (digests, &known.image.repo_digests)] {
            for name in old {
                if !list.contains(name) {
                    list.push(name.clone());
                }
            }
        }
    }
    index.images.insert(stored.image.id.clone(), stored);
}

fn digests(image: &ArchivedImage) -> Vec<String> {
    let Some(manifest) = &image.manifest else { return Vec::new() };
    let names: BTreeSet<&str> =
        image.names.iter().filter_map(|name| name.rsplit_once(':').map(|(repository, _)| repository)).collect();
    names.into_iter().map(|name| format!("{name}@{manifest}")).collect()
}

fn short(diff_id: &str) -> String {
    diff_id.trim_start_matches("sha256:").chars().take(32).collect()
}

fn stamp(path: &Path) -> (u64, i64) {
    fs::metadata(path).map_or((0, 0), |data| (data.ino(), data.mtime_nsec() ^ data.mtime().rotate_left(30)))
}

fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn sync_filesystem(folder: &Path) -> io::Result<()> {
    let folder = File::open(folder)?;
    // SAFETY: syncfs(2) on an open descriptor.
    if unsafe { libc::syncfs(folder.as_raw_fd()) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open_lock(path: &Path) -> ImageResult<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|source| failed(format!("open {}", path.display()), source))
}

fn failed(what: String, source: io::Error) -> ImageError {
    ImageError::Io { what, source }
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
