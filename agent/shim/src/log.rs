//! A container's output in the log format of CRI: `<time> <stream> <P|F> <text>`.
//!
//! A line longer than [`MAX_ENTRY`], or one that the program never ended, is written as partial (`P`) entries.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use coracle_shim::protocol::LogSpec;

/// Longest text of one entry, as containerd has it.
pub const MAX_ENTRY: usize = 16 * 1024;

/// Which stream an entry came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

/// Cuts a stream of bytes into entries.
#[derive(Default)]
pub struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Appends the entries that `bytes` complete to `out`.
    pub fn push(&mut self, stream: Stream, time: &str, mut bytes: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            let room = MAX_ENTRY - self.pending.len();
            let window = &bytes[..bytes.len().min(room)];
            if let Some(end) = window.iter().position(|&byte| byte == b'\n') {
                entry(out, stream, time, 'F', &self.pending, &window[..end]);
                self.pending.clear();
                bytes = &bytes[end + 1..];
            } else if window.len() == room && bytes.get(room) != Some(&b'\n') {
                entry(out, stream, time, 'P', &self.pending, window);
                self.pending.clear();
                bytes = &bytes[room..];
            } else if window.len() == room {
                entry(out, stream, time, 'F', &self.pending, window);
                self.pending.clear();
                bytes = &bytes[room + 1..];
            } else {
                self.pending.extend_from_slice(window);
                bytes = &[];
            }
        }
        if self.pending.is_empty() {
            self.pending = Vec::new();
        }
    }

    /// The stream has ended: what is pending is a partial entry.
    pub fn finish(&mut self, stream: Stream, time: &str, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            entry(out, stream, time, 'P', &self.pending, &[]);
            self.pending = Vec::new();
        }
    }
}

fn entry(out: &mut Vec<u8>, stream: Stream, time: &str, tag: char, head: &[u8], tail: &[u8]) {
    out.extend_from_slice(time.as_bytes());
    out.push(b' ');
    out.extend_from_slice(stream.name().as_bytes());
    out.extend_from_slice(&[b' ', tag as u8, b' ']);
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    out.push(b'\n');
}

/// The open log file of a container.
pub struct LogFile {
    spec: LogSpec,
    file: File,
    size: u64,
}

impl LogFile {
    pub fn open(spec: LogSpec) -> io::Result<Self> {
        if let Some(folder) = spec.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let (file, size) = open_append(&spec.path)?;
        Ok(Self { spec, file, size })
    }

    /// Opens the path again: somebody else has moved the file.
    pub fn reopen(&mut self) -> io::Result<()> {
        (self.file, self.size) = open_append(&self.spec.path)?;
        Ok(())
    }

    /// Writes whole entries; rotates first when they would not fit.
    pub fn write(&mut self, entries: &[u8]) -> io::Result<()> {
        let limit = self.spec.max_bytes;
        if limit > 0 && self.size > 0 && self.size + entries.len() as u64 > limit {
            // A failing rotation must not lose output: the file grows instead.
            let _ = self.rotate();
        }
        self.file.write_all(entries)?;
        self.size += entries.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let compact: String = timestamp(now()).chars().filter(|c| c.is_ascii_digit()).take(20).collect();
        let (day, time) = compact.split_at(8);
        fs::rename(&self.spec.path, with_suffix(&self.spec.path, &format!(".{day}-{time}")))?;
        self.reopen()?;
        let keep = self.spec.max_files.max(1) as usize - 1;
        let mut old = rotated(&self.spec.path)?;
        let surplus = old.len().saturating_sub(keep);
        for path in old.drain(..surplus) {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }
}

fn open_append(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).mode(0o640).open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Files that rotation made of `path`, oldest first (their names sort by time).
fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let prefix = with_suffix(path, ".");
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut found: Vec<PathBuf> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|candidate| candidate.as_os_str().as_encoded_bytes().starts_with(prefix.as_os_str().as_encoded_bytes()))
        .collect();
    found.sort();
    Ok(found)
}

/// Nanoseconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// RFC 3339 in UTC with nine digits of a second: `2026-11-21T13:00:00.000000001Z`.
pub fn timestamp(nanos: u64) -> String {
    let seconds = nanos / 1_000_000_000;
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", nanos % 1_000_000_000)
}

/// Days since 1970 to year, month and day of the proleptic Gregorian calendar (eras of 400 years starting in March).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> String {
        let (mut splitter, mut out) = (Splitter::default(), Vec::new());
        for chunk in chunks {
            splitter.push(Stream::Stdout, "T", chunk, &mut out);
        }
        splitter.finish(Stream::Stdout, "T", &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_full_and_an_unended_one_is_partial() {
        assert_eq!(split(&[b"one\ntw", b"o\n\nend"]), "T stdout F one\nT stdout F two\nT stdout F \nT stdout P end\n");
    }

    #[test]
    fn long_lines_are_cut() {
        let long = [b'x'; MAX_ENTRY * 2];
        let text = split(&[&long, b"\n"]);
        let tags: Vec<_> = text.lines().map(|line| (line.as_bytes()[9] as char, line.len())).collect();
        assert_eq!(tags, [('P', MAX_ENTRY + 11), ('P', MAX_ENTRY + 11), ('F', 11)]);
        let exact = [&[b'x'; MAX_ENTRY][..], b"\ny\n"].concat();
        assert_eq!(split(&[&exact]).lines().map(|line| line.as_bytes()[9]).collect::<Vec<_>>(), b"FF");
    }

    #[test]
    fn time_is_rfc3339() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(timestamp(951_782_400_000_000_005), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(timestamp(1_795_266_061_123_456_789), "2026-11-21T13:01:01.123456789Z");
    }

    #[test]
    fn rotation_keeps_the_newest_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c/0.log");
        let mut log = LogFile::open(LogSpec { path: path.clone(), max_bytes: 10, max_files: 3 }).unwrap();
        for text in ["aaaaaaaa\n", "bbbbbbbb\n", "cccccccc\n", "dddddddd\n"] {
            log.write(text.as_bytes()).unwrap();
        }
        let kept: Vec<String> = rotated(&path).unwrap().iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        assert_eq!(kept, ["bbbbbbbb\n", "cccccccc\n"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "dddddddd\n");
        fs::rename(&path, folder.path().join("away")).unwrap();
        log.reopen().unwrap();
        log.write(b"new\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");
    }
}
