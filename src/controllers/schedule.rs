//! Cron schedules: five fields, names, steps, and the `@` forms.

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

/// Why a schedule cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// Not five fields.
    #[error("expected exactly 5 fields, found {0}: {1}")]
    Fields(usize, String),
    /// A number of a field is none.
    #[error("failed to parse int from {0}: strconv.Atoi: parsing \"{0}\": invalid syntax")]
    Number(String),
    /// A range of a field is none.
    #[error("{0}: {1}")]
    Range(String, String),
    /// The interval of `@every` is no duration.
    #[error("failed to parse duration {0}")]
    Duration(String),
    /// An `@` form that does not exist.
    #[error("unrecognized descriptor: {0}")]
    Descriptor(String),
}

/// When something is to happen.
#[derive(Debug)]
pub struct Schedule {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Days of month and week are both restricted: either one will do.
    either_day: bool,
    every: Option<i64>,
    zone: TimeZone,
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

impl Schedule {
    /// Reads a schedule, to be understood in a time zone.
    pub fn parse(text: &str, zone: TimeZone) -> Result<Schedule, ScheduleError> {
        let text = text.trim();
        let expanded = match text {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            _ => text,
        };
        if let Some(interval) = expanded.strip_prefix("@every ") {
            let seconds = seconds(interval).ok_or_else(|| ScheduleError::Duration(text.to_owned()))?;
            let all = u64::MAX;
            let every = Some(seconds.max(1));
            return Ok(Schedule {
                minutes: all,
                hours: all,
                days: all,
                months: all,
                weekdays: all,
                either_day: false,
                every,
                zone,
            });
        }
        if expanded.starts_with('@') {
            return Err(ScheduleError::Descriptor(text.to_owned()));
        }
        let fields: Vec<&str> = expanded.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields[..] else {
            return Err(ScheduleError::Fields(fields.len(), format!("[{}]", fields.join(" "))));
        };
        let restricted = |field: &str| !field.starts_with('*') && field != "?";
        Ok(Schedule {
            minutes: set(minute, 0, 59, &[])?,
            hours: set(hour, 0, 23, &[])?,
            days: set(day, 1, 31, &[])?,
            months: set(month, 1, 12, &MONTHS)?,
            weekdays: set(weekday, 0, 6, &WEEKDAYS)?,
            either_day: restricted(day) && restricted(weekday),
            every: None,
            zone,
        })
    }

    /// The first time after `after`; `None` when there is none within five years.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        if let Some(every) = self.every {
            return Timestamp::from_second(after.as_second() + every).ok();
        }
        let start = self.zone.to_datetime(after);
        let mut date = start.date();
        let mut from = (start.hour(), start.minute() + 1);
        for _ in 0..(5 * 366) {
            if self.has_day(date) {
                for hour in (from.0..24).filter(|hour| has(self.hours, *hour)) {
                    let first = if hour == from.0 { from.1 } else { 0 };
                    for minute in (first..60).filter(|minute| has(self.minutes, *minute)) {
                        let time =
                            self.zone.to_timestamp(DateTime::from_parts(date, jiff::civil::time(hour, minute, 0, 0)));
                        // A time that the clocks skip, or one in the hour that they repeat, may lie before.
                        if let Some(time) = time.ok().filter(|time| *time > after) {
                            return Some(time);
                        }
                    }
                }
            }
            date = date.checked_add(1.day()).ok()?;
            from = (0, 0);
        }
        None
    }

    /// The last time up to `now`; looks back at most a year or so.
    pub fn last_before(&self, now: Timestamp) -> Option<Timestamp> {
        let mut window = 3600;
        while window < 400 * 86400 {
            let mut time = self.next(Timestamp::from_second(now.as_second() - window).ok()?)?;
            if time <= now {
                while let Some(next) = self.next(time).filter(|next| *next <= now) {
                    time = next;
                }
                return Some(time);
            }
            window *= 24;
        }
        None
    }

    /// A time as people in the schedule's zone write it.
    pub fn local(&self, time: Timestamp) -> String {
        let zoned = time.to_zoned(self.zone.clone());
        if zoned.offset().is_zero() {
            return jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", time).unwrap_or_default();
        }
        jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%S%:z", &zoned).unwrap_or_default()
    }

    fn has_day(&self, date: Date) -> bool {
        let of_month = has(self.days, date.day());
        let of_week = has(self.weekdays, date.weekday().to_sunday_zero_offset());
        let day = if self.either_day { of_month || of_week } else { of_month && of_week };
        day && has(self.months, date.month())
    }
}

fn has(set: u64, value: i8) -> bool {
    set & (1 << value) != 0
}

