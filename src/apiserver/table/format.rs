//! How values read in cells: ages, labels, lists.

use crate::apiserver::object::meta;
use jiff::Timestamp;
use serde_json::{Value, json};

/// An object's member at a JSON pointer as text; empty when absent.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A number; 0 when absent.
pub fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

/// A boolean; false when absent.
pub fn flag(object: &Value, pointer: &str) -> bool {
    object.pointer(pointer).and_then(Value::as_bool).unwrap_or(false)
}

/// The items of a list; none when absent.
pub fn items<'a>(object: &'a Value, pointer: &str) -> impl DoubleEndedIterator<Item = &'a Value> + ExactSizeIterator {
    object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default().iter()
}

/// Text, or `instead` when there is none.
pub fn or<'a>(text: &'a str, instead: &'a str) -> &'a str {
    if text.is_empty() { instead } else { text }
}

/// A string, number or boolean as text.
pub fn scalar(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// The name.
pub fn name(object: &Value) -> Value {
    json!(meta(object, "name"))
}

/// The age of an object.
pub fn age(object: &Value) -> Value {
    json!(since(meta(object, "creationTimestamp")))
}

/// How long ago a time was; `<unknown>` for none.
pub fn since(time: &str) -> String {
    match time.parse::<Timestamp>() {
        Ok(time) => human_duration(Timestamp::now().duration_since(time).as_secs()),
        Err(_) => "<unknown>".to_owned(),
    }
}

/// Seconds between two times; none when one does not parse.
pub fn between(from: &str, to: &str) -> Option<i64> {
    let (from, to) = (from.parse::<Timestamp>().ok()?, to.parse::<Timestamp>().ok()?);
    Some(to.duration_since(from).as_secs())
}

/// Seconds in two units at most (`k8s.io/apimachinery/pkg/util/duration`).
pub fn human_duration(seconds: i64) -> String {
    let pair = |big: i64, unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{unit}"),
        _ => format!("{big}{unit}{small}{small_unit}"),
    };
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match () {
        () if seconds < -1 => "<invalid>".to_owned(),
        () if seconds < 0 => "0s".to_owned(),
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => pair(minutes, "m", seconds % 60, "s"),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => pair(hours, "h", minutes % 60, "m"),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 24 * 8 => pair(hours / 24, "d", hours % 24, "h"),
        () if hours < 24 * 365 * 2 => format!("{}d", hours / 24),
        () if hours < 24 * 365 * 8 => pair(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        () => format!("{}y", hours / 24 / 365),
    }
}

/// A map of labels: `a=b,c=d`, `<none>` when empty.
pub fn labels(object: &Value, pointer: &str) -> String {
    let map = object.pointer(pointer).and_then(Value::as_object);
    let pairs: Vec<String> =
        map.into_iter().flatten().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    or(&pairs.join(","), "<none>").to_owned()
}

/// A `metav1.LabelSelector`: `a=b,c in (d,e)`, `<none>` when absent or empty.
pub fn selector(object: &Value, pointer: &str) -> String {
    let selector = object.pointer(pointer);
    or(&crate::apiserver::subresource::scale::selector_text(selector), "<none>").to_owned()
}

/// Names and images of containers.
pub fn containers(object: &Value, pointer: &str) -> [Value; 2] {
    let join = |key: &str| items(object, pointer).map(|c| text(c, key)).collect::<Vec<_>>().join(",");
    [json!(join("/name")), json!(join("/image"))]
}

/// The first `max` items and how many more there are; `<unset>` (or what `empty` says) when there are none.
pub fn some(all: &[String], max: usize, empty: &str) -> String {
    if all.len() > max {
        return format!("{} + {} more...", all[..max].join(","), all.len() - max);
    }
    or(&all.join(","), empty).to_owned()
}

/// Whether a condition of the status is `True`.
pub fn condition(object: &Value, kind: &str) -> bool {
    items(object, "/status/conditions").any(|c| c["type"] == kind && c["status"] == "True")
}

/// Access modes of a volume in short: `RWO,ROX`.
pub fn access_modes(object: &Value, pointer: &str) -> String {
    let has = |mode: &str| items(object, pointer).any(|m| m == mode);
    [("ReadWriteOnce", "RWO"), ("ReadOnlyMany", "ROX"), ("ReadWriteMany", "RWX"), ("ReadWriteOncePod", "RWOP")]
        .into_iter()
        .filter(|(mode, _)| has(mode))
        .map(|(_, short)| short)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_lists() {
        for (seconds, text) in [
            (-5, "<invalid>"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (3600, "60m"),
            (4 * 3600 + 60, "4h1m"),
            (50 * 3600, "2d2h"),
            (10 * 86400, "10d"),
            (3 * 365 * 86400 + 86400, "3y1d"),
        ] {
            assert_eq!(human_duration(seconds), text);
        }
        let all: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        assert_eq!(some(&all, 3, "<unset>"), "a,b,c + 1 more...");
        assert_eq!(some(&[], 3, "<unset>"), "<unset>");
    }
}
