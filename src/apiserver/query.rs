//! The query of a URL: decoded pairs, and Go's reading of booleans and numbers.

use super::status::Status;
use std::borrow::Cow;

/// Decoded `key=value` pairs in their order.
#[derive(Clone, Debug, Default)]
pub struct Query<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Query<'a> {
    /// Parses what follows the `?`. Pairs that do not decode are left out, as Go does.
    pub fn parse(query: Option<&'a str>) -> Query<'a> {
        let pairs = query.unwrap_or_default().split('&').filter(|p| !p.is_empty());
        Query(
            pairs
                .filter_map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    Some((decode(key, true)?, decode(value, true)?))
                })
                .collect(),
        )
    }

    /// The first value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_ref())
    }

    /// All values of a key.
    pub fn all<'q>(&'q self, key: &'q str) -> impl Iterator<Item = &'q str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_ref())
    }

    /// All pairs.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_ref(), v.as_ref()))
    }

    /// Absent, `0` and `false` are false, everything else is true (also the empty value).
    pub fn bool(&self, key: &str) -> bool {
        self.optional_bool(key).unwrap_or(false)
    }

    /// As [`Query::bool`], telling absent from false.
    pub fn optional_bool(&self, key: &str) -> Option<bool> {
        self.get(key).map(|value| value != "0" && !value.eq_ignore_ascii_case("false"))
    }

    /// A whole number.
    ///
    /// # Errors
    /// 400 with Go's text when it is none.
    pub fn int(&self, key: &str) -> Result<Option<i64>, Status> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.parse::<i64>() {
            Ok(number) => Ok(Some(number)),
            Err(error) => {
                let why = match error.kind() {
                    std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => "value out of range",
                    _ => "invalid syntax",
                };
                let quoted = super::field::quote(value);
                Err(Status::bad_request(format!("strconv.ParseInt: parsing {quoted}: {why}")))
            }
        }
    }
}

/// Percent-decodes; none when an escape is broken or the result is not UTF-8. `plus` reads `+` as a blank.
pub fn decode(text: &str, plus: bool) -> Option<Cow<'_, str>> {
    let bytes = text.as_bytes();
    if !bytes.iter().any(|c| *c == b'%' || (plus && *c == b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let digit = |at: usize| bytes.get(at).and_then(|c| char::from(*c).to_digit(16));
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'%' => {
                let value = digit(at + 1)? * 16 + digit(at + 2)?;
                out.push(u8::try_from(value).ok()?);
                at += 3;
                continue;
            }
            b'+' if plus => out.push(b' '),
            c => out.push(c),
        }
        at += 1;
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

/// Percent-encodes a query value.
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.bytes() {
        if c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(c));
        } else {
            out.push_str(&format!("%{c:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding() {
        let query = Query::parse(Some("a=b%3Dc&watch&x=1+2&bad=%zz&limit=q&f=False"));
        assert_eq!(query.get("a"), Some("b=c"));
        assert!(query.bool("watch"));
        assert!(!query.bool("f"));
        assert_eq!(query.get("x"), Some("1 2"));
        assert_eq!(query.get("bad"), None);
        assert_eq!(query.int("limit").unwrap_err().message(), r#"strconv.ParseInt: parsing "q": invalid syntax"#);
        assert_eq!(encode("a b/ü"), "a%20b%2F%C3%BC");
    }
}
