//! Reading CRI log files: lines, tails, rotation.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use k8s_openapi::jiff::Timestamp;

const CHUNK: usize = 64 * 1024;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    /// When it was written, as text.
    pub time: &'a str,
    /// `stdout` or `stderr`.
    pub stream: &'a str,
    /// False for a piece that the next line continues.
    pub complete: bool,
    /// Without line end.
    pub content: &'a [u8],
}

/// Splits `2016-10-06T00:17:09.669794202Z stdout F text`; `None` for what is no log line.
pub fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let stream = std::str::from_utf8(parts.next()?).ok()?;
    let tags = parts.next()?;
    let content = parts.next()?;
    let complete = !tags.split(|byte| *byte == b':').any(|tag| tag == b"P");
    matches!(stream, "stdout" | "stderr").then_some(Line { time, stream, complete, content })
}

/// Which lines are wanted.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Not before.
    pub since: Option<Timestamp>,
    /// With the time in front.
    pub timestamps: bool,
    /// Only this stream.
    pub stream: Option<String>,
}

impl Wanted {
    /// Appends what a reader of `line` sees.
    pub fn append(&self, line: &[u8], out: &mut Vec<u8>) {
        let Some(line) = parse(line) else { return };
        if self.stream.as_deref().is_some_and(|stream| stream != line.stream) {
            return;
        }
        if let Some(since) = self.since
            && line.time.parse::<Timestamp>().is_ok_and(|time| time < since)
        {
            return;
        }
        if self.timestamps {
            out.extend_from_slice(line.time.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(line.content);
        if line.complete {
            out.push(b'\n');
        }
    }
}

/// A log file that is read forward, also across rotation.
pub struct LogReader {
    path: PathBuf,
    file: File,
    inode: u64,
    pending: Vec<u8>,
}

impl LogReader {
    /// Opens the file at the start of its last `tail` lines, or at its start.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(path: &Path, tail: Option<u64>) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let inode = file.metadata()?.ino();
        let start = match tail {
            Some(lines) => tail_start(&mut file, lines)?,
            None => 0,
        };
        file.seek(SeekFrom::Start(start))?;
        Ok(Self { path: path.to_owned(), file, inode, pending: Vec::new() })
    }

    /// Gives the whole lines that are there now to `sink`, at most about 64 KiB at a time; false at the end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&mut self, mut sink: impl FnMut(&[u8])) -> io::Result<bool> {
        let mut chunk = vec![0; CHUNK];
        let read = self.file.read(&mut chunk)?;
        if read == 0 {
            return self.follow_rotation();
        }
        self.pending.extend_from_slice(&chunk[..read]);
        let mut rest = self.pending.as_slice();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            sink(&rest[..end]);
            rest = &rest[end + 1..];
        }
        let left = rest.len();
        self.pending.drain(..self.pending.len() - left);
        Ok(true)
    }

    /// At the end of a file that is not the current one any more: goes on with the current one.
    fn follow_rotation(&mut self) -> io::Result<bool> {
        let current = match std::fs::metadata(&self.path) {
            Ok(current) => current,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if current.ino() == self.inode {
            return Ok(false);
        }
        // Between our last read and the rotation more may have been written.
        let mut byte = [0];
        if self.file.read(&mut byte)? > 0 {
            self.pending.push(byte[0]);
            return Ok(true);
        }
        self.file = File::open(&self.path)?;
        self.inode = self.file.metadata()?.ino();
        self.pending.clear();
        Ok(true)
    }
}

/// Where the last `lines` lines begin.
fn tail_start(file: &mut File, lines: u64) -> io::Result<u64> {
    let length = file.metadata()?.len();
    if lines == 0 {
        return Ok(length);
    }
    let mut end = length;
    let mut found = 0;
    let mut chunk = vec![0; CHUNK];
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let size = usize::try_from(end - start).unwrap_or(CHUNK);
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut chunk[..size])?;
        for at in (0..size).rev() {
            // The line end at the very end belongs to the last line.
            let position = start + at as u64;
            if chunk[at] == b'\n' && position + 1 != length {
                found += 1;
                if found == lines {
                    return Ok(position + 1);
                }
            }
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn line(text: &str) -> String {
        format!("2026-01-01T00:00:00.5Z stdout F {text}\n")
    }

    fn all(reader: &mut LogReader, wanted: &Wanted) -> String {
        let mut out = Vec::new();
        while reader.read(|line| wanted.append(line, &mut out)).unwrap() {}
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn tails_count_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text: String = (0..5000).map(|n| line(&n.to_string())).collect();
        std::fs::write(&path, text).unwrap();
        let wanted = Wanted::default();
        assert_eq!(all(&mut LogReader::open(&path, Some(2)).unwrap(), &wanted), "4998\n4999\n");
        assert_eq!(all(&mut LogReader::open(&path, Some(0)).unwrap(), &wanted), "");
        assert_eq!(all(&mut LogReader::open(&path, Some(4000)).unwrap(), &wanted).lines().count(), 4000);
        assert_eq!(all(&mut LogReader::open(&path, Some(9000)).unwrap(), &wanted).lines().count(), 5000);
    }

    #[test]
    fn reading_goes_on_in_the_new_file_after_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, line("a")).unwrap();
        let mut reader = LogReader::open(&path, None).unwrap();
        assert_eq!(all(&mut reader, &Wanted::default()), "a\n");
        let mut old = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        old.write_all(line("b").as_bytes()).unwrap();
        std::fs::write(&path, line("c")).unwrap();
        assert_eq!(all(&mut reader, &Wanted::default()), "b\nc\n");
    }

    #[test]
    fn lines_show_time_and_stream_on_request() {
        let mut out = Vec::new();
        let wanted = Wanted { timestamps: true, stream: Some("stderr".into()), ..Wanted::default() };
        wanted.append(b"2026-01-01T00:00:00Z stdout F no", &mut out);
        wanted.append(b"2026-01-01T00:00:00Z stderr P par", &mut out);
        assert_eq!(out, b"2026-01-01T00:00:00Z par");
        let since = Wanted { since: Some("2026-01-01T00:00:01Z".parse().unwrap()), ..Wanted::default() };
        out.clear();
        since.append(b"2026-01-01T00:00:00Z stdout F early", &mut out);
        since.append(b"2026-01-01T00:00:01Z stdout F late", &mut out);
        assert_eq!(out, b"late\n");
    }
}
