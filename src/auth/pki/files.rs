//! What the server writes for people and tools: copies of the CA certificates, the join tokens, kubeconfigs. All by rename,
//! so that a reader sees the old file or the new one, and only when something changed.

use super::{ClusterKeys, JoinToken, LeafRequest, PkiError, Usage};
use base64::{Engine, engine::general_purpose::STANDARD};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A kubeconfig is written anew when its certificate ends within this time.
const RENEW_BEFORE: Duration = Duration::from_secs(120 * 24 * 60 * 60);

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> PkiError + '_ {
    move |source| PkiError::File { path: path.to_owned(), source }
}

/// Writes `bytes` to `path` through a temporary file in the same directory, synced before and after the rename.
/// Directories that are missing are made with mode 0700.
pub fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PkiError> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        let _ = std::fs::remove_file(&temporary);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        // The umask may have taken bits that the caller asked for.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        std::fs::File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(failed(path))
}

/// [`write_durably`], unless the file holds just that already.
pub fn write_if_changed(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PkiError> {
    let same_mode = std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o7777 == mode);
    if same_mode && std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    write_durably(path, bytes, mode)
}

/// Writes `server/tls/{server-ca,client-ca,request-header-ca}.crt`, `server/token` and `server/agent-token` under
/// `data_dir`. Private keys of the authorities are not among them: they exist on disk only sealed.
pub fn write_data_dir(data_dir: &Path, keys: &ClusterKeys) -> Result<(), PkiError> {
    let server = data_dir.join("server");
    let bundle = keys.server_ca.certificate_pem();
    for (name, authority) in [
        ("server-ca.crt", &keys.server_ca),
        ("client-ca.crt", &keys.client_ca),
        ("request-header-ca.crt", &keys.request_header_ca),
    ] {
        write_if_changed(&server.join("tls").join(name), authority.certificate_pem().as_bytes(), 0o644)?;
    }
    for (name, user, secret) in [("token", "server", &keys.server_secret), ("agent-token", "node", &keys.agent_secret)]
    {
        let token = format!("{}\n", JoinToken::new(bundle, user, secret));
        write_if_changed(&server.join(name), token.as_bytes(), 0o600)?;
    }
    Ok(())
}

/// Whom a kubeconfig logs in.
pub struct KubeconfigUser<'a> {
    /// CN of the client certificate.
    pub name: &'a str,
    /// O of the client certificate.
    pub group: Option<&'a str>,
}

/// The administrator of the cluster: member of `system:masters`.
pub const ADMIN: KubeconfigUser<'static> =
    KubeconfigUser { name: "system:admin", group: Some(crate::auth::identity::SYSTEM_MASTERS) };

/// A kubeconfig with a fresh client certificate, all credentials inline, one context `default`.
pub fn kubeconfig(
    keys: &ClusterKeys,
    server_url: &str,
    user: &KubeconfigUser<'_>,
    now: SystemTime,
) -> Result<String, PkiError> {
    let request = LeafRequest { common_name: user.name, organization: user.group, names: &[], usage: Usage::Client };
    let leaf = keys.client_ca.issue(&request, now)?;
    let ca = STANDARD.encode(keys.server_ca.certificate_pem());
    let chain = STANDARD.encode(format!("{}{}", leaf.certificate_pem, keys.client_ca.certificate_pem()));
    let key = STANDARD.encode(leaf.key_pem());
    Ok(format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca}\n    server: {server_url}\n  \
         name: default\ncontexts:\n- context:\n    cluster: default\n    user: default\n  name: default\n\
         current-context: default\nkind: Config\nusers:\n- name: default\n  user:\n    \
         client-certificate-data: {chain}\n    client-key-data: {key}\n"
    ))
}

/// Writes the kubeconfig to `path` with `mode` unless the file there still serves: same server, same authorities,
/// certificate good for months.
pub fn write_kubeconfig(
    path: &Path,
    mode: u32,
    keys: &ClusterKeys,
    server_url: &str,
    user: &KubeconfigUser<'_>,
    now: SystemTime,
) -> Result<(), PkiError> {
    if std::fs::read_to_string(path).is_ok_and(|text| still_serves(&text, keys, server_url, now)) {
        let metadata = std::fs::metadata(path).map_err(failed(path))?;
        if metadata.permissions().mode() & 0o7777 != mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed(path))?;
        }
        return Ok(());
    }
    write_durably(path, kubeconfig(keys, server_url, user, now)?.as_bytes(), mode)
}

