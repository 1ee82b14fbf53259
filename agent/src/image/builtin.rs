//! `coracle.local/hello`: an image made from a program inside this one, so that a machine without any network can run
//! something.

use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use tar::{Builder, EntryType, Header};

use super::archive::{ArchivedImage, architecture, digest_of};
use super::{BUILTIN_PREFIX, ImageError, ImageResult, ImageStore};

/// Names under which the program does something else than serve.
const BASICS: [&str; 10] = ["true", "false", "sleep", "cat", "echo", "env", "hostname", "id", "ls", "pwd"];

impl ImageStore {
    /// Makes sure that the built-in image is there and made of `program`.
    pub fn add_builtin(&self, program: &[u8]) -> ImageResult<()> {
        let layer = layer(program).map_err(|source| ImageError::Io { what: "build the image".to_owned(), source })?;
        let diff_id = digest_of(&layer);
        let config = serde_json::json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": ["/hello"],
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "ExposedPorts": { "8080/tcp": {} },
                "WorkingDir": "/",
                "Labels": { "org.opencontainers.image.title": "hello" },
            },
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        });
        let config = config.to_string().into_bytes();
        if self.find(&digest_of(&config))?.is_some() {
            return Ok(());
        }
        let names = ["latest", env!("CARGO_PKG_VERSION")].map(|tag| format!("{BUILTIN_PREFIX}hello:{tag}"));
        let image = ArchivedImage { names: names.into(), manifest: None, config, layers: vec!["layer".to_owned()] };
        let layer: Arc<[u8]> = layer.into();
        let open = |_: &str| Ok(Box::new(Cursor::new(layer.clone())) as Box<dyn Read>);
        self.add(image, open, Path::new("built-in image"), true)?;
        self.drop_old_builtins()
    }

    /// The ones of earlier versions of the program have lost their names.
    fn drop_old_builtins(&self) -> ImageResult<()> {
        self.change(|index| {
            index.images.retain(|_, stored| !(stored.image.pinned && stored.image.repo_tags.is_empty()));
            Ok(())
        })
    }
}

fn layer(program: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::with_capacity(program.len() + 32 * 1024));
    let mut add = |kind: EntryType, path: &str, mode: u32, link: &str, data: &[u8]| {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        if link.is_empty() {
            tar.append_data(&mut header, path, data)
        } else {
            tar.append_link(&mut header, path, link)
        }
    };
    for (folder, mode) in [("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)] {
        add(EntryType::Directory, folder, mode, "", b"")?;
    }
    add(
        EntryType::Regular,
        "etc/passwd",
        0o644,
        "",
        b"root:x:0:0:root:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    add(EntryType::Regular, "etc/group", 0o644, "", b"root:x:0:\nnogroup:x:65534:\n")?;
    add(EntryType::Regular, "hello", 0o755, "", program)?;
    for name in BASICS.iter().chain(&["wget"]) {
        add(EntryType::Symlink, &format!("bin/{name}"), 0o777, "/hello", b"")?;
    }
    tar.into_inner()
}
