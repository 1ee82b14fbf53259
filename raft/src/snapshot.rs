//! Snapshot files: the state at one revision, in checksummed zstd frames. The same file is a raft snapshot and what
//! `coracle snapshot save` writes.
//!
//! ```text
//! 8    "CORASNP1"
//! then frames: u8 kind (1 head, 2 rows), u32 compressed length, u32 length, u32 crc32c over the nine bytes before and
//!              the compressed bytes, the compressed bytes
//! head u64 revision, u32 number of leases, each: u64 id, u64 seconds; the rest: position in the log (crate::applied)
//! rows for each key: u32 length, key, u32 length, value, u64 create_revision, mod_revision, version, lease
//! 24   foot: u64 number of rows, u64 length of all row frames, u32 crc32c over these 16 bytes, "END\n"
//! ```
//! A file gets its name only when it is complete and durable.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use coracle_store::{KeyValue, Pinned, SnapshotMeta, StoreError};

use crate::applied::Applied;
use crate::entry::{cut_short, u32_of, u64_of};
use crate::files;
use crate::wal::LogId;

const MAGIC: &[u8; 8] = b"CORASNP1";
const END: &[u8; 4] = b"END\n";
const FOOT: usize = 24;
const FRAME_HEADER: usize = 13;
const HEAD: u8 = 1;
const ROWS: u8 = 2;
/// A frame is written when it holds this many bytes.
const FRAME: usize = 256 << 10;
/// Longest frame that is believed: one row may be as long as a log entry.
const MAX_FRAME: usize = 64 << 20;
/// Bytes after which the file is synced while it is written, so that the log's syncs never wait for all of it.
const SYNC_STEP: usize = 4 << 20;
const LEVEL: i32 = 1;
const SUFFIX: &str = ".snap";
const UNFINISHED: &str = "unfinished.tmp";
const INCOMING: &str = "incoming-";

/// A snapshot file couldn't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The operating system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The file isn't what was written.
    #[error(
        "the snapshot {} is damaged: {what}. The log before it is gone, so the server does not start. Re-seed it: with \
         other servers, remove its data directory and let it join again; with none, restore an older saved snapshot \
         into a fresh data directory",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The state couldn't be read or written.
    #[error("reading or writing the state of a snapshot")]
    Store(#[from] StoreError),
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_path_buf();
    move |source| SnapshotError::Io { action, path, source }
}

/// A complete snapshot file.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    pub path: PathBuf,
    /// What the state machine stood at.
    pub applied: Applied,
    /// Bytes of all rows before compression.
    pub live_bytes: u64,
}

/// Writes the pinned state to `dir`. The file is durable, also its name, when this returns.
pub(crate) fn write(dir: &Path, pinned: &Pinned) -> Result<SnapshotFile, SnapshotError> {
    let unfinished = dir.join(UNFINISHED);
    let file = write_file(&unfinished, pinned)?;
    let path = dir.join(name(file.applied.last));
    fs::rename(&unfinished, &path).map_err(io_error("naming", &path))?;
    files::sync_dir(dir).map_err(io_error("syncing", dir))?;
    Ok(SnapshotFile { path, ..file })
}

/// Writes the pinned state to a file, whose contents are durable when this returns; its name may not be.
pub(crate) fn write_file(path: &Path, pinned: &Pinned) -> Result<SnapshotFile, SnapshotError> {
    let applied = Applied::decode(pinned.meta().meta.clone()).map_err(io_error("writing", path))?;
    write_rows(path, pinned.meta(), applied, pinned.rows())
}

/// Writes rows and what goes with them.
pub(crate) fn write_rows<E>(
    path: &Path,
    meta: &SnapshotMeta,
    applied: Applied,
    kvs: impl Iterator<Item = Result<KeyValue, E>>,
) -> Result<SnapshotFile, SnapshotError>
where
    SnapshotError: From<E>,
{
    let wrong = || io_error("writing", path);
    let mut out = FrameWriter { file: File::create(path).map_err(wrong())?, unsynced: 0 };
    out.file.write_all(MAGIC).map_err(wrong())?;
    out.frame(HEAD, &encode_head(meta)).map_err(wrong())?;
    let (mut rows, mut bytes, mut frame) = (0u64, 0u64, Vec::with_capacity(FRAME + 4096));
    for kv in kvs {
        encode_row(&kv?, &mut frame);
        rows += 1;
        if frame.len() >= FRAME {
            bytes += frame.len() as u64;
            out.frame(ROWS, &frame).map_err(wrong())?;
            frame.clear();
        }
    }
    if !frame.is_empty() {
        bytes += frame.len() as u64;
        out.frame(ROWS, &frame).map_err(wrong())?;
    }
    out.foot(rows, bytes).map_err(wrong())?;
    Ok(SnapshotFile { path: path.to_path_buf(), applied, live_bytes: bytes })
}

