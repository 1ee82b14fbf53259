//! Kubernetes quantities as numbers, and back in the canonical spelling.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of the unit, rounded up; `None` when the text is no quantity. 128 bits hold exbibytes in thousandths.
pub fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let split = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(split);
    let (negative, number) = match number.as_bytes().first()? {
        b'-' => (true, &number[1..]),
        b'+' => (false, &number[1..]),
        _ => (false, number),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let (base, exponent) = scale(suffix)?;
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let mut value = digits.checked_mul(base)?.checked_mul(1000)?;
    let power = exponent - i32::try_from(fraction.len()).ok()?;
    if power >= 0 {
        value = value.checked_mul(10_i128.checked_pow(u32::try_from(power).ok()?)?)?;
    } else {
        let divisor = 10_i128.checked_pow(u32::try_from(-power).ok()?)?;
        value = value / divisor + i128::from(value % divisor != 0);
    }
    Some(if negative { -value } else { value })
}

/// (binary factor, decimal exponent) of a suffix.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "" => (1, 0),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => (1, suffix.strip_prefix(['e', 'E'])?.parse().ok()?),
    })
}

/// Whole units, rounded up; 0 when the text is no quantity (the API server has validated it).
pub fn value(quantity: &Quantity) -> i64 {
    let milli = milli(&quantity.0).unwrap_or(0);
    i64::try_from(milli.div_euclid(1000) + i128::from(milli.rem_euclid(1000) != 0)).unwrap_or(i64::MAX)
}

/// Thousandths, rounded up; 0 when the text is no quantity.
pub fn milli_value(quantity: &Quantity) -> i64 {
    i64::try_from(milli(&quantity.0).unwrap_or(0)).unwrap_or(i64::MAX)
}

/// Resource lists as the API spells them.
pub type ResourceList = BTreeMap<String, Quantity>;

/// Milli-CPU of a list, `None` when it has no `cpu`.
pub fn cpu_milli(list: Option<&ResourceList>) -> Option<i64> {
    list?.get("cpu").map(milli_value)
}

/// Bytes of memory of a list, `None` when it has no `memory`.
pub fn memory_bytes(list: Option<&ResourceList>) -> Option<i64> {
    list?.get("memory").map(value)
}

/// A CPU quantity: `2`, `1500m`.
pub fn cpu_quantity(milli: i64) -> Quantity {
    Quantity(if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") })
}

/// A byte quantity in the largest binary unit that is exact.
pub fn bytes_quantity(bytes: i64) -> Quantity {
    for (unit, shift) in [("Gi", 30), ("Mi", 20), ("Ki", 10)] {
        if bytes != 0 && bytes % (1 << shift) == 0 {
            return Quantity(format!("{}{unit}", bytes >> shift));
        }
    }
    Quantity(bytes.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_upstream_reads_them() {
        for (text, expected) in [
            ("1", 1000),
            ("100m", 100),
            ("0.5", 500),
            ("1.5Ki", 1_536_000),
            ("2e3", 2_000_000),
            ("1E", 1_000_000_000_000_000_000_000),
            ("1u", 1),
            ("-1", -1000),
            (".5", 500),
        ] {
            assert_eq!(milli(text), Some(expected), "{text}");
        }
        for text in ["", "x", "1x", "-", "1.2.3"] {
            assert_eq!(milli(text), None, "{text}");
        }
        assert_eq!(value(&Quantity("64Mi".into())), 64 << 20);
        assert_eq!(value(&Quantity("1100m".into())), 2);
    }
}
