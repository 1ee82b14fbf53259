//! Time zones by name, from the machine's own database: the binary carries none.

use std::path::Path;

use jiff::tz::TimeZone;

/// Where the database may be, the first that has a zone counts (the places of Go's `time.LoadLocation`).
const FOLDERS: [&str; 4] = ["/usr/share/zoneinfo", "/usr/share/lib/zoneinfo", "/usr/lib/locale/TZ", "/etc/zoneinfo"];
/// Longest part of a name between slashes.
const PART_MAX: usize = 14;

/// A zone that does not exist, or not on this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown time zone {0}")]
pub struct UnknownTimeZone(String);

fn is_part(part: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
    !part.is_empty()
        && part.len() <= PART_MAX
        && part.chars().all(legal)
        && !matches!(part, "." | "..")
        && !part.starts_with('-')
}

/// The zone of a name such as `Europe/Vienna`; `UTC` needs no database.
pub fn load(name: &str) -> Result<TimeZone, UnknownTimeZone> {
    let unknown = || UnknownTimeZone(name.to_owned());
    if !name.split('/').all(is_part) {
        return Err(unknown());
    }
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    let file =
        FOLDERS.iter().find_map(|folder| std::fs::read(Path::new(folder).join(name)).ok()).ok_or_else(unknown)?;
    TimeZone::tzif(name, &file).map_err(|_| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_but_into_the_database() {
        assert_eq!(load("UTC"), Ok(TimeZone::UTC));
        for name in ["", "../../../etc/passwd", "Europe//Vienna", "-x", "No/Such_Zone", "Europe"] {
            assert_eq!(load(name).unwrap_err().to_string(), format!("unknown time zone {name}"));
        }
    }
}