/// A file for a snapshot that comes from a peer; goes when this is dropped, unless it got another name meanwhile.
#[derive(Debug)]
pub(crate) struct Arriving {
    path: PathBuf,
}

impl Arriving {
    /// Each transfer has a name of its own: the file of one may be on its way to become the current snapshot when the next
    /// begins.
    pub fn new(dir: &Path, peer: u64) -> Arriving {
        static TRANSFERS: AtomicU64 = AtomicU64::new(0);
        let transfer = TRANSFERS.fetch_add(1, Ordering::Relaxed);
        Arriving { path: dir.join(format!("{INCOMING}{peer:016x}-{transfer}.tmp")) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, file = %self.path.display(), "removing an unused snapshot failed");
            }
            _ => {}
        }
    }
}

/// Whether this is one of the files that `dir` keeps.
pub(crate) fn is_kept(dir: &Path, path: &Path) -> bool {
    path.parent() == Some(dir) && path.to_str().is_some_and(|name| name.ends_with(SUFFIX))
}

/// Takes a snapshot file from elsewhere (or one that came in) into `dir`, after checking every frame.
pub(crate) fn adopt(dir: &Path, from: &Path) -> Result<SnapshotFile, SnapshotError> {
    let reader = Reader::open(from)?;
    let applied = reader.file.applied.clone();
    for row in reader {
        row?;
    }
    let path = dir.join(name(applied.last));
    let unfinished = if from.parent() == Some(dir) { from.to_path_buf() } else { dir.join(UNFINISHED) };
    if unfinished != from {
        fs::copy(from, &unfinished).map_err(io_error("copying", from))?;
    }
    File::open(&unfinished).and_then(|file| file.sync_all()).map_err(io_error("syncing", &unfinished))?;
    fs::rename(&unfinished, &path).map_err(io_error("naming", &path))?;
    files::sync_dir(dir).map_err(io_error("syncing", dir))?;
    Ok(Reader::open(&path)?.file)
}

/// The newest snapshot in `dir`, made if need be. Unfinished and older files are removed.
pub(crate) fn newest(dir: &Path) -> Result<Option<SnapshotFile>, SnapshotError> {
    files::create_dir(dir).map_err(io_error("creating", dir))?;
    for unfinished in names(dir, ".tmp")? {
        fs::remove_file(&unfinished).map_err(io_error("cleaning", dir))?;
    }
    match names(dir, SUFFIX)?.pop() {
        Some(newest) => {
            let file = Reader::open(&newest)?.file;
            remove_before(dir, &newest)?;
            Ok(Some(file))
        }
        None => Ok(None),
    }
}

/// Removes every snapshot older than this one. A newer one stays: the log that it covers may be gone.
pub(crate) fn remove_before(dir: &Path, keep: &Path) -> Result<(), SnapshotError> {
    for path in names(dir, SUFFIX)? {
        // The names sort by what they cover.
        if path.as_path() < keep {
            fs::remove_file(&path).map_err(io_error("removing", &path))?;
        }
    }
    Ok(())
}

