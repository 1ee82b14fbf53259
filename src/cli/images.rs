//! `coracle images`: the images of this machine, with or without a running server.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use coracle_agent::image::ImageStore;

use super::args::{ImagesArgs, ImagesCommand};

/// Runs the command.
pub fn run(args: ImagesArgs) -> anyhow::Result<ExitCode> {
    if !args.data_dir.exists() {
        bail!(
            "--data-dir {:?}: there is no such folder; start a server first or name its folder",
            args.data_dir.display()
        );
    }
    let folder = args.data_dir.join("agent/store");
    let store =
        ImageStore::open(&folder, false).with_context(|| format!("open the image store {}", folder.display()))?;
    match args.command {
        ImagesCommand::Ls { digests } => list(&store, digests),
        ImagesCommand::Import { files } => import(&store, &files),
        ImagesCommand::Rm { images } => remove(&store, &images),
    }
}

fn list(store: &ImageStore, digests: bool) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    for image in store.list()? {
        let id = image.id.strip_prefix("sha256:").unwrap_or(&image.id).to_owned();
        let id = if digests { id } else { id.chars().take(13).collect() };
        let names = if image.repo_tags.is_empty() { &image.repo_digests } else { &image.repo_tags };
        let names = if names.is_empty() { &vec!["<none>".to_owned()] } else { names };
        rows.extend(names.iter().map(|name| (name.clone(), id.clone(), size(image.size))));
    }
    rows.sort();
    let width = |column: fn(&(String, String, String)) -> &String, title: &str| {
        rows.iter().map(|row| column(row).len()).max().unwrap_or(0).max(title.len())
    };
    let (name, id) = (width(|r| &r.0, "IMAGE"), width(|r| &r.1, "ID"));
    println!("{:name$}  {:id$}  SIZE", "IMAGE", "ID");
    for row in &rows {
        println!("{:name$}  {:id$}  {}", row.0, row.1, row.2);
    }
    Ok(ExitCode::SUCCESS)
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1}kB", bytes as f64 / 1e3),
        _ => format!("{:.1}MB", bytes as f64 / 1e6),
    }
}

fn import(store: &ImageStore, files: &[impl AsRef<Path>]) -> anyhow::Result<ExitCode> {
    for (i, file) in files.iter().enumerate() {
        let file = file.as_ref();
        eprintln!("importing {} ({} of {})", file.display(), i + 1, files.len());
        let imported = store.import(file).with_context(|| format!("import {}", file.display()))?;
        for name in imported.names {
            println!("{name}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(store: &ImageStore, images: &[String]) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for image in images {
        match store.remove(image) {
            Ok(()) => println!("removed {image}"),
            Err(error) => {
                eprintln!("coracle: {image}: {}", super::explain(&error.into()));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
