//! Answers as YAML: block style, keys in order, and every string that another reader of YAML could take for something
//! else (a time, a number, a boolean of YAML 1.1) in double quotes.

use serde_json::Value;

/// The document of a value.
pub fn write(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => block(&mut out, value, 0),
        Value::Array(list) if !list.is_empty() => block(&mut out, value, 0),
        _ => {
            scalar(&mut out, value);
            out.push('\n');
        }
    }
    out
}

fn indent(out: &mut String, depth: usize) {
    out.extend(std::iter::repeat_n("  ", depth));
}

/// A map or list that is not empty, from the start of a line.
fn block(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(map) => {
            for (at, (key, value)) in map.iter().enumerate() {
                // The first key of an item stands behind its dash.
                if at > 0 || out.is_empty() || out.ends_with('\n') {
                    indent(out, depth);
                }
                text(out, key);
                out.push(':');
                member(out, value, depth);
            }
        }
        Value::Array(list) => {
            for value in list {
                indent(out, depth);
                out.push_str("- ");
                match value {
                    Value::Object(map) if !map.is_empty() => block(out, value, depth + 1),
                    Value::Array(list) if !list.is_empty() => {
                        out.pop();
                        out.push('\n');
                        block(out, value, depth + 1);
                    }
                    _ => {
                        scalar(out, value);
                        out.push('\n');
                    }
                }
            }
        }
        _ => {}
    }
}

fn member(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            block(out, value, depth + 1);
        }
        // Lists stand at the depth of their key, as Go's writer has them.
        Value::Array(list) if !list.is_empty() => {
            out.push('\n');
            block(out, value, depth);
        }
        _ => {
            out.push(' ');
            scalar(out, value);
            out.push('\n');
        }
    }
}

fn scalar(out: &mut String, value: &Value) {
    match value {
        Value::String(value) => text(out, value),
        Value::Object(_) => out.push_str("{}"),
        Value::Array(_) => out.push_str("[]"),
        other => out.push_str(&other.to_string()),
    }
}

/// Whether a string reads as a string without quotes.
fn is_plain(text: &str) -> bool {
    const WORDS: [&str; 10] = ["true", "false", "yes", "no", "on", "off", "null", "y", "n", "~"];
    let Some(first) = text.bytes().next() else { return false };
    let inside = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'/' | b'-');
    (first.is_ascii_alphabetic() || matches!(first, b'_' | b'/'))
        && text.bytes().all(inside)
        && !WORDS.iter().any(|word| text.eq_ignore_ascii_case(word))
}

fn text(out: &mut String, text: &str) {
    if is_plain(text) {
        out.push_str(text);
    } else {
        // A JSON string is a YAML string.
        out.push_str(&Value::from(text).to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn another_reader_gets_the_same_value() {
        let value = json!({ "a": { "b": [1, { "c": "2026-01-01T00:00:00Z", "d": [] }, [true, "true"]], "e": {} },
            "f:metadata": "multi\nline", "k:{\"name\":\"x\"}": null, "no": "0x1", "plain": "some-text.v1" });
        let written = write(&value);
        assert_eq!(serde_yaml::from_str::<Value>(&written).unwrap(), value, "{written}");
        assert!(written.contains("c: \"2026-01-01T00:00:00Z\"") && written.contains("plain: some-text.v1"));
        assert_eq!(write(&json!({})), "{}\n");
    }
}
