//! What `coracle images` does, beside a running agent or without one.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{ImageResult, ImageStore, Imported};

/// The store of an agent whose data is in `agent_dir` (`DATA/agent`).
#[must_use]
pub fn store_folder(agent_dir: &Path) -> PathBuf {
    agent_dir.join("store")
}

/// `coracle images ls`: a table with one line for each name.
pub fn list(agent_dir: &Path) -> ImageResult<String> {
    let store = ImageStore::open(&store_folder(agent_dir), false)?;
    let mut rows = vec![["NAME".to_owned(), "IMAGE ID".to_owned(), "SIZE".to_owned()]];
    for image in store.list()? {
        let id = image.id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
        let names = if image.repo_tags.is_empty() { vec!["<none>".to_owned()] } else { image.repo_tags };
        rows.extend(names.into_iter().map(|name| [name, id.clone(), size(image.size)]));
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (name, id) = (width(0), width(1));
    let mut table = String::new();
    for row in &rows {
        let _ = writeln!(table, "{:name$}   {:id$}   {}", row[0], row[1], row[2]);
    }
    Ok(table)
}

/// `coracle images import`: one archive; a running agent sees the images at once.
pub fn import(agent_dir: &Path, archive: &Path) -> ImageResult<Imported> {
    ImageStore::open(&store_folder(agent_dir), false)?.import(archive)
}

/// `coracle images rm`: a name, or an id with all its names. A running agent deletes the files when no container needs
/// them.
pub fn remove(agent_dir: &Path, reference: &str) -> ImageResult<()> {
    ImageStore::open(&store_folder(agent_dir), false)?.remove(reference)
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes}B"),
        1_000..1_000_000 => format!("{:.1}kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}MB", bytes as f64 / 1e6),
        _ => format!("{:.2}GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_every_image() {
        let folder = tempfile::tempdir().unwrap();
        ImageStore::open(&store_folder(folder.path()), true).unwrap().add_builtin(&[7; 2000]).unwrap();
        let table = list(folder.path()).unwrap();
        assert!(table.lines().nth(1).unwrap().starts_with("coracle.local/hello:latest"), "{table}");
        assert!(table.contains("kB"), "{table}");
        assert!(remove(folder.path(), "nothing").is_err());
        assert_eq!([size(5), size(1_500), size(2_000_000), size(3_000_000_000)], ["5B", "1.5kB", "2.0MB", "3.00GB"]);
    }
}
