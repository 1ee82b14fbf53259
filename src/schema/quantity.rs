//! `resource.Quantity`: an amount with a suffix (`500m`, `1Gi`, `12e6`), and the spelling upstream stores it in.

use std::cmp::Ordering;
use std::fmt;

/// Upstream's texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    #[error("unable to parse numeric part of quantity")]
    Numeric,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// Which suffixes an amount is written with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notation {
    /// `12e6`
    Exponent,
    /// `12Mi`
    Binary,
    /// `12M`
    Decimal,
}

/// An amount, exact to 10⁻⁹. Amounts beyond ±10²⁹ are capped.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nano: i128,
    pub notation: Notation,
}

const NANO: i128 = 1_000_000_000;
/// Upstream caps amounts in binary notation at the largest `int64`.
const MAX_BINARY: i128 = i64::MAX as i128 * NANO;

impl Quantity {
    /// `units` of one.
    pub fn from_int(units: i64, notation: Notation) -> Quantity {
        Quantity { nano: i128::from(units) * NANO, notation }
    }

    pub fn parse(text: &str) -> Result<Quantity, QuantityError> {
        let parts = split(text)?;
        let (base, exponent, notation) = suffix(parts.suffix)?;
        let digits = || parts.whole.bytes().chain(parts.fraction.bytes());
        let mut mantissa: i128 = 0;
        for digit in digits() {
            mantissa = mantissa.saturating_mul(10).saturating_add(i128::from(digit - b'0'));
        }
        // The value is mantissa * base^exponent / 10^len(fraction), wanted in units of 10^-9 and rounded away from zero.
        let mut power = 9 - parts.fraction.len() as i64;
        if base == 10 {
            power += i64::from(exponent);
        } else {
            mantissa = mantissa.saturating_mul(1i128 << exponent);
        }
        let mut nano = scale(mantissa, power);
        let mut notation = notation;
        if notation == Notation::Binary {
            nano = nano.min(MAX_BINARY);
            if nano > 0 && nano < NANO {
                notation = Notation::Decimal;
            }
        }
        Ok(Quantity { nano: if parts.negative { -nano } else { nano }, notation })
    }

    /// In units of 10⁻⁹.
    pub fn nanos(&self) -> i128 {
        self.nano
    }

    /// Rounded away from zero to whole units, capped to `i64`.
    pub fn value(&self) -> i64 {
        clamp(divide_up(self.nano, NANO))
    }

    /// Rounded away from zero to thousandths, capped to `i64`.
    pub fn milli_value(&self) -> i64 {
        clamp(divide_up(self.nano, NANO / 1000))
    }

    /// The amount rounded away from zero to thousandths; `None` when it has no smaller part.
    pub fn rounded_to_milli(&self) -> Option<Quantity> {
        let unit = NANO / 1000;
        (self.nano % unit != 0).then(|| Quantity { nano: divide_up(self.nano, unit) * unit, notation: self.notation })
    }

    /// Keeps the own notation unless the own amount is zero.
    pub fn add(&mut self, other: Quantity) {
        if self.nano == 0 {
            self.notation = other.notation;
        }
        self.nano = self.nano.saturating_add(other.nano);
    }

    pub fn sub(&mut self, other: Quantity) {
        if self.nano == 0 {
            self.notation = other.notation;
        }
        self.nano = self.nano.saturating_sub(other.nano);
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Quantity) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Quantity) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Quantity) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

/// The canonical spelling: no fraction, the largest suffix that loses nothing.
impl fmt::Display for Quantity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return out.write_str("0");
        }
        let small = self.nano.abs() < 1024 * NANO;
        if self.notation == Notation::Binary && !small && self.nano % NANO == 0 {
            let (mut value, mut power) = (self.nano / NANO, 0);
            while value % 1024 == 0 && power < BINARY.len() - 1 {
                value /= 1024;
                power += 1;
            }
            return write!(out, "{value}{}", BINARY[power]);
        }
        let (mut value, mut exponent) = (self.nano, -9);
        while value % 1000 == 0 && (self.notation == Notation::Exponent || exponent < 18) {
            value /= 1000;
            exponent += 3;
        }
        match (self.notation, exponent) {
            (_, 0) => write!(out, "{value}"),
            (Notation::Exponent, _) => write!(out, "{value}e{exponent}"),
            _ => write!(out, "{value}{}", DECIMAL[((exponent + 9) / 3) as usize]),
        }
    }
}

const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
const DECIMAL: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];

/// The spelling upstream keeps for an input: the input itself when it is short enough already, else the canonical one.
pub fn canonical(text: &str) -> Result<String, QuantityError> {
    let text = text.trim();
    let quantity = Quantity::parse(text)?;
    let parts = split(text)?;
    let (_, exponent, notation) = suffix(parts.suffix)?;
    let digits = format!("{}{}", parts.whole, parts.fraction);
    let length = digits.len() as i32;
    let keep = match notation {
        Notation::Binary => {
            let precision = 15 - parts.whole.len() as i32 - exponent * 3 / 10 - 1;
            let odd = digits.parse::<i64>().is_ok_and(|v| v & 7 != 0);
            parts.fraction.is_empty() && precision >= 0 && odd
        }
        _ => {
            let scale = exponent - parts.fraction.len() as i32;
            let fits = length <= 18 && scale >= -9;
            fits && scale % 3 == 0 && !digits.ends_with("000") && !digits.starts_with('0')
        }
    };
    Ok(if keep && quantity.nano != 0 { text.to_owned() } else { quantity.to_string() })
}

