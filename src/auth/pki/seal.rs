//! The cluster key: 32 bytes in `DATA/server/cluster.key` (0600) with which the cluster's records of keys are sealed.

use super::{PkiError, files};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use std::path::{Path, PathBuf};

/// An AEAD key (AES-256-GCM); sealed bytes are `nonce || ciphertext || tag`.
pub struct ClusterKey {
    key: LessSafeKey,
    path: PathBuf,
}

impl ClusterKey {
    /// Reads the key, or makes one and has it durable on disk before anything can be sealed with it.
    pub fn load_or_create(path: &Path) -> Result<ClusterKey, PkiError> {
        if let Some(key) = ClusterKey::load(path)? {
            return Ok(key);
        }
        let mut bytes = [0u8; 32];
        SystemRandom::new().fill(&mut bytes).map_err(|_| PkiError::Random)?;
        ClusterKey::install(path, &to_hex(&bytes))
    }

    /// Reads the key; none when there is no such file.
    pub fn load(path: &Path) -> Result<Option<ClusterKey>, PkiError> {
        match std::fs::read_to_string(path) {
            Ok(text) => ClusterKey::parse(path, &text).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PkiError::File { path: path.to_owned(), source }),
        }
    }

    /// Writes a key that came from elsewhere, as 64 hexadecimal digits, durably.
    pub fn install(path: &Path, text: &str) -> Result<ClusterKey, PkiError> {
        let key = ClusterKey::parse(path, text)?;
        files::write_durably(path, format!("{}\n", text.trim()).as_bytes(), 0o600)?;
        Ok(key)
    }

    fn parse(path: &Path, text: &str) -> Result<ClusterKey, PkiError> {
        let bytes = from_hex(text.trim()).ok_or_else(|| PkiError::BadClusterKey(path.to_owned()))?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| PkiError::BadClusterKey(path.to_owned()))?;
        Ok(ClusterKey { key: LessSafeKey::new(key), path: path.to_owned() })
    }

    /// The key as it lies on disk, for a server that joins.
    pub fn text(&self) -> Result<String, PkiError> {
        let text = std::fs::read_to_string(&self.path);
        let text = text.map_err(|source| PkiError::File { path: self.path.clone(), source })?;
        Ok(text.trim().to_owned())
    }

    /// Where the key lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Encrypts `plain` for the record `name`; a sealed value only opens under the same name.
    pub fn seal(&self, name: &str, plain: &[u8]) -> Result<Vec<u8>, PkiError> {
        let mut nonce = [0u8; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| PkiError::Random)?;
        let mut body = plain.to_vec();
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(name.as_bytes()), &mut body)
            .map_err(|_| PkiError::BadKey)?;
        Ok([nonce.as_slice(), &body].concat())
    }

    /// Decrypts what [`ClusterKey::seal`] made; anything altered, cut or sealed otherwise is refused.
    pub fn open(&self, name: &str, sealed: &[u8]) -> Result<Vec<u8>, PkiError> {
        let wrong = || PkiError::WrongClusterKey(self.path.clone());
        let (nonce, body) = sealed.split_first_chunk::<NONCE_LEN>().ok_or_else(wrong)?;
        let mut body = body.to_vec();
        let plain = self
            .key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(name.as_bytes()), &mut body)
            .map_err(|_| wrong())?;
        Ok(plain.to_vec())
    }
}

/// Lower-case hexadecimal.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_only_what_was_sealed_with_this_key_under_this_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.key");
        let key = ClusterKey::load_or_create(&path).unwrap();
        let sealed = key.seal("keys", b"secret").unwrap();
        let reloaded = ClusterKey::load_or_create(&path).unwrap();
        assert_eq!(reloaded.open("keys", &sealed).unwrap(), b"secret");
        assert!(matches!(key.open("other", &sealed), Err(PkiError::WrongClusterKey(_))));
        let mut altered = sealed.clone();
        altered[NONCE_LEN] ^= 1;
        assert!(key.open("keys", &altered).is_err());
        assert!(key.open("keys", &sealed[..10]).is_err());
        let other = ClusterKey::load_or_create(&dir.path().join("other.key")).unwrap();
        assert!(other.open("keys", &sealed).is_err());
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_key_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.key");
        for text in ["", "abc", "zz", "00112233", "ää"] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(ClusterKey::load_or_create(&path), Err(PkiError::BadClusterKey(_))), "{text}");
        }
    }
}
