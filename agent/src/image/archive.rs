//! Image archives: an OCI layout or what `docker save` writes, in a tar that may be compressed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{ImageError, ImageResult, Reference};

/// Largest manifest, index or configuration.
const MAX_JSON: u64 = 8 << 20;

/// An image found in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedImage {
    /// Normalised `name:tag`s.
    pub names: Vec<String>,
    /// Digest of its manifest (OCI layouts only).
    pub manifest: Option<String>,
    /// The configuration as it is; its digest is the image's id.
    pub config: Vec<u8>,
    /// Entries of the archive, lowest layer first.
    pub layers: Vec<String>,
}

/// A tar whose entries can be read in any order.
pub struct Archive {
    path: PathBuf,
    file: File,
    /// Offset and length of each file's data.
    entries: HashMap<String, (u64, u64)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    annotations: HashMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

/// An image index or manifest: which of the fields are there tells.
#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Archive {
    /// Opens an archive; a compressed one is first unpacked to a nameless file in `scratch`.
    pub fn open(path: &Path, scratch: &Path) -> ImageResult<Self> {
        let io_error = |source| ImageError::Io { what: format!("read {}", path.display()), source };
        let mut file = File::open(path).map_err(io_error)?;
        if compression(&file).map_err(io_error)? != Compression::None {
            let temporary = scratch.join(format!("archive-{:016x}", rand::random::<u64>()));
            let mut plain =
                File::options().read(true).write(true).create_new(true).open(&temporary).map_err(io_error)?;
            let _ = fs::remove_file(&temporary);
            io::copy(&mut decompressed(file).map_err(io_error)?, &mut plain)
                .map_err(|error| damaged(path, format!("cannot be decompressed: {error}")))?;
            file = plain;
        }
        let mut archive = Self { path: path.to_owned(), file, entries: HashMap::new() };
        archive.scan().map_err(|error| damaged(path, format!("not a readable tar archive: {error}")))?;
        Ok(archive)
    }

    fn scan(&mut self) -> io::Result<()> {
        let mut reader = self.file.try_clone()?;
        let length = reader.seek(SeekFrom::End(0))?;
        reader.rewind()?;
        let mut tar = tar::Archive::new(reader);
        let mut links = Vec::new();
        for entry in tar.entries_with_seek()? {
            let entry = entry?;
            let name = clean(&entry.path()?);
            match entry.header().entry_type() {
                tar::EntryType::Regular | tar::EntryType::Continuous => {
                    let (start, size) = (entry.raw_file_position(), entry.size());
                    if start + size > length {
                        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{name} is cut off")));
                    }
                    self.entries.insert(name, (start, size));
                }
                // `docker save` stores a layer that several images share once and links to it.
                tar::EntryType::Symlink | tar::EntryType::Link => {
                    if let Some(target) = entry.link_name()? {
                        let relative = Path::new(&name).parent().map(|folder| clean(&folder.join(&target)));
                        links.push((name, clean(&target), relative));
                    }
                }
                _ => {}
            }
        }
        for (name, absolute, relative) in links {
            let found = relative.and_then(|path| self.entries.get(&path)).or_else(|| self.entries.get(&absolute));
            if let Some(place) = found.copied() {
                self.entries.insert(name, place);
            }
        }
        Ok(())
    }

    /// Every image in the archive.
    pub fn images(&self) -> ImageResult<Vec<ArchivedImage>> {
        let images = if self.entries.contains_key("index.json") {
            self.oci_images()?
        } else if self.entries.contains_key("manifest.json") {
            self.docker_images()?
        } else {
            return Err(damaged(&self.path, "neither index.json (OCI layout) nor manifest.json (docker save) in it"));
        };
        if images.is_empty() {
            return Err(damaged(&self.path, format!("no image for linux/{} in it", architecture())));
        }
        Ok(images)
    }

    fn oci_images(&self) -> ImageResult<Vec<ArchivedImage>> {
        let index: Manifest = self.json("index.json")?;
        // An archive that is both kinds at once may have its names only in docker's part.
        let docker: Vec<DockerImage> =
            if self.entries.contains_key("manifest.json") { self.json("manifest.json")? } else { Vec::new() };
        let mut images: Vec<ArchivedImage> = Vec::new();
        for descriptor in &index.manifests {
            let mut names = annotated_name(descriptor).into_iter().collect::<Vec<_>>();
            let Some((digest, manifest)) = self.choose(descriptor, 0)? else { continue };
            let config = manifest.config.as_ref().ok_or_else(|| damaged(&self.path, "a manifest without config"))?;
            if names.is_empty() {
                let path = blob(&config.digest);
                let same = docker.iter().filter(|image| clean(Path::new(&image.config)) == path);
                names.extend(same.flat_map(|image| image.repo_tags.iter().flatten().cloned()));
            }
            let names = normalise_names(names)?;
            if let Some(known) = images.iter_mut().find(|image| image.manifest.as_ref() == Some(&digest)) {
                known.names.extend(names);
                continue;
            }
            images.push(ArchivedImage {
                names,
                config: self.verified(&config.digest)?,
                layers: manifest.layers.iter().map(|layer| blob(&layer.digest)).collect(),
                manifest: Some(digest),
            });
        }
        Ok(images)
    }