struct Parts<'a> {
    negative: bool,
    /// Without leading zeros, `0` when nothing is left.
    whole: &'a str,
    fraction: &'a str,
    suffix: &'a str,
}

fn split(text: &str) -> Result<Parts<'_>, QuantityError> {
    if text.is_empty() {
        return Err(QuantityError::Format);
    }
    let negative = text.starts_with('-');
    let rest = text.strip_prefix(['-', '+']).unwrap_or(text);
    let rest = rest.trim_start_matches('0');
    let (whole, rest) = rest.split_at(digits(rest));
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits(rest)),
        None => ("", rest),
    };
    let letters = rest.bytes().take_while(|b| b"eEinumkKMGTP".contains(b)).count();
    let after = rest[letters..].strip_prefix(['-', '+']).unwrap_or(&rest[letters..]);
    if digits(after) != after.len() {
        return Err(QuantityError::Format);
    }
    let whole = if whole.is_empty() { "0" } else { whole };
    Ok(Parts { negative, whole, fraction, suffix: rest })
}

fn digits(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_digit).count()
}

/// Base, exponent and notation of a suffix.
fn suffix(text: &str) -> Result<(u32, i32, Notation), QuantityError> {
    if let Some(index) = DECIMAL.iter().position(|s| *s == text) {
        return Ok((10, index as i32 * 3 - 9, Notation::Decimal));
    }
    if let Some(index) = BINARY.iter().position(|s| *s == text) {
        return Ok((2, index as i32 * 10, Notation::Binary));
    }
    let exponent = text.strip_prefix(['e', 'E']).and_then(|e| e.parse::<i32>().ok());
    exponent.map(|e| (10, e, Notation::Exponent)).ok_or(QuantityError::Suffix)
}

/// `value * 10^power`, rounded away from zero, capped.
fn scale(value: i128, power: i64) -> i128 {
    let limit = NANO.pow(4);
    let mut value = value.min(limit * 100);
    if power >= 0 {
        for _ in 0..power.min(40) {
            value = value.saturating_mul(10).min(limit * 100);
        }
        return value;
    }
    let mut exact = true;
    for _ in 0..(-power).min(40) {
        exact &= value % 10 == 0;
        value /= 10;
    }
    value + i128::from(!exact)
}

fn divide_up(value: i128, by: i128) -> i128 {
    let rest = value % by;
    value / by + if rest == 0 { 0 } else { rest.signum() }
}

fn clamp(value: i128) -> i64 {
    value.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_become_what_upstream_stores() {
        let cases = [
            ("0", "0"),
            ("0.0", "0"),
            ("00", "0"),
            ("1000m", "1"),
            ("100m", "100m"),
            ("0.1", "100m"),
            ("0.5", "500m"),
            (".5", "500m"),
            ("1.5", "1500m"),
            ("1.0", "1"),
            ("2000m", "2"),
            ("1500", "1500"),
            ("1000", "1k"),
            ("100k", "100k"),
            ("1024Mi", "1Gi"),
            ("100Mi", "100Mi"),
            ("1024", "1024"),
            ("1.5Gi", "1536Mi"),
            ("0.5Ki", "512"),
            ("1Ki", "1Ki"),
            ("1e3", "1e3"),
            ("1000e3", "1e6"),
            ("12e6", "12e6"),
            ("1E", "1E"),
            ("-1.5", "-1500m"),
            ("0.1n", "1n"),
            (" 1 ", "1"),
            ("4294967296", "4294967296"),
        ];
        for (input, expected) in cases {
            assert_eq!(canonical(input).as_deref(), Ok(expected), "{input}");
        }
    }

    #[test]
    fn malformed_ones_get_upstreams_text() {
        for (input, error) in [
            ("", QuantityError::Format),
            ("abc", QuantityError::Format),
            ("1.2.3", QuantityError::Format),
            ("{}", QuantityError::Format),
            ("1mm", QuantityError::Suffix),
            ("1KiB", QuantityError::Format),
        ] {
            assert_eq!(Quantity::parse(input).unwrap_err(), error, "{input}");
        }
    }

    #[test]
    fn extremes_are_capped_and_not_overflowed() {
        for text in ["1e300", "99999999999999999999999999999999999999999", "8192Ei", "1e-300", "9e2147483647"] {
            let quantity = Quantity::parse(text).unwrap();
            let _ = (quantity.to_string(), quantity.value(), quantity.milli_value());
        }
        assert_eq!(Quantity::parse("8192Ei").unwrap().value(), i64::MAX);
    }

    #[test]
    fn amounts_add_compare_and_round() {
        let mut sum = Quantity::parse("1500m").unwrap();
        sum.add(Quantity::parse("500m").unwrap());
        assert_eq!((sum.to_string().as_str(), sum.value(), sum.milli_value()), ("2", 2, 2000));
        assert!(Quantity::parse("1Gi").unwrap() > Quantity::parse("1G").unwrap());
        assert_eq!(Quantity::parse("1u").unwrap().rounded_to_milli().unwrap().to_string(), "1m");
    }
}
