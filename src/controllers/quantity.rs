//! Quantities as numbers: `250m`, `1.5Gi`, `1e3`.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Nano is the finest suffix.
const NANO: i128 = 1_000_000_000;

/// Value in nanos, rounded up, within what fits; `None` for what is no quantity.
fn nanos(text: &str) -> Option<i128> {
    let text = text.trim();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || whole.len() > 20 {
        return None;
    }
    let (multiplier, divisor) = scale(suffix)?;
    let fraction = &fraction[..fraction.len().min(18)];
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let denominator = 10i128.checked_pow(u32::try_from(fraction.len()).ok()?)?.checked_mul(divisor)?;
    let numerator = digits.checked_mul(multiplier)?.checked_mul(NANO);
    let value = match numerator {
        Some(numerator) => numerator.div_euclid(denominator) + i128::from(numerator.rem_euclid(denominator) != 0),
        None => i128::from(i64::MAX) * NANO,
    };
    Some(if negative { -value } else { value })
}

/// Multiplier and divisor of a suffix.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, NANO),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (NANO, 1),
        "T" => (1_000 * NANO, 1),
        "P" => (1_000_000 * NANO, 1),
        "E" => (NANO * NANO, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10i128.checked_pow(exponent.unsigned_abs().min(18))?;
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    })
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

fn divide_up(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

/// The value in thousandths, rounded up; 0 for what is no quantity.
pub fn milli(quantity: &Quantity) -> i64 {
    nanos(&quantity.0).map_or(0, |nanos| clamp(divide_up(nanos, 1_000_000)))
}

/// The value in whole units, rounded up; 0 for what is no quantity.
pub fn units(quantity: &Quantity) -> i64 {
    nanos(&quantity.0).map_or(0, |nanos| clamp(divide_up(nanos, NANO)))
}

/// Whether the text is a quantity.
pub fn is_quantity(text: &str) -> bool {
    nanos(text).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_in_all_their_spellings() {
        let quantity = |text: &str| Quantity(text.to_owned());
        for (text, expected) in [
            ("250m", 250),
            ("1", 1000),
            ("0.1", 100),
            ("1.5Ki", 1_536_000),
            ("1e3", 1_000_000),
            ("2E-3", 2),
            ("100u", 1),
            ("-1", -1000),
            (".5", 500),
        ] {
            assert_eq!(milli(&quantity(text)), expected, "{text}");
        }
        assert_eq!(units(&quantity("128Mi")), 128 << 20);
        assert_eq!(units(&quantity("1m")), 1);
        assert_eq!(units(&quantity("100E")), i64::MAX);
        for text in ["", "x", "1.2.3", "1Zi", "m"] {
            assert!(!is_quantity(text), "{text}");
        }
    }
}