fn names(dir: &Path, suffix: &str) -> Result<Vec<PathBuf>, SnapshotError> {
    let wrong = || io_error("listing", dir);
    let mut paths = Vec::new();
    for item in fs::read_dir(dir).map_err(wrong())? {
        let path = item.map_err(wrong())?.path();
        if path.to_str().is_some_and(|name| name.ends_with(suffix)) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Sorts by index, then term.
fn name(last: Option<LogId>) -> String {
    let LogId { term, index } = last.unwrap_or(LogId { term: 0, index: 0 });
    format!("{index:020}-{term:010}{SUFFIX}")
}

struct FrameWriter {
    file: File,
    unsynced: usize,
}

impl FrameWriter {
    fn frame(&mut self, kind: u8, raw: &[u8]) -> io::Result<()> {
        let packed = zstd::bulk::compress(raw, LEVEL)?;
        let mut header = [0; FRAME_HEADER];
        header[0] = kind;
        header[1..5].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        header[5..9].copy_from_slice(&(raw.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..9]), &packed);
        header[9..].copy_from_slice(&crc.to_le_bytes());
        self.file.write_all(&header)?;
        self.file.write_all(&packed)?;
        self.unsynced += packed.len();
        if self.unsynced > SYNC_STEP {
            self.unsynced = 0;
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn foot(&mut self, rows: u64, bytes: u64) -> io::Result<()> {
        let mut foot = [0; FOOT];
        foot[..8].copy_from_slice(&rows.to_le_bytes());
        foot[8..16].copy_from_slice(&bytes.to_le_bytes());
        let crc = crc32c::crc32c(&foot[..16]);
        foot[16..20].copy_from_slice(&crc.to_le_bytes());
        foot[20..].copy_from_slice(END);
        self.file.write_all(&foot)?;
        self.file.sync_all()
    }
}

/// Reads a snapshot: open it for what it is, iterate for its rows.
pub(crate) struct Reader {
    pub file: SnapshotFile,
    pub meta: SnapshotMeta,
    input: BufReader<File>,
    /// Rows not yet handed out, and those of the frame in hand.
    left: u64,
    frame: Bytes,
}

impl Reader {
    pub fn open(path: &Path) -> Result<Reader, SnapshotError> {
        let damaged = |what| SnapshotError::Damaged { path: path.to_path_buf(), what };
        let wrong = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it is cut short"),
            _ => io_error("reading", path)(source),
        };
        let mut file = File::open(path).map_err(wrong)?;
        let length = file.metadata().map_err(wrong)?.len();
        let foot_at = length.checked_sub(FOOT as u64).ok_or_else(|| damaged("it is cut short"))?;
        let mut foot = [0; FOOT];
        file.seek(SeekFrom::Start(foot_at)).and_then(|_| file.read_exact(&mut foot)).map_err(wrong)?;
        let mut foot = Bytes::copy_from_slice(&foot);
        let checked = crc32c::crc32c(&foot[..16]);
        let (rows, live_bytes, crc) = (foot.get_u64_le(), foot.get_u64_le(), foot.get_u32_le());
        if crc != checked || foot.as_ref() != END {
            return Err(damaged("its end is missing"));
        }
        let mut magic = [0; MAGIC.len()];
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut magic)).map_err(wrong)?;
        if &magic != MAGIC {
            return Err(damaged("it does not begin like a snapshot"));
        }
        let mut input = BufReader::with_capacity(FRAME, file);
        let head = read_frame(&mut input, HEAD).map_err(wrong)?.ok_or_else(|| damaged("its head does not check"))?;
        let meta = decode_head(head).map_err(|_| damaged("its head is malformed"))?;
        let applied = Applied::decode(meta.meta.clone()).map_err(|_| damaged("its head is malformed"))?;
        let file = SnapshotFile { path: path.to_path_buf(), applied, live_bytes };
        Ok(Reader { file, meta, input, left: rows, frame: Bytes::new() })
    }

    fn damaged(&self, what: &'static str) -> SnapshotError {
        SnapshotError::Damaged { path: self.file.path.clone(), what }
    }

    fn row(&mut self) -> Result<KeyValue, SnapshotError> {
        if self.frame.is_empty() {
            let frame = read_frame(&mut self.input, ROWS);
            let frame = frame.map_err(io_error("reading", &self.file.path))?;
            self.frame = frame.ok_or_else(|| self.damaged("a frame of rows does not check"))?;
        }
        decode_row(&mut self.frame).map_err(|_| self.damaged("a row is malformed"))
    }
}

impl Iterator for Reader {
    type Item = Result<KeyValue, SnapshotError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let row = self.row();
        if row.is_err() {
            self.left = 0;
        }
        Some(row)
    }
}

/// One frame; None when it doesn't check or isn't of this kind.
fn read_frame(input: &mut impl Read, kind: u8) -> io::Result<Option<Bytes>> {
    let mut header = [0; FRAME_HEADER];
    input.read_exact(&mut header)?;
    let mut fields = &header[1..];
    let (packed_len, raw_len, crc) = (fields.get_u32_le() as usize, fields.get_u32_le() as usize, fields.get_u32_le());
    if header[0] != kind || packed_len > MAX_FRAME || raw_len > MAX_FRAME {
        return Ok(None);
    }
    let mut packed = vec![0; packed_len];
    input.read_exact(&mut packed)?;
    if crc32c::crc32c_append(crc32c::crc32c(&header[..9]), &packed) != crc {
        return Ok(None);
    }
    let raw = zstd::bulk::decompress(&packed, raw_len)?;
    Ok((raw.len() == raw_len && raw_len > 0).then(|| raw.into()))
}

fn encode_head(meta: &SnapshotMeta) -> Vec<u8> {
    let mut out = meta.revision.to_le_bytes().to_vec();
    out.extend((meta.leases.len() as u32).to_le_bytes());
    for (id, seconds) in &meta.leases {
        out.extend(id.to_le_bytes());
        out.extend(seconds.to_le_bytes());
    }
    out.extend(&meta.meta);
    out
}

