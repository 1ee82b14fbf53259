//! `metav1.Time` and `metav1.MicroTime`: RFC 3339 with Go's error texts, stored in UTC.

use std::fmt::Write as _;

const LAYOUT: &str = "2006-01-02T15:04:05Z07:00";
/// `metav1.MicroTime` demands six digits of fraction.
const MICRO_LAYOUT: &str = "2006-01-02T15:04:05.000000Z07:00";

/// The stored spelling of a time: UTC, whole seconds. Errors are Go's (`parsing time "x" as ...`).
pub fn canonical(text: &str) -> Result<String, String> {
    let parsed = parse(text, LAYOUT)?;
    Ok(format(&parsed, false))
}

/// The same in microseconds.
pub fn canonical_micro(text: &str) -> Result<String, String> {
    let parsed = parse(text, MICRO_LAYOUT)?;
    Ok(format(&parsed, true))
}

/// Seconds since 1970 and microseconds of a stored time.
pub(super) fn epoch(text: &str) -> Option<(i64, u32)> {
    parse(text, LAYOUT).ok().map(|p| (p.seconds, p.micros))
}

/// The stored spelling of seconds since 1970, with microseconds if given.
pub(super) fn from_epoch(seconds: i64, micros: Option<u32>) -> String {
    format(&Parsed { seconds, micros: micros.unwrap_or(0) }, micros.is_some())
}

struct Parsed {
    /// Seconds since 1970, UTC.
    seconds: i64,
    micros: u32,
}

struct Cursor<'a> {
    whole: &'a str,
    rest: &'a str,
    layout: &'static str,
}

impl Cursor<'_> {
    fn mismatch(&self, element: &str) -> String {
        format!(
            "parsing time {} as {}: cannot parse {} as {}",
            quote(self.whole),
            quote(self.layout),
            quote(self.rest),
            quote(element)
        )
    }

    fn out_of_range(&self, what: &str) -> String {
        format!("parsing time {}: {what} out of range", quote(self.whole))
    }

    fn literal(&mut self, literal: char) -> Result<(), String> {
        let mut buffer = [0; 4];
        self.rest = self.rest.strip_prefix(literal).ok_or_else(|| self.mismatch(literal.encode_utf8(&mut buffer)))?;
        Ok(())
    }

    fn number(&mut self, digits: usize, element: &str) -> Result<u32, String> {
        let part = self.rest.get(..digits).filter(|p| p.bytes().all(|b| b.is_ascii_digit()));
        let value = part.and_then(|p| p.parse().ok()).ok_or_else(|| self.mismatch(element))?;
        self.rest = &self.rest[digits..];
        Ok(value)
    }
}

fn parse(text: &str, layout: &'static str) -> Result<Parsed, String> {
    let mut at = Cursor { whole: text, rest: text, layout };
    let year = at.number(4, "2006")?;
    at.literal('-')?;
    let month = at.number(2, "01")?;
    if !(1..=12).contains(&month) {
        return Err(at.out_of_range("month"));
    }
    at.literal('-')?;
    let day = at.number(2, "02")?;
    at.literal('T')?;
    let hour = at.number(2, "15")?;
    if hour > 23 {
        return Err(at.out_of_range("hour"));
    }
    at.literal(':')?;
    let minute = at.number(2, "04")?;
    if minute > 59 {
        return Err(at.out_of_range("minute"));
    }
    at.literal(':')?;
    let second = at.number(2, "05")?;
    if second > 59 {
        return Err(at.out_of_range("second"));
    }
    let micros = fraction(&mut at)?;
    let offset = zone(&mut at)?;
    if !at.rest.is_empty() {
        return Err(format!("parsing time {}: extra text: {}", quote(text), quote(at.rest)));
    }
    if day < 1 || day > days_in(year, month) {
        return Err(at.out_of_range("day"));
    }
    let clock = i64::from(hour * 3600 + minute * 60 + second);
    Ok(Parsed { seconds: days_from_epoch(year, month, day) * 86_400 + clock - offset, micros })
}

