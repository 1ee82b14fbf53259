//! The names of servers among themselves. A server is its id, whatever its addresses are: its client certificate carries the id
//! in the common name, its serving certificate in a DNS name that no resolver knows.

use crate::auth::UserInfo;

/// Group of the client certificates of servers; no certificate request of others is granted it.
pub const GROUP: &str = "system:coracle:servers";
/// What the common name begins with; the id follows as 16 hexadecimal digits.
const USER: &str = "system:coracle:server:";
/// What the DNS name of a serving certificate ends with.
pub const DOMAIN: &str = ".server.coracle.internal";

/// Common name of the client certificate of a server.
pub fn user(id: u64) -> String {
    format!("{USER}{id:016x}")
}

/// DNS name in the serving certificate of a server, whatever its addresses.
pub fn dns_name(id: u64) -> String {
    format!("{id:016x}{DOMAIN}")
}

/// The id of the server that a verified client certificate names.
pub fn id_of_user(info: &UserInfo) -> Option<u64> {
    let digits = info.name.strip_prefix(USER)?;
    let plain = digits.len() == 16 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let ours = info.groups.iter().any(|group| group == GROUP);
    if plain && ours { u64::from_str_radix(digits, 16).ok() } else { None }
}

/// Whether a certificate with these names would pass for a server; nobody else may have one.
pub fn is_reserved(common_name: &str, organizations: &[String], dns_names: &[String]) -> bool {
    common_name.starts_with("system:coracle:")
        || organizations.iter().any(|group| group.starts_with("system:coracle:"))
        || dns_names.iter().any(|name| name.trim_end_matches('.').to_ascii_lowercase().ends_with(DOMAIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_its_id() {
        let info = |name: &str, group: &str| UserInfo {
            name: name.to_owned(),
            groups: vec![group.to_owned()],
            ..UserInfo::default()
        };
        assert_eq!(id_of_user(&info(&user(0xab), GROUP)), Some(0xab));
        assert_eq!(id_of_user(&info(&user(u64::MAX), GROUP)), Some(u64::MAX));
        assert_eq!(id_of_user(&info(&user(1), "dev")), None);
        for name in ["system:coracle:server:1", "system:coracle:server:+000000000000001", "system:node:a"] {
            assert_eq!(id_of_user(&info(name, GROUP)), None, "{name}");
        }
        assert_eq!(dns_name(1), "0000000000000001.server.coracle.internal");
    }

    #[test]
    fn nobody_else_gets_such_names() {
        assert!(is_reserved("system:coracle:server:0000000000000001", &[], &[]));
        assert!(is_reserved("x", &["system:coracle:servers".into()], &[]));
        assert!(is_reserved("x", &[], &["0000000000000001.Server.coracle.internal.".into()]));
        assert!(!is_reserved("system:node:n1", &["system:nodes".into()], &["n1".into()]));
    }
}