fn decode_head(mut bytes: Bytes) -> io::Result<SnapshotMeta> {
    let revision = u64_of(&mut bytes)?;
    let mut leases = Vec::new();
    for _ in 0..u32_of(&mut bytes)? {
        leases.push((u64_of(&mut bytes)?, u64_of(&mut bytes)?));
    }
    Ok(SnapshotMeta { revision, leases, meta: bytes })
}

fn encode_row(kv: &KeyValue, out: &mut Vec<u8>) {
    for bytes in [&kv.key, &kv.value] {
        out.extend((bytes.len() as u32).to_le_bytes());
        out.extend(bytes.as_ref());
    }
    for number in [kv.create_revision, kv.mod_revision, kv.version, kv.lease] {
        out.extend(number.to_le_bytes());
    }
}

fn decode_row(bytes: &mut Bytes) -> io::Result<KeyValue> {
    let piece = |bytes: &mut Bytes| {
        let length = u32_of(bytes)? as usize;
        if bytes.len() < length { Err(cut_short()) } else { Ok(bytes.split_to(length)) }
    };
    Ok(KeyValue {
        key: piece(bytes)?,
        value: piece(bytes)?,
        create_revision: u64_of(bytes)?,
        mod_revision: u64_of(bytes)?,
        version: u64_of(bytes)?,
        lease: u64_of(bytes)?,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use coracle_store::{Command, Op, Options, Store, Txn, Writer};

    use super::*;

    fn state(keys: usize) -> (Store, Writer) {
        let (store, mut writer) = Store::open(Options::memory()).unwrap();
        let applied = Applied { last: Some(LogId { term: 3, index: 77 }), ..Applied::default() };
        let put = |n: usize| Op::Put { key: format!("/k/{n}").into(), value: vec![n as u8; 300].into(), lease: 0 };
        let txn = |n| Command::Txn(Txn { then: vec![put(n)], ..Txn::default() });
        let mut commands = vec![Command::LeaseGrant { id: 9, ttl_seconds: 60 }];
        commands.extend((0..keys).map(txn));
        writer.apply(commands, applied.encode()).unwrap();
        (store, writer)
    }

    #[test]
    fn a_snapshot_restores_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let (store, writer) = state(3000);
        let file = write(dir.path(), &writer.pin()).unwrap();
        assert_eq!(file.applied.last, Some(LogId { term: 3, index: 77 }));
        let newest = newest(dir.path()).unwrap().unwrap();
        assert_eq!((&newest.path, newest.live_bytes), (&file.path, file.live_bytes));
        let reader = Reader::open(&file.path).unwrap();
        let (copy, mut copied) = Store::open(Options::memory()).unwrap();
        copied.restore(reader.meta.clone(), reader).unwrap();
        assert_eq!(copy.revision(), store.revision());
        assert_eq!(copy.get(b"/k/2999").unwrap(), store.get(b"/k/2999").unwrap());
        assert_eq!(copied.pin().meta(), writer.pin().meta());
    }

    #[test]
    fn an_empty_state_has_a_snapshot_too() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, writer) = Store::open(Options::memory()).unwrap();
        let file = write(dir.path(), &writer.pin()).unwrap();
        assert_eq!(Reader::open(&file.path).unwrap().count(), 0);
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, writer) = state(8);
        let file = write(dir.path(), &writer.pin()).unwrap();
        let good = fs::read(&file.path).unwrap();
        for at in 0..good.len() {
            let on_disk = File::options().write(true).open(&file.path).unwrap();
            on_disk.write_all_at(&[good[at] ^ 0x40], at as u64).unwrap();
            let read = Reader::open(&file.path).and_then(|reader| reader.collect::<Result<Vec<_>, _>>());
            assert!(read.is_err(), "byte {at}");
            on_disk.write_all_at(&good[at..=at], at as u64).unwrap();
        }
        fs::write(&file.path, &good[..good.len() - 30]).unwrap();
        let error = Reader::open(&file.path).err().unwrap().to_string();
        assert!(error.contains("its end is missing") && error.contains("Re-seed"), "{error}");
    }

    #[test]
    fn unfinished_and_old_files_go() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(UNFINISHED), "x").unwrap();
        fs::write(dir.path().join(name(None)), "x").unwrap();
        let (_store, writer) = state(1);
        let file = write(dir.path(), &writer.pin()).unwrap();
        assert_eq!(newest(dir.path()).unwrap().unwrap().path, file.path);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
