//! Faults of probes and life cycle hooks.

use serde_json::Value;

use super::container::port_name;
use crate::apiserver::field::{ErrorList, FieldError};
use crate::strategy::value::{int, list, text};

const NOT_NEGATIVE: &str = "must be greater than or equal to 0";

/// The three probes of a container.
pub(super) fn probes(container: &Value, grace: Option<i64>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = &container[key];
        if probe.is_null() {
            continue;
        }
        let at = format!("{field}.{key}");
        errors.extend(handler(probe, grace, &at));
        for number in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
        {
            if let Some(n) = int(probe, &format!("/{number}")).filter(|n| *n < 0) {
                errors.push(FieldError::invalid(format!("{at}.{number}"), n, NOT_NEGATIVE));
            }
        }
        if let Some(n) = int(probe, "/terminationGracePeriodSeconds") {
            if key == "readinessProbe" {
                let text = "must not be set for readinessProbes";
                errors.push(FieldError::invalid(format!("{at}.terminationGracePeriodSeconds"), n, text));
            } else if n <= 0 {
                errors.push(FieldError::invalid(
                    format!("{at}.terminationGracePeriodSeconds"),
                    n,
                    "must be greater than 0",
                ));
            }
        }
        if key != "readinessProbe"
            && let Some(n) = int(probe, "/successThreshold").filter(|n| *n != 1)
        {
            errors.push(FieldError::invalid(format!("{at}.successThreshold"), n, "must be 1"));
        }
    }
    errors
}

/// postStart and preStop.
pub(super) fn lifecycle(lifecycle: &Value, grace: Option<i64>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for key in ["postStart", "preStop"] {
        if !lifecycle[key].is_null() {
            errors.extend(handler(&lifecycle[key], grace, &format!("{field}.{key}")));
        }
    }
    errors
}

/// Exactly one of the ways to act or to ask.
fn handler(handler: &Value, grace: Option<i64>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut found = false;
    for key in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let action = &handler[key];
        if action.is_null() {
            continue;
        }
        let at = format!("{field}.{key}");
        if found {
            errors.push(FieldError::forbidden(at, "may not specify more than 1 handler type"));
            continue;
        }
        found = true;
        match key {
            "exec" if list(action, "/command").is_empty() => {
                errors.push(FieldError::required(format!("{at}.command"), ""));
            }
            "httpGet" => {
                if text(action, "/path").is_empty() {
                    errors.push(FieldError::required(format!("{at}.path"), ""));
                }
                errors.extend(port(&action["port"], &format!("{at}.port")));
                let scheme = text(action, "/scheme");
                if !["HTTP", "HTTPS"].contains(&scheme) {
                    errors.push(FieldError::not_supported(format!("{at}.scheme"), scheme, &["HTTP", "HTTPS"]));
                }
                for (i, header) in list(action, "/httpHeaders").iter().enumerate() {
                    let name = text(header, "/name");
                    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                        let text = "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is '[-A-Za-z0-9]+')";
                        errors.push(FieldError::invalid(format!("{at}.httpHeaders[{i}].name"), name, text));
                    }
                }
            }
            "tcpSocket" => errors.extend(port(&action["port"], &format!("{at}.port"))),
            "grpc" => errors.extend(port(&action["port"], &format!("{at}.port"))),
            "sleep" => {
                let seconds = int(action, "/seconds").unwrap_or(0);
                if seconds < 0 || grace.is_some_and(|grace| seconds > grace) {
                    let text = "must be non-negative and less than terminationGracePeriodSeconds".to_owned()
                        + &format!(" ({})", grace.unwrap_or(0));
                    errors.push(FieldError::invalid(at, seconds, text));
                }
            }
            _ => {}
        }
    }
    if !found {
        errors.push(FieldError::required(field, "must specify a handler type"));
    }
    errors
}

fn port(port: &Value, field: &str) -> ErrorList {
    match port {
        Value::String(name) => {
            port_name(name).into_iter().map(|f| FieldError::invalid(field, name.as_str(), f)).collect()
        }
        number if number.as_i64().is_some_and(|n| (1..=65535).contains(&n)) => ErrorList::new(),
        other => {
            let number = other.as_i64().unwrap_or(0);
            vec![FieldError::invalid(field, number, "must be between 1 and 65535, inclusive")]
        }
    }
}
