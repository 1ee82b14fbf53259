//! `?timeout=`: how long a request may take. Watches, logs and connections that stay open have no such limit.

use super::query::Query;
use super::status::Status;
use std::future::Future;
use std::time::Duration;

/// Upstream's `--request-timeout`: what requests get that ask for nothing, and the most that any gets.
const LONGEST: Duration = Duration::from_secs(60);

/// The time a request has.
///
/// # Errors
/// 400 when the parameter is no duration.
pub fn of(query: &Query<'_>) -> Result<Duration, Status> {
    let Some(text) = query.get("timeout").filter(|text| !text.is_empty()) else { return Ok(LONGEST) };
    match parse(text) {
        None => {
            let why = format!("invalid timeout specified in the request URL - time: invalid duration {text:?}");
            Err(Status::bad_request(why))
        }
        Some(Duration::ZERO) => Ok(LONGEST),
        Some(wanted) => Ok(wanted.min(LONGEST)),
    }
}

/// Runs a request for at most so long; a write that is already on its way may still happen, as with any lost answer.
///
/// # Errors
/// 504 when the time is over.
pub async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(limit, work).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::timeout("request did not complete within the allotted timeout", 0)),
    }
}

/// A duration as Go writes it: `1m30s`, `500ms`, `1.5h`, `0`.
fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut total) = (text.strip_prefix('+').unwrap_or(text), 0f64);
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..number].parse().ok()?;
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        total += value
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(total).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let limit = |text: &str| of(&Query::parse(Some(text)));
        assert_eq!(limit("").unwrap(), LONGEST);
        assert_eq!(limit("timeout=1500ms").unwrap(), Duration::from_millis(1500));
        assert_eq!(limit("timeout=30s").unwrap(), Duration::from_secs(30));
        assert_eq!(limit("timeout=1h2m").unwrap(), LONGEST);
        for bad in ["timeout=30", "timeout=x", "timeout=-1s", "timeout=5y", "timeout=1..2s"] {
            assert_eq!(limit(bad).unwrap_err().code(), 400, "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_is_told_so() {
        let slow = within(Duration::from_secs(1), std::future::pending::<Result<(), Status>>()).await;
        assert_eq!(slow.unwrap_err().code(), 504);
        assert!(within(Duration::from_secs(1), async { Ok::<_, Status>(()) }).await.is_ok());
    }
}
