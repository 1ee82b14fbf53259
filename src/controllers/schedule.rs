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
    /// A field is no set of numbers.
    #[error("failed to parse {0} from field {1}")]
    Field(&'static str, String),
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
            let seconds = seconds(interval).ok_or_else(|| ScheduleError::Descriptor(text.to_owned()))?;
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
            return Err(ScheduleError::Fields(fields.len(), text.to_owned()));
        };
        let restricted = |field: &str| !field.starts_with('*') && field != "?";
        let mut weekdays = set("day of week", weekday, 0, 7, &WEEKDAYS, 0)?;
        weekdays |= (weekdays >> 7) & 1;
        Ok(Schedule {
            minutes: set("minute", minute, 0, 59, &[], 0)?,
            hours: set("hour", hour, 0, 23, &[], 0)?,
            days: set("day of month", day, 1, 31, &[], 0)?,
            months: set("month", month, 1, 12, &MONTHS, 1)?,
            weekdays,
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

/// A field's numbers as bits.
fn set(name: &'static str, field: &str, low: i8, high: i8, names: &[&str], base: i8) -> Result<u64, ScheduleError> {
    let wrong = || ScheduleError::Field(name, field.to_owned());
    let number = |text: &str| {
        let lower = text.to_ascii_lowercase();
        let named = names.iter().position(|name| *name == lower).and_then(|index| i8::try_from(index).ok());
        let value = named.map(|index| index + base).or_else(|| text.parse().ok()).ok_or_else(wrong)?;
        if (low..=high).contains(&value) { Ok(value) } else { Err(wrong()) }
    };
    let mut bits = 0;
    for part in field.split(',') {
        let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
        let (first, last) = match range {
            "*" | "?" => (low, if name == "day of week" { 6 } else { high }),
            _ => match range.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None if step.is_some() => (number(range)?, high),
                None => (number(range)?, number(range)?),
            },
        };
        let step: usize = step.map_or(Ok(1), str::parse).map_err(|_| wrong())?;
        if step == 0 || first > last {
            return Err(wrong());
        }
        for value in (first..=last).step_by(step) {
            bits |= 1 << value;
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
        assert_eq!(next("0 0 * * 7", "2026-02-01T00:00:00Z"), "2026-02-08T00:00:00Z");
        assert_eq!(next("@every 1h30m", start), "2026-02-01T01:29:30Z");
    }

    #[test]
    fn bad_schedules_are_refused() {
        for bad in
            ["", "* * * *", "60 * * * *", "* * 0 * *", "*/0 * * * *", "5-1 * * * *", "x * * * *", "@never", "@every x"]
        {
            assert!(Schedule::parse(bad, TimeZone::UTC).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_time_is_found_without_walking_through_years() {
        let schedule = Schedule::parse("0 5 1 * *", TimeZone::UTC).unwrap();
        let last = schedule.last_before("2026-03-15T00:00:00Z".parse().unwrap()).unwrap();
        assert_eq!(last.to_string(), "2026-03-01T05:00:00Z");
        assert_eq!(schedule.local(last), "2026-03-01T05:00:00Z");
    }
}
