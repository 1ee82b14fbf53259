use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;

/// A tar with files.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        tar.append_data(&mut header, path, *data).unwrap();
    }
    tar.into_inner().unwrap()
}

fn config_of(layers: &[&[u8]]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
    json!({"architecture": architecture(), "os": "linux", "config": {"Cmd": ["/x"], "Env": null},
           "rootfs": {"type": "layers", "diff_ids": ids}})
    .to_string()
    .into_bytes()
}

/// What `docker save` writes.
fn docker_archive(names: &[&str], layers: &[&[u8]]) -> Vec<u8> {
    let config = config_of(layers);
    let paths: Vec<String> = (0..layers.len()).map(|number| format!("{number}/layer.tar")).collect();
    let manifest = json!([{"Config": "c.json", "RepoTags": names, "Layers": paths}]).to_string();
    let mut files: Vec<(&str, &[u8])> = vec![("manifest.json", manifest.as_bytes()), ("c.json", &config)];
    files.extend(paths.iter().map(String::as_str).zip(layers.iter().copied()));
    tar_of(&files)
}

/// An OCI layout with one image per (name, layer), layers gzipped.
fn oci_archive(images: &[(&str, &[u8])]) -> Vec<u8> {
    let mut blobs: Vec<(String, Vec<u8>)> = Vec::new();
    let mut put = |bytes: Vec<u8>| {
        let digest = digest_of(&bytes);
        blobs.push((format!("blobs/{}", digest.replace(':', "/")), bytes));
        digest
    };
    let mut descriptors = Vec::new();
    for (name, layer) in images {
        let config = put(config_of(&[layer]));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(layer).unwrap();
        let layer = put(gzip.finish().unwrap());
        let manifest = json!({"schemaVersion": 2, "config": {"digest": config}, "layers": [{"digest": layer}]});
        let digest = put(manifest.to_string().into_bytes());
        let index = json!({"manifests": [
            {"digest": format!("sha256:{}", "1".repeat(64)), "platform": {"os": "linux", "architecture": "s390x"}},
            {"digest": digest, "platform": {"os": "linux", "architecture": architecture()}}]});
        let index = put(index.to_string().into_bytes());
        descriptors.push(json!({"digest": index, "annotations": {"io.containerd.image.name": name}}));
    }
    let index = json!({"schemaVersion": 2, "manifests": descriptors}).to_string();
    let mut files: Vec<(&str, &[u8])> = vec![("index.json", index.as_bytes())];
    files.extend(blobs.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())));
    tar_of(&files)
}

struct Place {
    folder: tempfile::TempDir,
    store: ImageStore,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&folder.path().join("store"), true).unwrap();
        Self { folder, store }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn count(&self, part: &str) -> usize {
        fs::read_dir(self.folder.path().join("store").join(part)).unwrap().count()
    }
}

#[test]
fn a_docker_archive_is_imported_and_found_by_every_name() {
    let place = Place::new();
    let archive =
        docker_archive(&["busybox:1", "example.org/b:2"], &[&tar_of(&[("a", b"1")]), &tar_of(&[("b", b"22")])]);
    let imported = place.store.import(&place.file("a.tar", &archive)).unwrap();
    assert_eq!(imported.names, ["docker.io/library/busybox:1", "example.org/b:2"]);
    let image = place.store.find("busybox:1").unwrap().unwrap();
    assert_eq!((image.size, image.config.cmd.as_slice()), (3, &["/x".to_owned()][..]));
    for name in [&image.id, &image.id[7..], &image.id[7..20], "example.org/b:2", "docker.io/busybox:1"] {
        assert_eq!(place.store.find(name).unwrap().unwrap().id, image.id, "{name}");
    }
    assert!(place.store.find("busybox").unwrap().is_none());
}

#[test]
fn one_oci_archive_may_hold_many_images_and_be_compressed() {
    let place = Place::new();
    let archive =
        oci_archive(&[("docker.io/a/one:1", &tar_of(&[("x", b"1")])), ("docker.io/a/two:1", &tar_of(&[("y", b"1")]))]);
    let packed = zstd::encode_all(&archive[..], 1).unwrap();
    let imported = place.store.import(&place.file("all.tar.zst", &packed)).unwrap();
    assert_eq!(imported.names, ["docker.io/a/one:1", "docker.io/a/two:1"]);
    let image = place.store.find("a/two:1").unwrap().unwrap();
    assert_eq!(place.store.find(image.reference()).unwrap().unwrap().id, image.id);
    assert!(image.reference().starts_with("docker.io/a/two@sha256:"));
    assert_eq!(place.count("ingest"), 0);
}