/// Writes the kubeconfig at `path` anew if its certificate, one of this cluster's, is near its end or not valid yet. What
/// else a user did to the file is left alone until then.
pub fn renew_kubeconfig(
    path: &Path,
    mode: u32,
    keys: &ClusterKeys,
    server_url: &str,
    user: &KubeconfigUser<'_>,
    now: SystemTime,
) -> Result<(), PkiError> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(()) };
    match good_for_months(&text, keys, now) {
        Some(false) => write_durably(path, kubeconfig(keys, server_url, user, now)?.as_bytes(), mode),
        Some(true) | None => Ok(()),
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn decoded(text: &str, name: &str) -> Option<String> {
    STANDARD.decode(field(text, name)?).ok().and_then(|bytes| String::from_utf8(bytes).ok())
}

/// Whether the certificate of a kubeconfig is valid now and for months; none if it is not from this cluster's CA.
fn good_for_months(text: &str, keys: &ClusterKeys, now: SystemTime) -> Option<bool> {
    use rustls_pki_types::pem::PemObject;
    let chain = decoded(text, "client-certificate-data").filter(|c| c.ends_with(keys.client_ca.certificate_pem()))?;
    let leaf = rustls_pki_types::CertificateDer::from_pem_slice(chain.as_bytes()).ok()?;
    let (from, until) = super::authority::validity(&leaf)?;
    Some(from <= now && until > now + RENEW_BEFORE)
}

fn still_serves(text: &str, keys: &ClusterKeys, server_url: &str, now: SystemTime) -> bool {
    field(text, "server") == Some(server_url)
        && decoded(text, "certificate-authority-data").as_deref() == Some(keys.server_ca.certificate_pem())
        && good_for_months(text, keys, now) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_kubeconfig_is_kept_while_it_serves_and_replaced_when_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/coracle.yaml");
        let now = SystemTime::now();
        let keys = ClusterKeys::generate(now).unwrap();
        let write = |mode, url: &str, now| {
            write_kubeconfig(&path, mode, &keys, url, &ADMIN, now).unwrap();
            std::fs::read_to_string(&path).unwrap()
        };
        let first = write(0o600, "https://127.0.0.1:6443", now);
        assert_eq!(mode(&path), 0o600);
        assert_eq!(write(0o644, "https://127.0.0.1:6443", now), first);
        assert_eq!(mode(&path), 0o644);
        let moved = write(0o600, "https://127.0.0.1:7443", now);
        assert_ne!(moved, first);
        let later = write(0o600, "https://127.0.0.1:7443", now + Duration::from_secs(300 * 86_400));
        assert_ne!(later, moved);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_kubeconfig_is_renewed_when_its_end_is_near_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coracle.yaml");
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        let url = "https://127.0.0.1:6443";
        let keys = ClusterKeys::generate(now).unwrap();
        let renew = |keys: &ClusterKeys, now| {
            renew_kubeconfig(&path, 0o600, keys, url, &ADMIN, now).unwrap();
            std::fs::read_to_string(&path).ok()
        };
        assert_eq!(renew(&keys, now), None, "what is not there does not appear");
        write_kubeconfig(&path, 0o600, &keys, url, &ADMIN, now).unwrap();
        let edited = std::fs::read_to_string(&path).unwrap().replace("127.0.0.1", "192.0.2.7");
        std::fs::write(&path, &edited).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(renew(&keys, now + 200 * day).as_deref(), Some(&*edited));
        assert_eq!(mode(&path), 0o644);
        let other = ClusterKeys::generate(now).unwrap();
        assert_eq!(renew(&other, now + 400 * day).as_deref(), Some(&*edited), "another cluster's");
        for then in [now + 400 * day, now] {
            let renewed = renew(&keys, then).unwrap();
            assert_eq!(good_for_months(&renewed, &keys, then), Some(true));
            assert_ne!(renewed, edited);
        }
    }

    #[test]
    fn tokens_are_private_and_name_the_ca() {
        let dir = tempfile::tempdir().unwrap();
        let keys = ClusterKeys::generate(SystemTime::now()).unwrap();
        write_data_dir(dir.path(), &keys).unwrap();
        let token = std::fs::read_to_string(dir.path().join("server/agent-token")).unwrap();
        let token = JoinToken::parse(&token).unwrap();
        let bundle = std::fs::read_to_string(dir.path().join("server/tls/server-ca.crt")).unwrap();
        assert!(token.trusts(&bundle));
        assert_eq!((token.user.as_str(), token.secret), ("node", keys.agent_secret.clone()));
        assert_eq!(mode(&dir.path().join("server/token")), 0o600);
    }
}
