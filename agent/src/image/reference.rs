//! Names of images, normalised as docker does: `busybox` is `docker.io/library/busybox:latest`.
//!
//! The grammar is that of `github.com/distribution/reference`.

use super::{ImageError, ImageResult};

/// A full name: `domain/path` with a tag, a digest, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `docker.io/library/busybox`.
    pub name: String,
    pub tag: Option<String>,
    /// `sha256:<64 hexadecimal digits>`.
    pub digest: Option<String>,
}

impl Reference {
    /// Understands a name as users write it. Without tag and digest the tag is `latest`.
    pub fn parse(text: &str) -> ImageResult<Self> {
        let invalid = |why| ImageError::InvalidName { image: text.to_owned(), why };
        if is_identifier(text) {
            return Err(invalid("invalid reference format: repository name cannot be a 64-byte hexadecimal string"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) if is_digest(digest) => (rest, Some(digest.to_owned())),
            Some(_) => return Err(invalid("invalid reference format")),
            None => (text, None),
        };
        // A colon behind the last slash starts the tag; one before it belongs to the port of the domain.
        let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (path, tag) = match rest[name_end..].find(':') {
            Some(colon) => (&rest[..name_end + colon], Some(&rest[name_end + colon + 1..])),
            None => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(invalid("invalid reference format"));
        }
        let (domain, path) = split_domain(path);
        if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(invalid("invalid reference format: repository name must be lowercase"));
        }
        if !is_domain(&domain) || !path.split('/').all(is_component) || domain.len() + 1 + path.len() > 255 {
            return Err(invalid("invalid reference format"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self { name: format!("{domain}/{path}"), tag, digest })
    }

    /// `name:tag`, when there is a tag.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.name))
    }

    /// `name@digest`, when there is a digest.
    pub fn digested(&self) -> Option<String> {
        self.digest.as_ref().map(|digest| format!("{}@{digest}", self.name))
    }
}

/// 64 hexadecimal digits: an id without its algorithm.
pub fn is_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// `sha256:` with 64 hexadecimal digits.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(is_identifier)
}

fn split_domain(path: &str) -> (String, String) {
    match path.split_once('/') {
        Some((domain, rest))
            if domain.contains(['.', ':'])
                || domain == "localhost"
                || domain.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            if domain == "index.docker.io" || domain == "docker.io" {
                let rest = if rest.contains('/') { rest.to_owned() } else { format!("library/{rest}") };
                return ("docker.io".to_owned(), rest);
            }
            (domain.to_owned(), rest.to_owned())
        }
        Some(_) => ("docker.io".to_owned(), path.to_owned()),
        None => ("docker.io".to_owned(), format!("library/{path}")),
    }
}

fn is_tag(tag: &str) -> bool {
    let mut bytes = tag.bytes();
    tag.len() <= 128
        && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) => {
                return address.parse::<std::net::Ipv6Addr>().is_ok()
                    && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
            }
            None => return false,
        },
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    port.is_none_or(is_port)
        && host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// Lower-case letters and digits with single separators `.`, `_`, `__` or dashes between them.
fn is_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    bytes
        .split(|byte| alphanumeric(*byte))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> String {
        let reference = Reference::parse(text).unwrap();
        reference.digested().or_else(|| reference.tagged()).unwrap()
    }

    #[test]
    fn short_names_are_completed() {
        assert_eq!(full("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(full("user/app:1.2"), "docker.io/user/app:1.2");
        assert_eq!(full("docker.io/busybox"), "docker.io/library/busybox:latest");
        assert_eq!(full("index.docker.io/a/b"), "docker.io/a/b:latest");
        assert_eq!(full("localhost/app"), "localhost/app:latest");
        assert_eq!(full("127.0.0.1:5000/a/b:t"), "127.0.0.1:5000/a/b:t");
        assert_eq!(full("[::1]:5000/a:t"), "[::1]:5000/a:t");
        assert_eq!(
            full("registry.k8s.io/e2e-test-images/busybox:1.37.0-1"),
            "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
        );
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(full(&format!("busybox:1@{digest}")), format!("docker.io/library/busybox@{digest}"));
    }

    #[test]
    fn bad_names_are_refused() {
        for text in ["", "a:", "UPPER", "a/Upper", "-a", "a..b", "a/", "/a", "a@sha256:12", "a:b:c", "x y", "a:-t"] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
        assert!(Reference::parse(&"0".repeat(64)).is_err());
        let error = Reference::parse("Bad").unwrap_err();
        assert_eq!(error.reason(), "InvalidImageName");
    }
}