/// Microseconds. RFC 3339 may have any number of digits, or none; the micro layout demands six.
fn fraction(at: &mut Cursor<'_>) -> Result<u32, String> {
    let digits = at.rest.strip_prefix(['.', ',']).map_or(0, |r| r.bytes().take_while(u8::is_ascii_digit).count());
    if at.layout == MICRO_LAYOUT && digits < 6 {
        return Err(at.mismatch(".000000"));
    }
    if digits == 0 {
        return Ok(0);
    }
    let text = &at.rest[1..=digits];
    at.rest = &at.rest[1 + digits..];
    Ok(text.bytes().chain(std::iter::repeat(b'0')).take(6).fold(0, |sum, b| sum * 10 + u32::from(b - b'0')))
}

/// Seconds east of UTC.
fn zone(at: &mut Cursor<'_>) -> Result<i64, String> {
    if let Some(rest) = at.rest.strip_prefix('Z') {
        at.rest = rest;
        return Ok(0);
    }
    let whole = at.rest;
    let failed = |at: &Cursor<'_>| Cursor { whole: at.whole, rest: whole, layout: at.layout }.mismatch("Z07:00");
    let sign = match whole.as_bytes().first() {
        Some(b'+') => 1,
        Some(b'-') => -1,
        _ => return Err(failed(at)),
    };
    let two = |range: std::ops::Range<usize>| {
        whole.get(range).filter(|p| p.bytes().all(|b| b.is_ascii_digit())).and_then(|p| p.parse::<i64>().ok())
    };
    let (Some(hours), Some(":"), Some(minutes)) = (two(1..3), whole.get(3..4), two(4..6)) else {
        return Err(failed(at));
    };
    if hours > 24 {
        return Err(at.out_of_range("time zone offset hour"));
    }
    if minutes > 60 {
        return Err(at.out_of_range("time zone offset minute"));
    }
    at.rest = &whole[6..];
    Ok(sign * (hours * 3600 + minutes * 60))
}

fn leap(year: u32) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in(year: u32, month: u32) -> u32 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if leap(year) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Howard Hinnant's `days_from_civil`.
fn days_from_epoch(year: u32, month: u32, day: u32) -> i64 {
    let year = i64::from(year) - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((i64::from(month) + 9) % 12) + 2) / 5 + i64::from(day) - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn format(time: &Parsed, micro: bool) -> String {
    let (days, clock) = (time.seconds.div_euclid(86_400), time.seconds.rem_euclid(86_400));
    // Howard Hinnant's `civil_from_days`.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if micro {
        let _ = write!(text, ".{:06}", time.micros);
    }
    text.push('Z');
    text
}

/// Go's `%q` for the plain texts that appear here.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_stored_in_utc_seconds() {
        for (input, expected) in [
            ("2024-02-29T23:59:59Z", "2024-02-29T23:59:59Z"),
            ("2024-03-01T01:00:00+02:00", "2024-02-29T23:00:00Z"),
            ("1969-12-31T23:59:59.999Z", "1969-12-31T23:59:59Z"),
            ("2000-01-01T00:00:00-00:30", "2000-01-01T00:30:00Z"),
        ] {
            assert_eq!(canonical(input).as_deref(), Ok(expected));
        }
        assert_eq!(canonical_micro("2024-01-01T00:00:00.123456Z").as_deref(), Ok("2024-01-01T00:00:00.123456Z"));
    }

    #[test]
    fn errors_read_as_gos() {
        for (input, expected) in [
            ("x", r#"parsing time "x" as "2006-01-02T15:04:05Z07:00": cannot parse "x" as "2006""#),
            ("2024-01-01", r#"parsing time "2024-01-01" as "2006-01-02T15:04:05Z07:00": cannot parse "" as "T""#),
            ("2024-13-01T00:00:00Z", r#"parsing time "2024-13-01T00:00:00Z": month out of range"#),
            ("2023-02-29T00:00:00Z", r#"parsing time "2023-02-29T00:00:00Z": day out of range"#),
            ("2024-01-01T00:00:00Zx", r#"parsing time "2024-01-01T00:00:00Zx": extra text: "x""#),
        ] {
            assert_eq!(canonical(input).unwrap_err(), expected);
        }
    }
}
