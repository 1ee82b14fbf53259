//! `$(VAR)` in environment values, commands, arguments and subPathExpr.

/// Replaces references; `$$` stands for `$`, an unknown reference stays as it is.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    try_expand(text, |name| Ok::<_, std::convert::Infallible>(lookup(name))).unwrap_or_else(|never| match never {})
}

/// As [`expand`], but an unknown reference is an error.
///
/// # Errors
/// The name that has no value.
pub fn expand_strict(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    try_expand(text, |name| lookup(name).map(Some).ok_or_else(|| name.to_owned()))
}

fn try_expand<E>(text: &str, lookup: impl Fn(&str) -> Result<Option<String>, E>) -> Result<String, E> {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            result.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match lookup(name)? {
                Some(value) => result.push_str(&value),
                None => result.push_str(&rest[at..at + name.len() + 3]),
            }
            rest = tail;
        } else {
            result.push('$');
            rest = after;
        }
    }
    result.push_str(rest);
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand_as_upstream_expands_them() {
        let lookup = |name: &str| (name == "A").then(|| "1".to_owned());
        for (text, expected) in [
            ("$(A)-$(A)", "1-1"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(B)", "$(B)"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("a$b", "a$b"),
            ("$()", "$()"),
        ] {
            assert_eq!(expand(text, lookup), expected, "{text}");
        }
        assert_eq!(expand_strict("x/$(B)", lookup), Err("B".to_owned()));
    }
}