    /// Follows indexes to the manifest for this machine.
    fn choose(&self, descriptor: &Descriptor, depth: u8) -> ImageResult<Option<(String, Manifest)>> {
        let fits = descriptor.platform.as_ref().is_none_or(|platform| {
            (platform.os.is_empty() || platform.os == "linux")
                && (platform.architecture.is_empty() || platform.architecture == architecture())
        });
        // An archive for one platform may leave out the others' blobs.
        if !fits || depth > 4 || (depth > 0 && !self.entries.contains_key(&blob(&descriptor.digest))) {
            return Ok(None);
        }
        let text = self.verified(&descriptor.digest)?;
        let manifest: Manifest = parse(&self.path, &descriptor.digest, &text)?;
        if manifest.config.is_some() && manifest.manifests.is_empty() {
            let artifact = descriptor.media_type.contains("in-toto");
            return Ok((!artifact).then(|| (descriptor.digest.clone(), manifest)));
        }
        for inner in &manifest.manifests {
            if let Some(found) = self.choose(inner, depth + 1)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn docker_images(&self) -> ImageResult<Vec<ArchivedImage>> {
        let images: Vec<DockerImage> = self.json("manifest.json")?;
        images
            .into_iter()
            .map(|image| {
                Ok(ArchivedImage {
                    names: normalise_names(image.repo_tags.unwrap_or_default())?,
                    manifest: None,
                    config: self.bytes(&clean(Path::new(&image.config)))?,
                    layers: image.layers.iter().map(|layer| clean(Path::new(layer))).collect(),
                })
            })
            .collect()
    }

    /// The uncompressed tar stream of a layer.
    pub fn layer(&self, name: &str) -> ImageResult<Box<dyn Read>> {
        let (start, length) = self.place(name)?;
        let io_error = |source| ImageError::Io { what: format!("read {name} of {}", self.path.display()), source };
        let file = self.file.try_clone().map_err(io_error)?;
        let section = Section { file, position: start, end: start + length };
        let mut magic = [0; 4];
        let read = self.file.read_at(&mut magic[..length.min(4) as usize], start).map_err(io_error)?;
        decoder(Compression::of(&magic[..read]), section).map_err(io_error)
    }

    fn place(&self, name: &str) -> ImageResult<(u64, u64)> {
        self.entries.get(name).copied().ok_or_else(|| damaged(&self.path, format!("{name} is missing")))
    }

    fn bytes(&self, name: &str) -> ImageResult<Vec<u8>> {
        let (start, length) = self.place(name)?;
        if length > MAX_JSON {
            return Err(damaged(&self.path, format!("{name} is too large")));
        }
        let mut bytes = vec![0; length as usize];
        self.file
            .read_exact_at(&mut bytes, start)
            .map_err(|source| ImageError::Io { what: format!("read {name} of {}", self.path.display()), source })?;
        Ok(bytes)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> ImageResult<T> {
        parse(&self.path, name, &self.bytes(name)?)
    }

    /// A blob whose content has the digest it is named by.
    fn verified(&self, digest: &str) -> ImageResult<Vec<u8>> {
        let bytes = self.bytes(&blob(digest))?;
        let found = digest_of(&bytes);
        if found != digest {
            return Err(damaged(&self.path, format!("blob {digest} has the content of {found}")));
        }
        Ok(bytes)
    }
}

/// `sha256:…` of the bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

/// This machine's architecture in the words of image manifests.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, name: &str, text: &[u8]) -> ImageResult<T> {
    serde_json::from_slice(text).map_err(|error| damaged(path, format!("{name} cannot be understood: {error}")))
}

fn annotated_name(descriptor: &Descriptor) -> Option<String> {
    // containerd writes the full name; the OCI annotation may hold just a tag, which names nothing.
    let full = descriptor.annotations.get("io.containerd.image.name");
    let reference = descriptor.annotations.get("org.opencontainers.image.ref.name");
    full.or_else(|| reference.filter(|name| name.contains(['/', ':']))).cloned()
}

fn normalise_names(names: Vec<String>) -> ImageResult<Vec<String>> {
    names.iter().map(|name| Ok(Reference::parse(name)?.tagged())).filter_map(Result::transpose).collect()
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

fn clean(path: &Path) -> String {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => parts.push(name),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/")
}

fn damaged(path: &Path, why: impl Into<String>) -> ImageError {
    ImageError::Damaged { what: path.display().to_string(), why: why.into() }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(magic: &[u8]) -> Self {
        match magic {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

fn compression(file: &File) -> io::Result<Compression> {
    let mut magic = [0; 4];
    let length = file.read_at(&mut magic, 0)?;
    Ok(Compression::of(&magic[..length]))
}

fn decompressed(file: File) -> io::Result<Box<dyn Read>> {
    let kind = compression(&file)?;
    decoder(kind, file)
}

fn decoder(kind: Compression, source: impl Read + 'static) -> io::Result<Box<dyn Read>> {
    let source = BufReader::with_capacity(64 * 1024, source);
    Ok(match kind {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(source)?),
    })
}

/// A part of a file; reading does not move the file's own position, which other readers share.
struct Section {
    file: File,
    position: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(usize::try_from(self.end - self.position).unwrap_or(usize::MAX));
        let length = self.file.read_at(&mut buffer[..room], self.position)?;
        self.position += length as u64;
        Ok(length)
    }
}