/// `1h30m`, `90s`.
fn seconds(text: &str) -> Option<i64> {
    let (mut total, mut number) = (0i64, String::new());
    for character in text.trim().chars() {
        if character.is_ascii_digit() {
            number.push(character);
            continue;
        }
        let value: i64 = number.parse().ok()?;
        number.clear();
        total += match character {
            'h' => value.checked_mul(3600)?,
            'm' => value.checked_mul(60)?,
            's' => value,
            _ => return None,
        };
    }
    (number.is_empty() && total > 0).then_some(total)
}

/// A field's numbers as bits. `names` stand for the numbers from `low` on.
fn set(field: &str, low: u8, high: u8, names: &[&str]) -> Result<u64, ScheduleError> {
    let number = |text: &str| -> Result<u32, ScheduleError> {
        let lower = text.to_ascii_lowercase();
        let named = names.iter().position(|name| *name == lower).and_then(|index| u32::try_from(index).ok());
        let number = named.map(|index| index + u32::from(low)).or_else(|| text.parse().ok());
        number.ok_or_else(|| ScheduleError::Number(text.to_owned()))
    };
    let (low, high) = (u32::from(low), u32::from(high));
    let mut bits = 0;
    for part in field.split(',') {
        let wrong = |why: String| ScheduleError::Range(why, part.to_owned());
        let mut slashes = part.split('/');
        let (range, step) = (slashes.next().unwrap_or_default(), slashes.next());
        if slashes.next().is_some() {
            return Err(wrong("too many slashes".to_owned()));
        }
        let ends: Vec<&str> = range.split('-').collect();
        let (first, last) = match ends[..] {
            ["*" | "?"] => (low, high),
            [one] if step.is_some() => (number(one)?, high),
            [one] => (number(one)?, number(one)?),
            [first, last] => (number(first)?, number(last)?),
            _ => return Err(wrong("too many hyphens".to_owned())),
        };
        let step = step.map_or(Ok(1), number)?;
        if first < low {
            return Err(wrong(format!("beginning of range ({first}) below minimum ({low})")));
        }
        if last > high {
            return Err(wrong(format!("end of range ({last}) above maximum ({high})")));
        }
        if first > last {
            return Err(wrong(format!("beginning of range ({first}) beyond end of range ({last})")));
        }
        if step == 0 {
            return Err(wrong("step of range should be a positive number".to_owned()));
        }
        let mut value = first;
        while value <= last {
            bits |= 1 << value;
            value = value.saturating_add(step);
        }
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, after: &str) -> String {
        let schedule = Schedule::parse(schedule, TimeZone::UTC).unwrap();
        schedule.next(after.parse().unwrap()).unwrap().to_string()
    }

    #[test]
    fn schedules_mean_what_cron_means() {
        let start = "2026-01-31T23:59:30Z";
        assert_eq!(next("* * * * *", start), "2026-02-01T00:00:00Z");
        assert_eq!(next("*/15 3-5 * * *", start), "2026-02-01T03:00:00Z");
        assert_eq!(next("30 9 * * mon-fri", start), "2026-02-02T09:30:00Z");
        assert_eq!(next("0 0 29 feb *", start), "2028-02-29T00:00:00Z");
        // Restricted in both, either day will do: the 13th or any Friday.
        assert_eq!(next("0 0 13 * 5", start), "2026-02-06T00:00:00Z");
        assert_eq!(next("@weekly", start), "2026-02-01T00:00:00Z");
        assert_eq!(next("@every 1h30m", start), "2026-02-01T01:29:30Z");
    }

    #[test]
    fn bad_schedules_are_refused() {
        for bad in
            ["", "* * * *", "60 * * * *", "* * 0 * *", "*/0 * * * *", "5-1 * * * *", "x * * * *", "@never", "@every x"]
        {
            assert!(Schedule::parse(bad, TimeZone::UTC).is_err(), "{bad}");
        }
        let why = |text: &str| Schedule::parse(text, TimeZone::UTC).unwrap_err().to_string();
        assert_eq!(why("* * *"), "expected exactly 5 fields, found 3: [* * *]");
        assert_eq!(why("61 * * * *"), "end of range (61) above maximum (59): 61");
        assert_eq!(why("* x * * *"), "failed to parse int from x: strconv.Atoi: parsing \"x\": invalid syntax");
    }

    #[test]
    fn the_last_time_is_found_without_walking_through_years() {
        let schedule = Schedule::parse("0 5 1 * *", TimeZone::UTC).unwrap();
        let last = schedule.last_before("2026-03-15T00:00:00Z".parse().unwrap()).unwrap();
        assert_eq!(last.to_string(), "2026-03-01T05:00:00Z");
        assert_eq!(schedule.local(last), "2026-03-01T05:00:00Z");
    }
}