#[test]
fn damaged_archives_leave_nothing_behind() {
    let place = Place::new();
    let layer = tar_of(&[("a", &[1; 5000])]);
    let good = docker_archive(&["x:1"], &[&layer]);
    let mut flipped = good.clone();
    let at = flipped.len() - 4000;
    flipped[at] ^= 1;
    let foreign = String::from_utf8_lossy(&good).replace(architecture(), "mips1");
    for (name, bytes) in [
        ("cut.tar", &good[..good.len() / 2]),
        ("flipped.tar", &flipped),
        ("text.tar", b"hello, this is no archive"),
        ("empty.tar", b""),
        ("other.tar", &tar_of(&[("readme", b"x")])),
        ("foreign.tar", foreign.as_bytes()),
        ("half.gz", &[0x1f, 0x8b, 8, 0, 0, 0]),
    ] {
        let error = place.store.import(&place.file(name, bytes)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(place.store.list().unwrap().is_empty(), "{name}");
        assert_eq!((place.count("ingest"), place.count("layers")), (0, 0), "{name}");
    }
}

#[test]
fn what_is_not_there_says_so_in_upstreams_words() {
    let place = Place::new();
    let reason = |policy| place.store.resolve("nginx", policy).unwrap_err();
    assert_eq!(
        reason(PullPolicy::Never).to_string(),
        "Container image \"nginx\" is not present with pull policy of Never"
    );
    assert_eq!(reason(PullPolicy::Never).reason(), "ErrImageNeverPull");
    assert_eq!(reason(PullPolicy::IfNotPresent).reason(), "ErrImagePull");
    assert_eq!(place.store.resolve("No Name", PullPolicy::Never).unwrap_err().reason(), "InvalidImageName");
}

#[test]
fn the_builtin_image_is_always_there_and_follows_the_program() {
    let place = Place::new();
    place.store.add_builtin(b"program 1").unwrap();
    let first = place.store.resolve("coracle.local/hello", PullPolicy::Never).unwrap();
    assert!(first.pinned && place.store.remove("coracle.local/hello").is_err());
    place.store.add_builtin(b"program 2").unwrap();
    let second = place.store.resolve("coracle.local/hello", PullPolicy::Always).unwrap();
    assert_ne!(first.id, second.id);
    assert_eq!(place.store.list().unwrap().len(), 1);
    place.store.sweep().unwrap();
    assert_eq!(place.count("layers"), 1);
    assert_eq!(place.store.resolve("coracle.local/other", PullPolicy::Never).unwrap_err().reason(), "ErrImagePull");
}

#[test]
fn layers_stay_while_a_container_uses_them() {
    let place = Place::new();
    let archive = docker_archive(&["x:1", "x:2"], &[&tar_of(&[("a", b"1")])]);
    place.store.import(&place.file("x.tar", &archive)).unwrap();
    let id = place.store.find("x:1").unwrap().unwrap().id;
    place.store.hold(&id, "container").unwrap();
    place.store.remove("x:1").unwrap();
    assert!(place.store.find("x:2").unwrap().is_some(), "the other name stays");
    place.store.remove(&id).unwrap();
    assert!(place.store.find("x:2").unwrap().is_none());
    assert_eq!(place.count("layers"), 1);
    place.store.release("container");
    place.store.sweep().unwrap();
    assert_eq!(place.count("layers"), 0);
    assert!(matches!(place.store.remove("x:1"), Err(ImageError::NotFound(_))));
}

#[test]
fn the_store_survives_its_process() {
    let place = Place::new();
    let archive = docker_archive(&["x:1"], &[&tar_of(&[("a", b"1")])]);
    place.store.import(&place.file("x.tar", &archive)).unwrap();
    let Place { folder, store } = place;
    let path: &Path = &folder.path().join("store");
    // A second process: the command line beside the agent.
    let other = ImageStore::open(path, false).unwrap();
    assert!(ImageStore::open(path, true).is_err());
    other.remove("x:1").unwrap();
    assert!(store.find("x:1").unwrap().is_none(), "the agent sees what the command line did");
    drop((store, other));
    fs::create_dir(path.join("ingest/half")).unwrap();
    let store = ImageStore::open(path, true).unwrap();
    store.sweep().unwrap();
    assert_eq!(fs::read_dir(path.join("ingest")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(path.join("layers")).unwrap().count(), 0);
}
